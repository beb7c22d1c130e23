"""Prints a table beside the paper's, and draws it."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.reproduce.grid import Cell, TableGrid
from benchmarks.reproduce.paper import METRICS, PaperTable, differs
from benchmarks.reproduce.results import Results
from benchmarks.reproduce.table import Column, draw_table
from srlora_dist.checkpoint.files import write_whole
from srlora_dist.tasks.sources import task_title
from srlora_dist.training.figures.drawing import compare
from srlora_dist.training.figures.runs import RunFiles, name_runs
from srlora_dist.training.figures.style import TITLES
from srlora_dist.training.run_log import read_jsonl

Found = dict[tuple[str, str], list[tuple[Cell, dict]]]
"""By task and method the runs that have a result, with it."""


def found_results(grid: TableGrid, results: Results) -> Found:
    """The good results of the grid's own runs; others in the file are of other options."""
    found: Found = {}
    for cell in grid.cells:
        line = results.of(cell)
        if line is not None:
            found.setdefault((cell.task, cell.method), []).append((cell, line))
    return found


def write_table(grid: TableGrid, found: Found, failed: list[str], path: Path) -> str:
    """Write the table as Markdown, with what differs from the paper above it and the options below it."""
    tasks, methods = _tasks(grid), _methods(grid)
    columns = [(name, metric) for name in tasks for metric in grid.table.tasks[name].metrics]
    lines = [f"## Table {grid.table.number}, {grid.table.title}", "", _caption(grid, found), ""]
    lines += ["| method | figures | " + " | ".join(f"{task_title(n)} {METRICS[m]}" for n, m in columns) + " |"]
    lines += ["|---|---|" + "---|" * len(columns)]
    for method in methods:
        for which, title in (("final", "here, last step"), ("best", "here, lowest validation loss")):
            cells = [_mean(values(found, name, method, metric, which)) for name, metric in columns]
            lines.append(f"| {TITLES[method]} | {title} | {' | '.join(cells)} |")
        cells = [_theirs(grid.table, name, method, metric) for name, metric in columns]
        lines.append(f"| {TITLES[method]} | {grid.table.source} | {' | '.join(cells)} |")
    lines += ["", *_settings(grid, found), *(f"\nFailed: {line}" for line in failed), ""]
    text = "\n".join(lines)
    write_whole(path, lambda beside: beside.write_text(text))
    return text


def draw_figures(grid: TableGrid, found: Found, folder: Path) -> list[Path]:
    """The table as points with their deviation, and Figures 3, 4 and 5 of the runs."""
    columns = [
        Column(
            title=task_title(name),
            unit=_unit(grid.table.tasks[name].metrics[0]),
            here={m: [100 * v for v in _main(grid, found, name, m) if v is not None] for m in _methods(grid)},
            paper={m: figures[0] for m, figures in grid.table.tasks[name].figures.items()},
        )
        for name in _tasks(grid)
    ]
    about = _caption(grid, found) + " " + " ".join(line.strip("- ") for line in _settings(grid, found))
    paths = [draw_table(columns, grid.table.source, folder / f"table{grid.table.number}.png", about)]
    cells = sorted(
        (cell for runs in found.values() for cell, _ in runs), key=lambda cell: _methods(grid).index(cell.method)
    )
    runs = [RunFiles.read(cell.folder) for cell in cells if read_jsonl(cell.folder / "metrics.jsonl")]
    if runs:
        name_runs(runs, None)
        for run in runs:
            run.note = differs([run.task], [run.model])
        paths += compare(runs, folder)[0]
    return paths


def values(found: Found, task: str, method: str, metric: str, which: str) -> list[float | None]:
    """A figure of each seed; None where it was not finite."""
    return [line[which][metric] for _, line in found.get((task, method), [])]


def _main(grid: TableGrid, found: Found, task: str, method: str) -> list[float | None]:
    return values(found, task, method, grid.table.tasks[task].metrics[0], "final")


def _unit(metric: str) -> str:
    share = metric in ("accuracy", "f1")
    return f"{METRICS[metric]} (%)" if share else f"{METRICS[metric]} correlation × 100"


def _mean(figures: list[float | None]) -> str:
    """In percent: the mean, the sample standard deviation and the number of seeds."""
    if not figures:
        return "not run"
    if None in figures:
        return f"{figures.count(None)} of {len(figures)} not finite"
    deviation = f" ± {100 * statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{100 * statistics.mean(figures):.2f}{deviation} (n={len(figures)})"


def _theirs(table: PaperTable, name: str, method: str, metric: str) -> str:
    task = table.tasks[name]
    figures = task.figures.get(method)
    return "not in it" if figures is None else f"{figures[task.metrics.index(metric)]:.{table.decimals}f}"


def _caption(grid: TableGrid, found: Found) -> str:
    lines = [line for runs in found.values() for _, line in runs]
    models = list(dict.fromkeys(line["model"] for line in lines)) or [grid.table.model]
    dates = sorted({line["date"] for line in lines})
    when = f" Runs of {dates[0]}{f' to {dates[-1]}' if dates[1:] else ''}." if dates else ""
    return (
        "In percent, on the validation split: mean ± sample standard deviation over n seeds. "
        f"Here: {', '.join(models)}. {differs(_tasks(grid), models)} "
        f"The paper's figures are of {grid.table.source}, by summaries of it.{when}"
    )


def _settings(grid: TableGrid, found: Found) -> list[str]:
    """For each task what was trained, as it differs between tasks and not between methods."""
    lines = []
    for name in _tasks(grid):
        runs = [run for (task, _), runs in found.items() if task == name for run in runs]
        if runs:
            cell, line = runs[0]
            train, rank = cell.config.train, cell.config.lora.rank
            engines = dict.fromkeys(f"{each['world_size']} x {each['storage']}" for _, each in runs)
            epochs = "" if line["epochs"] is None else f" ({line['epochs']:.3g} epochs)"
            mixed = f", mixed precision {cell.mixed_precision}" * (cell.mixed_precision != "no")
            lines.append(
                f"- {task_title(name)}: {line['steps']} steps of {train.batch_size} samples"
                f"{epochs}, rate {train.learning_rate:g}, inputs of up to "
                f"{cell.config.task.max_length} tokens, rank {rank}, target rank {cell.config.srlora.num_directions}, "
                f"{' / '.join(engines)}, {cell.config.model.stored_as}{mixed}."
            )
    return lines


def _tasks(grid: TableGrid) -> list[str]:
    return list(dict.fromkeys(cell.task for cell in grid.cells))


def _methods(grid: TableGrid) -> list[str]:
    return list(dict.fromkeys(cell.method for cell in grid.cells))
