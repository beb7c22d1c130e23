"""The figures of the study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from measures import final_loss, smooth_curve

from srlora_dist.figures.style import OF_METHOD, OTHERS, plt, save


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
        axes.set(title=task, xlabel="optimizer step", ylabel="training loss")
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    grid.flat[0].legend(fontsize=8)
    seeds = {len(lines) for found in curves.values() for lines in found.values()}
    about = f"Mean over a tenth of the steps; lines are means of {min(seeds)} seeds or more, bands their range."
    return save(figure, path, about)


def draw_variants(points: dict[str, dict[str, dict[int, dict]]], title: str, path: Path) -> Path:
    """A panel a task: the final training loss of each variant, a dot a seed."""
    names = list(dict.fromkeys(name for named in points.values() for name in named))
    figure, grid = plt.subplots(1, len(points), figsize=(4.6 * len(points), 1.2 + 0.42 * len(names)), squeeze=False)
    for axes, (task, named) in zip(grid.flat, points.items(), strict=True):
        for place, name in enumerate(names):
            losses = [final_loss(line) for line in named.get(name, {}).values()]
            color = OF_METHOD["srlora"] if place == 0 else OTHERS[0]
            axes.scatter(losses, [place] * len(losses), color=color, s=24)
        axes.set(title=task, xlabel="final training loss", yticks=range(len(names)), yticklabels=names)
        axes.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    return save(figure, path, "A dot a seed; the paper's choice is on top.", above=0.25)
