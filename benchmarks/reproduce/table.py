"""A table of results as points: each method's seeds, their mean and deviation, and the paper's figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from srlora_dist.training.figures.style import MARK, TITLES, colors, plt, save


@dataclass(frozen=True)
class Column:
    """One task.

    Args:
        title: Its name.
        unit: What is drawn, and its unit.
        here: For each method what its seeds reached, times 100.
        paper: For each method what the paper reports, times 100.
    """

    title: str
    unit: str
    here: dict[str, list[float]]
    paper: dict[str, float]


def draw_table(columns: list[Column], source: str, path: Path, about: str) -> Path:
    """Draw a panel for each task.

    Args:
        columns: The tasks; all have the same methods.
        source: Where the paper's figures stand.
        path: A PNG file.
        about: What was run, and what differs from the paper.
    """
    methods = list(columns[0].here)
    color = colors(methods)
    num_across = min(3, len(columns))
    num_down = -(-len(columns) // num_across)
    figure, grid = plt.subplots(
        num_down, num_across, figsize=(max(8.4, 4.2 * num_across), 4.2 * num_down), squeeze=False
    )
    for axes, column in zip(grid.flat, columns, strict=False):
        for place, method in enumerate(methods):
            seeds = column.here[method]
            if seeds:
                deviation = np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0
                axes.scatter([place - 0.12] * len(seeds), seeds, s=14, color=color[method], alpha=0.5, linewidth=0)
                axes.errorbar(place, np.mean(seeds), deviation, fmt="o", color=color[method], capsize=4)
            if method in column.paper:
                axes.scatter(place + 0.2, column.paper[method], marker="D", s=36, facecolor="none", edgecolor=MARK)
        axes.set(title=column.title, ylabel=column.unit, xlim=(-0.5, len(methods) - 0.5))
        axes.set_xticks(range(len(methods)), [TITLES[method] for method in methods])
        axes.grid(axis="y", alpha=0.3)
        axes.margins(y=0.15)
    for axes in grid.flat[len(columns) :]:
        axes.set_visible(False)
    handles = [
        plt.Line2D([], [], color=MARK, marker="o", linestyle="-", label="here, last step: mean and standard deviation"),
        plt.Line2D([], [], color=MARK, marker="o", markersize=3, linestyle="", alpha=0.5, label="here, each seed"),
        plt.Line2D([], [], color=MARK, marker="D", linestyle="", fillstyle="none", label=f"the paper ({source})"),
    ]
    figure.legend(handles=handles, loc="upper center", ncols=3, fontsize=8, frameon=False)
    return save(figure, path, about, above=0.3)
