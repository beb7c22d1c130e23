"""The figures of the study."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from measures import final_loss, main_figure, main_metric, smooth_curve

from srlora_dist.training.figures.style import MARK, OF_METHOD, OTHERS, legend_above, plt, save

AGES = 5
"""Lives of this many intervals and more are one colour."""


def draw_curves(curves: dict[str, dict[str, dict[int, dict]]], names: list[str], path: Path) -> Path:
    """A panel a task: the training loss of each method, seeds as a mean and the range between them."""
    color_of = dict(zip(names, [*(OF_METHOD[method] for method in ("lora", "pissa", "srlora")), *OTHERS], strict=False))
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    figure, grid = plt.subplots(down, across, figsize=(4.4 * across, 3.4 * down), squeeze=False)
    for axes, (task, found) in zip(grid.flat, curves.items(), strict=False):
        for name, lines in found.items():
            steps, losses = smooth_curve(next(iter(lines.values())))[0], [smooth_curve(x)[1] for x in lines.values()]
            axes.plot(steps, np.mean(losses, 0), color=color_of[name], label=name)
            axes.fill_between(steps, np.min(losses, 0), np.max(losses, 0), color=color_of[name], alpha=0.15, lw=0)
        axes.set(title=task, xlabel="optimizer step", ylabel="training loss", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    grid.flat[0].legend(fontsize=8)
    seeds = {len(lines) for found in curves.values() for lines in found.values()}
    about = f"Mean over a tenth of the steps; lines are means of {min(seeds)} seeds or more, bands their range."
    return save(figure, path, about)


def draw_variants(points: dict[str, dict[str, dict[int, dict]]], title: str, path: Path) -> Path:
    """A row a task: how the training loss and the metric differ from the first variant's, and how long pairs lived."""
    names = list(dict.fromkeys(name for named in points.values() for name in named))
    size = (11.0, (0.9 + 0.27 * len(names)) * len(points) + 0.6)
    figure, grid = plt.subplots(len(points), 3, figsize=size, squeeze=False, sharey=True)
    for row, (task, named) in zip(grid, points.items(), strict=True):
        base = named[names[0]]
        for place, name in enumerate(names):
            lines = named.get(name, {})
            for axes, figure_of in zip(row, (final_loss, main_figure), strict=False):
                values = [figure_of(line) - figure_of(base[seed]) for seed, line in lines.items()]
                axes.scatter(values, [place] * len(values), color=OTHERS[0], s=16, alpha=0.7)
                axes.scatter(np.mean(values) if values else [], [place] if values else [], color="k", marker="|", s=90)
            _draw_lifetimes(row[2], place, list(lines.values()))
        for axes in row[:2]:
            axes.axvline(0, color=MARK, lw=0.8, ls=":")
            axes.locator_params(axis="x", nbins=5)
        row[0].set(title=task, xlabel="training loss, difference", yticks=range(len(names)), yticklabels=names)
        row[1].set(title=task, xlabel=f"{main_metric(next(iter(base.values())))}, difference")
        row[2].set(title=task, xlabel="share of the fused pairs", xlim=(0, 1))
    grid[0, 0].invert_yaxis()
    keys = [plt.Rectangle((0, 0), 1, 1, color=_shade(age)) for age in range(AGES)]
    ages = [*(f"lived {age}" for age in range(1, AGES)), f"{AGES} or more intervals"]
    above = legend_above(figure, keys, ages, AGES)
    about = f"{title} Differences from {names[0]} with the same seed: a dot a seed, a bar their mean."
    return save(figure, path, about, above=above)


def _draw_lifetimes(axes: Axes, place: int, lines: list[dict]) -> None:
    """One bar: of all fused pairs of these runs the share that had lived 1, 2, ... intervals."""
    counts = [sum(ages) for ages in zip_longest(*(line["switches"]["lifetimes"] for line in lines), fillvalue=0)]
    left = 0.0
    for age, count in enumerate(counts):
        width = count / sum(counts)
        axes.barh(place, width, left=left, color=_shade(age), height=0.6)
        left += width


def _shade(age: int) -> tuple[float, ...]:
    return plt.colormaps["viridis"](min(1.0, age / (AGES - 1)))
