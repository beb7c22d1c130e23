"""Draws a finished run: its losses and, where pairs were switched, how long each direction was live."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the backend is chosen)
from matplotlib.axes import Axes  # noqa: E402

from srlora_dist.runlog import read_lines  # noqa: E402

TRAIN, EVAL, RETIRED, MARK = "#7a9cc6", "#c44e52", "#a9b8c9", "#555555"


@dataclass
class Interval:
    """One direction was live at one site.

    Args:
        direction: Its number.
        start: Step after which it was taken.
        end: Step after which it was fused, or the last step of the run.
        fused: Whether it was fused before the end.
    """

    direction: int
    start: int
    end: int
    fused: bool


def draw(folder: str | Path, summary: dict[str, object]) -> list[Path]:
    """Draw what ``metrics.jsonl`` and ``switches.jsonl`` of a run hold.

    Args:
        folder: The output folder of the run.
        summary: The content of its ``summary.json``.

    Returns:
        The PNG files, in ``figures/``: ``loss.png`` and, after at least one switch, ``active_intervals.png`` and
        ``interval_lengths.png``.
    """
    folder = Path(folder)
    switches = read_lines(folder / "switches.jsonl")
    steps = sorted({line["step"] for line in switches if line["switch"] > 0})
    title = f"{summary['method']} on {summary['task']}, seed {summary['seed']}"
    (folder / "figures").mkdir(exist_ok=True)
    paths = [_draw_losses(folder, title, steps)]
    if steps:
        intervals = active_intervals(switches, summary["steps"])
        paths += [_draw_one_site(folder, title, intervals), _draw_lengths(folder, title, intervals)]
    return paths


def active_intervals(switches: list[dict], num_steps: int) -> dict[str, list[Interval]]:
    """For each site when each direction was live, from the lines of ``switches.jsonl``."""
    done: dict[str, list[Interval]] = {}
    live: dict[str, dict[int, int]] = {}
    for line in switches:
        starts = live.setdefault(line["site"], {})
        ended = done.setdefault(line["site"], [])
        ended += [Interval(k, starts.pop(k), line["step"], True) for k in line["directions"] if k in starts]
        starts.update(dict.fromkeys(line["new_directions"], line["step"]))
    for site, starts in live.items():
        done[site] += [Interval(k, start, num_steps, False) for k, start in starts.items()]
    return {site: sorted(intervals, key=lambda x: x.direction) for site, intervals in done.items()}


def _draw_losses(folder: Path, title: str, switch_steps: list[int]) -> Path:
    lines = read_lines(folder / "metrics.jsonl")
    figure, axes = plt.subplots(figsize=(7, 4))
    for split, style in (("train", {"color": TRAIN}), ("eval", {"color": EVAL, "marker": "o", "markersize": 4})):
        points = [(line["step"], line["loss"]) for line in lines if line["split"] == split]
        steps, losses = zip(*points, strict=True) if points else ((), ())
        label = "training (mean since the last point)" if split == "train" else "validation"
        axes.plot(steps, [np.nan if loss is None else loss for loss in losses], label=label, **style)
    _mark_switches(axes, switch_steps)
    axes.set(title=f"Loss: {title}", xlabel="optimizer step", ylabel="loss (nats; for a regression squared error)")
    axes.legend()
    return _save(figure, folder / "figures" / "loss.png")


def _draw_one_site(folder: Path, title: str, intervals: dict[str, list[Interval]]) -> Path:
    """The paper's Figure 5, for the site in the middle of the model."""
    site = list(intervals)[len(intervals) // 2]
    figure, axes = plt.subplots(figsize=(7, max(3.0, 1.5 + 0.09 * len(intervals[site]))))
    for fused, color, label in ((True, RETIRED, "fused into W later"), (False, TRAIN, "live at the end")):
        rows = [x for x in intervals[site] if x.fused == fused]
        lengths, starts = [x.end - x.start for x in rows], [x.start for x in rows]
        axes.barh([x.direction for x in rows], lengths, left=starts, height=0.8, color=color, label=label)
    _mark_switches(axes, sorted({x.start for x in intervals[site] if x.start > 0}))
    axes.set(
        title=f"Active directions: {title}\n{site}",
        xlabel="optimizer step",
        ylabel="direction (0 = largest singular value)",
    )
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.legend(loc="lower left")
    return _save(figure, folder / "figures" / "active_intervals.png")


def _draw_lengths(folder: Path, title: str, intervals: dict[str, list[Interval]]) -> Path:
    """The paper's Figure 4: over all sites how long directions stay, and how much that varies within a site."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    values, counts = np.unique([x.end - x.start for site in intervals.values() for x in site], return_counts=True)
    gap = np.diff(values).min() if len(values) > 1 else 1
    left.bar(values, counts, width=0.8 * gap, color=TRAIN, label=f"{len(intervals)} sites")
    left.set(title="Lengths of active intervals", xlabel="length (optimizer steps)", ylabel="directions")
    left.legend()
    variances = [np.var([x.end - x.start for x in site]) for site in intervals.values()]
    right.bar(range(len(variances)), variances, color=TRAIN, label="one site")
    right.axhline(np.mean(variances), color=EVAL, linestyle="--", label="mean of the sites")
    right.set(title="Variance within a site", xlabel="site, in the order of the model", ylabel="variance (steps²)")
    right.set_ylim(top=1.25 * max(variances))  # room for the legend
    right.legend(loc="upper right")
    figure.suptitle(title)
    return _save(figure, folder / "figures" / "interval_lengths.png")


def _mark_switches(axes: Axes, steps: list[int]) -> None:
    for number, step in enumerate(steps):
        axes.axvline(step, color=MARK, linewidth=0.8, linestyle=":", label="switch" if number == 0 else None)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
