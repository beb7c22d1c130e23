"""Reads what runs left in their folders, ended or not, and says what they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from srlora_dist.config.method import DEFAULT_TARGET_RANK
from srlora_dist.config.option import flatten, unnamed
from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.sources import model_title, task_title
from srlora_dist.training.run_log import read_jsonl

UNNAMED = unnamed(RunConfig, "figure") | {"method", "seed", "task.name", "model.name_or_path"}
"""Options by which runs of one label may differ: they say where things lie, or have their own place in a figure."""


@dataclass
class RunFiles:
    """One run's files.

    Args:
        folder: Its output folder.
        config: ``config.yaml``, options by their full names.
        metrics: The lines of ``metrics.jsonl``.
        switches: Those of ``switches.jsonl``.
        summary: ``summary.json``; empty if the run has not ended.
        label: What it is called in a legend; runs of one label and task are drawn as one, with a band.
        note: A sentence to put below its figures.
    """

    folder: Path
    config: dict[str, object]
    metrics: list[dict]
    switches: list[dict]
    summary: dict[str, object] = field(default_factory=dict)
    label: str = ""
    note: str = ""

    @classmethod
    def read(cls, folder: str | Path, summary: dict[str, object] | None = None) -> RunFiles:
        """Read a run's folder.

        Args:
            folder: Output folder of the run.
            summary: Summary that the run is about to write; None reads the file.

        Raises:
            ValueError: There is no such folder, it is not one of a run, or the run has logged nothing yet.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: give the output folder of a run")
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} is not the folder of a run, for it has no config.yaml: give the --output_dir")
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text())
            if summary is None:
                path = folder / "summary.json"
                summary = json.loads(path.read_text()) if path.is_file() else {}
            metrics, switches = (read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "switches"))
        except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder} has a file that cannot be read ({error}): was it edited?") from error
        if not isinstance(config, dict) or not {"method", "task", "train"} <= config.keys():
            raise ValueError(f"{folder} is not the folder of a run, for its config.yaml is of something else")
        if not metrics:
            raise ValueError(f"{folder} has no metrics yet: wait for the first step, or give another run")
        return cls(folder, flatten(config), metrics, switches, summary, label=str(config["method"]))

    @property
    def method(self) -> str:
        """The method."""
        return str(self.config["method"])

    @property
    def task(self) -> str:
        """The name of the task."""
        return str(self.config["task.name"])

    @property
    def model(self) -> str:
        """What it started from, without the place on this machine."""
        return model_title(self.summary.get("model") or self.config.get("model.name_or_path"))

    @property
    def num_steps(self) -> int:
        """Steps up to now; a switch is written at once, and the loss of its step may be later."""
        written = [lines[-1]["step"] for lines in (self.metrics, self.switches) if lines]
        return int(self.summary.get("steps") or max(written))

    @property
    def switch_steps(self) -> list[int]:
        """After which steps pairs were switched."""
        return sorted({line["step"] for line in self.switches if line["switch"] > 0})

    def points(self, split: str) -> dict[int, float | None]:
        """The loss at each logged step of a split; None where it was not finite."""
        return {line["step"]: line["loss"] for line in self.metrics if line["split"] == split}


def name_runs(runs: list[RunFiles], labels: list[str] | None) -> None:
    """Give each run its label: the one that is asked for, or its method and the options in which it differs.

    Runs that differ in their seed alone have the same one; two of one seed differ in their engine or their folder.

    Raises:
        ValueError: There are not as many labels as runs.
    """
    if labels:
        if len(labels) != len(runs):
            raise ValueError(f"--labels has {len(labels)} names for {len(runs)} runs: give one for each")
        for run, label in zip(runs, labels, strict=True):
            run.label = label
        return
    for run in runs:
        alike = [other for other in runs if (other.method, other.task) == (run.method, run.task)]
        names = sorted({name for other in alike for name in other.config.keys() | run.config.keys()})
        told = [name for name in names if name not in UNNAMED]
        told = [name for name in told if len({str(other.config.get(name)) for other in alike}) > 1]
        parts = [f"{name.split('.')[-1]} {run.config.get(name)}" for name in told]
        parts += [run.model] if len({other.model for other in alike}) > 1 else []
        run.label = ", ".join([run.method, *parts])
    for tell in (lambda run: " x ".join(_engines([run])), lambda run: str(run.folder)):
        _tell_apart(runs, tell)


def _tell_apart(runs: list[RunFiles], tell: Callable[[RunFiles], str]) -> None:
    """Add to the labels by which there are two runs of one seed what tells them apart, where it does."""
    groups: dict[tuple[str, str], list[RunFiles]] = {}
    for run in runs:
        groups.setdefault((run.task, run.label), []).append(run)
    for group in groups.values():
        if len({run.config["seed"] for run in group}) < len(group) and len({tell(run) for run in group}) > 1:
            for run in group:
                run.label = ", ".join(filter(None, [run.label, tell(run)]))


def about(runs: list[RunFiles]) -> str:
    """What was run, in a line or two: model, data, steps, seeds, engine, and the note of the first run."""
    tasks, models = _each(run.task for run in runs), _each(run.model for run in runs)
    ended = all(run.summary for run in runs)
    epochs = _each(f"{run.metrics[-1]['epoch']:.3g}" for run in runs)
    sizes = [f"{_list(run.config[f'train.{name}'] for run in runs)}" for name in ("batch_size", "learning_rate")]
    shares = _each(
        f"first {run.config['task.max_train_samples']:,} training rows of it"
        for run in runs
        if run.config["task.max_train_samples"]
    )
    parts = [
        f"{' / '.join(models)} on {' and '.join(task_title(task) for task in tasks)}",
        *shares,
        f"{_list(run.num_steps for run in runs)} steps of {sizes[0]} samples ({' / '.join(epochs)} epochs)",
        f"rate {sizes[1]}",
        f"rank {_list(run.config['lora.rank'] for run in runs)}",
        *(f"target rank {each}" for each in [_list(_targets(runs))] if each),
        f"seed {_list(sorted({int(run.config['seed']) for run in runs}))}",
        *(f"{each}" for each in [_list(_engines(runs))] if each),
    ]
    return ", ".join(parts) + ("" if ended else ", not ended yet") + ". " + runs[0].note


def _targets(runs: list[RunFiles]) -> list[object]:
    return [run.config["srlora.target_rank"] or DEFAULT_TARGET_RANK for run in runs if run.method == "srlora"]


def _engines(runs: list[RunFiles]) -> list[str]:
    return [f"{run.summary['world_size']} x {run.summary['storage']}" for run in runs if run.summary]


def _each(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(map(str, values)))


def _list(values: Iterable[object]) -> str:
    return " / ".join(_each(values))
