"""What all figures share: colours, the line below them that says what was run, and how they are saved."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the backend is chosen)
from matplotlib.artist import Artist  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from srlora_dist.checkpoint.files import write_whole  # noqa: E402

TRAIN, EVAL, RETIRED, MARK = "#7a9cc6", "#c44e52", "#a9b8c9", "#555555"
OF_METHOD = {"lora": "#56699e", "pissa": "#d98c3f", "srlora": "#c44e52", "adalora": "#5a9a68"}
OTHERS = ["#8d6bb1", "#937860", "#3f9fa8", "#d172a9", "#8c8c8c", "#b5a642", "#222222", "#e8845c", "#6aa3e0", "#2e7d32"]
"""Colours of methods, and of all else that is told apart."""
TITLES = {"lora": "LoRA", "pissa": "PiSSA", "srlora": "SRLoRA", "adalora": "AdaLoRA"}


LINES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))
"""Styles of lines, one after the other where the colours are used up."""


def colors(labels: list[str]) -> dict[str, str]:
    """A colour for each label; methods keep theirs in every figure."""
    return {label: style["color"] for label, style in line_styles(labels).items()}


def line_styles(labels: list[str]) -> dict[str, dict[str, object]]:
    """A colour and a style of line for each label, no two alike among the first forty; methods keep theirs."""
    chosen = {label: {"color": OF_METHOD[label], "linestyle": "-"} for label in labels if label in OF_METHOD}
    rest = [label for label in labels if label not in chosen]
    return chosen | {
        label: {"color": OTHERS[k % len(OTHERS)], "linestyle": LINES[k // len(OTHERS) % len(LINES)]}
        for k, label in enumerate(rest)
    }


def fit(text: str, width: float, size: float = 12.0) -> str:
    """The text in lines that a figure of so many inches has room for, in letters of so many points."""
    return "\n".join(textwrap.wrap(text, int(width * 72 / (0.6 * size)), break_on_hyphens=False))


def legend_above(figure: plt.Figure, handles: list[Artist], names: list[str], most_across: int) -> float:
    """Put a legend above all axes, in as many columns as there is room for.

    Returns:
        Its height in inches, which :func:`save` is to leave free.
    """
    names = [fit(name, figure.get_figwidth() - 0.8, 8) for name in names]
    for across in range(min(most_across, len(names)), 0, -1):
        text = {"ncols": across, "fontsize": 8, "handlelength": 3.5, "frameon": False}  # long enough for dashes
        legend = figure.legend(handles, names, loc="upper center", **text)
        extent = legend.get_window_extent(figure.canvas.get_renderer())
        if across == 1 or extent.width <= figure.bbox.width:
            return extent.height / figure.dpi
        legend.remove()
    return 0.0


def mark_switches(axes: Axes, steps: list[int]) -> None:
    """A dotted line at each switch."""
    for number, step in enumerate(steps):
        axes.axvline(step, color=MARK, linewidth=0.8, linestyle=":", label="switch" if number == 0 else None)


def save(figure: plt.Figure, path: Path, about: str, above: float = 0.0) -> Path:
    """Write a figure with the line ``about`` below it, and close it.

    Args:
        figure: Laid out here.
        path: A PNG file; its folder is made.
        about: What was run, on what, and what else is to be said.
        above: Inches that are left free at the top, for a legend of the whole figure.
    """
    size, width = 7.0, figure.get_figwidth()
    lines = textwrap.wrap(about, width=int(width * 72 / (0.6 * size)))
    below = (len(lines) * size * 1.35 / 72 + 0.08) / figure.get_figheight()
    figure.tight_layout(rect=(0, below, 1, 1 - above / figure.get_figheight()))
    figure.text(0.01, 0.012, "\n".join(lines), fontsize=size, color=MARK, va="bottom", linespacing=1.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda beside: figure.savefig(beside, dpi=150))
    plt.close(figure)
    return path
