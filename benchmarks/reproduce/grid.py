"""Which runs a table consists of: method x task x seed, each with its preset and the options for all of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from typing_extensions import override

from benchmarks.reproduce.paper import TABLES, PaperTable
from srlora_dist.config.method import DEFAULT_TARGET_RANK
from srlora_dist.config.option import flatten, unnamed
from srlora_dist.config.parse import parse
from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.registry import check_task
from srlora_dist.tasks.sources import MINILM, model_title

METHODS = ("lora", "pissa", "srlora", "adalora")
OWN = ("--method", "--seed", "--output_dir", "--task.name")
UNNAMED = unnamed(RunConfig, "grid")
"""Options that have no part in what a run computes."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        task: Its name.
        method: Its method.
        seed: Its seed.
        arguments: Of ``launch/train.py``.
        config: What these come to.
        mixed_precision: Of the launch, which is no option of the run.
    """

    task: str
    method: str
    seed: int
    arguments: tuple[str, ...]
    config: RunConfig
    mixed_precision: str = "no"

    @property
    def name(self) -> str:
        """In a message."""
        return f"{self.task} {self.method} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The output folder of the run."""
        return Path(self.config.output_dir)

    @property
    def digest(self) -> str:
        """Of all options that decide what the run computes."""
        return digest(asdict(self.config), self.mixed_precision)


@dataclass(frozen=True)
class Grid:
    """All runs, and where they go.

    Args:
        cells: In the order in which they run.
        folder: Of the runs, their logs and results.
        title: In the progress bar.
        launcher: What starts Python on the training script.
    """

    cells: list[Cell]
    folder: Path
    title: str
    launcher: tuple[str, ...]

    @property
    def results(self) -> Path:
        """The file of results."""
        return self.folder / "results.jsonl"

    def about(self, cell: Cell) -> dict[str, object]:  # noqa: ARG002 (the interface)
        """What else stands in the line of a run that is done."""
        return {}


@dataclass(frozen=True)
class TableGrid(Grid):
    """The runs of a table: a seed of each method and task before the next seed.

    Args:
        table: The paper's.
        dry_run: Say what would run, and run nothing.
    """

    table: PaperTable
    dry_run: bool

    @override
    def about(self, cell: Cell) -> dict[str, object]:
        return {"table": self.table.number}


def digest(config: dict[str, object], mixed_precision: str) -> str:
    """Of the options in a resolved configuration that decide what a run computes, and of the model by its title.

    An option at its default has no part in it, so that a result outlives the options that are added after it.
    """
    defaults = flatten(asdict(RunConfig()))
    options = flatten(config)
    if options["srlora.target_rank"] == DEFAULT_TARGET_RANK:  # the same, said
        options["srlora.target_rank"] = None
    options = {name: value for name, value in options.items() if value != defaults[name] and name not in UNNAMED}
    options["model.name_or_path"] = model_title(flatten(config)["model.name_or_path"])
    if mixed_precision != "no":
        options["mixed_precision"] = mixed_precision
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


def build_grid(argv: list[str], presets: Path) -> TableGrid:
    """Read the command line; every run's configuration is checked before the first one starts.

    Args:
        argv: The options of ``launch/reproduce.py``, and those of ``launch/train.py`` that all runs get.
        presets: The folder ``launch/paper``.

    Raises:
        ValueError: An option, of the grid or of a run, is unknown or out of its range.
    """
    options, for_runs = _parser().parse_known_args(argv)
    table = TABLES[options.table]
    tasks, methods = options.tasks or _tasks_of(table), options.methods or list(table.methods)
    for names, all_names, what in ((tasks, list(table.tasks), "--tasks"), (methods, list(METHODS), "--methods")):
        for name in names:
            if name not in all_names:
                raise ValueError(f"{what} has {name!r}, which table {table.number} has not: choose of {all_names}")
    if options.seeds < 1:
        raise ValueError(f"--seeds is {options.seeds}: choose at least 1")
    if options.accelerate is not None and not Path(options.accelerate).is_file():
        raise ValueError(f"--accelerate is {options.accelerate}, which is no file: give one of launch/accelerate")
    for word in for_runs:
        if word.split("=")[0] in OWN:
            raise ValueError(f"{word.split('=')[0]} is set by the grid: choose with --methods, --tasks, --seeds")
    if options.model is not None:
        model = str(MINILM.folder()) if options.model == "minilm" else options.model
        for_runs = [f"--model.name_or_path={model}", *for_runs]
    folder = Path(options.output_dir or f"runs/table{table.number}").expanduser()
    precision = _mixed_precision(options.accelerate)
    cells = [
        _cell(folder, presets / table.presets, task, method, seed, for_runs, precision)
        for seed in range(options.seeds)
        for task in dict.fromkeys(tasks)
        for method in dict.fromkeys(methods)
    ]
    accelerate = ["--config_file", options.accelerate] if options.accelerate is not None else []
    launcher = (sys.executable, "-m", "accelerate.commands.launch", *accelerate)
    return TableGrid(cells, folder, f"table {table.number}", launcher, table, options.dry_run)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see --help for the options")


def _parser() -> argparse.ArgumentParser:
    about = "Runs a table of the paper and prints it beside the paper's figures. All other options go to every run."
    parser = _Parser(prog="reproduce.py", description=about, allow_abbrev=False)
    parser.add_argument(
        "--table", type=int, choices=sorted(TABLES), required=True, help="of the paper: 3 GLUE, 4 images"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="without it all tasks of the table")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"of {', '.join(METHODS)}; without it the table's"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default 3)")
    parser.add_argument("--model", help="name on the hub, folder, or minilm (in a package); without it the paper's")
    parser.add_argument("--output_dir", help="without it runs/table3 or runs/table4")
    parser.add_argument("--accelerate", metavar="FILE", help="for accelerate launch, such as one of launch/accelerate")
    parser.add_argument("--dry_run", action="store_true", help="say what would run")
    return parser


def _tasks_of(table: PaperTable) -> list[str]:
    return [name for name, task in table.tasks.items() if task.figures]


def _mixed_precision(file: str | None) -> str:
    """What ``accelerate launch`` will take from its file, or without one from the machine's own."""
    if file is None:
        from accelerate.commands.config.config_args import default_config_file  # seconds of imports

        file = default_config_file
    if not Path(file).is_file():
        return "no"
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give one of launch/accelerate with --accelerate") from error
    return str((settings if isinstance(settings, dict) else {}).get("mixed_precision") or "no").lower()


def _cell(
    folder: Path, presets: Path, task: str, method: str, seed: int, for_runs: list[str], mixed_precision: str
) -> Cell:
    chosen = ["--config", str(presets / f"{task}.yaml"), *for_runs, f"--method={method}", f"--seed={seed}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each run says itself which options do nothing in it
        config = parse(chosen)
    if config.task.name != task:
        raise ValueError(f"task.name is set to {config.task.name!r}, but the grid sets it: choose with --tasks")
    # Runs with other options must not meet in one folder.
    output_dir = str(folder / f"{task}-{method}-seed{seed}-{digest(asdict(config), mixed_precision)[:6]}")
    config = replace(config, output_dir=output_dir)
    check_task(config)
    return Cell(task, method, seed, (*chosen, f"--output_dir={output_dir}"), config, mixed_precision)
