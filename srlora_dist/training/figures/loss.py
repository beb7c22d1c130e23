"""The paper's Figure 3: the loss over the steps, of one run or of several beside each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from srlora_dist.tasks.sources import task_title
from srlora_dist.training.figures.runs import RunFiles, about
from srlora_dist.training.figures.style import EVAL, TITLES, TRAIN, legend_above, line_styles, mark_switches, plt, save

NAMES = {"train": "training loss", "eval": "validation loss"}


def draw_loss(run: RunFiles, path: Path) -> Path:
    """Both losses of one run."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    _plot(axes, [run], "train", "training (mean since the last point)", color=TRAIN)
    _plot(axes, [run], "eval", "validation", color=EVAL, marker="o", markersize=4)
    mark_switches(axes, run.switch_steps)
    name = TITLES.get(run.method, run.method)
    axes.set(title=f"Loss: {name} on {task_title(run.task)}", xlabel="optimizer step", ylabel=_unit(run.task))
    axes.legend()
    return save(figure, path, about([run]))


def compare_losses(runs: list[RunFiles], path: Path) -> Path:
    """A column a task with training above validation; the seeds of a label are a mean and a band."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    labels = list(dict.fromkeys(run.label for run in runs))
    styles = line_styles(labels)
    figure, grid = plt.subplots(2, len(tasks), figsize=(max(7.0, 5.2 * len(tasks)), 7.4), squeeze=False, sharex="col")
    for column, task in enumerate(tasks):
        here = [run for run in runs if run.task == task]
        switches = {tuple(run.switch_steps) for run in here if run.switch_steps}
        for axes, split in zip(grid[:, column], ("train", "eval"), strict=True):
            for label in labels:
                group = [run for run in here if run.label == label]
                marks = {"marker": "o", "markersize": 4} if split == "eval" else {}
                _plot(axes, group, split, _name(label, group), **styles[label], **marks)
            mark_switches(axes, list(next(iter(switches))) if len(switches) == 1 else [])
            axes.set(title=f"{task_title(task)}: {NAMES[split]}", ylabel=_unit(task))
        grid[1, column].set_xlabel("optimizer step")
    # Above the axes, for curves that fall leave no corner free.
    found = {name: line for axes in grid.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    height = legend_above(figure, list(found.values()), list(found), most_across=5)
    figure.set_figheight(figure.get_figheight() + height)
    bands = "Bands: mean and one sample standard deviation of n seeds. "
    text = bands * any("(n=" in name for name in found) + about(runs)
    return save(figure, path, text, above=height)


def _name(label: str, group: list[RunFiles]) -> str:
    title = TITLES.get(label, label)
    return f"{title} (n={len(group)})" if len(group) > 1 else title


def _unit(task: str) -> str:
    if task.endswith(".py"):
        return "loss"  # of a task of the user's own, whatever it is
    return "loss (squared error)" if task == "stsb" else "loss (nats)"


def _plot(axes: Axes, group: list[RunFiles], split: str, label: str, **style: object) -> None:
    """One curve; of several runs their mean at the steps that all of them logged, and a band of one deviation."""
    points = [run.points(split) for run in group]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    if not steps:
        return
    losses = np.array([[np.nan if run[step] is None else run[step] for step in steps] for run in points])
    mean = losses.mean(axis=0)
    axes.plot(steps, mean, label=label, **style)
    if len(points) > 1:
        deviation = losses.std(axis=0, ddof=1)
        axes.fill_between(steps, mean - deviation, mean + deviation, color=style["color"], alpha=0.18, linewidth=0)
