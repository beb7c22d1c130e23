"""What the study runs: which methods with which options, on which tasks, with which seeds."""

from __future__ import annotations

import os
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from typing_extensions import override

from benchmarks.reproduce.grid import Cell, Grid, digest
from benchmarks.reproduce.results import Results
from srlora_dist.config.parse import parse
from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.sources import MINILM
from srlora_dist.training.run_log import read_jsonl

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
RUNS = Path("runs/learning")
RESULTS = HERE / "results.jsonl"

METHODS = {
    "LoRA": {"method": "lora"},
    "PiSSA": {"method": "pissa"},
    "SRLoRA": {"method": "srlora"},
    "SRLoRA, zero_b": {"method": "srlora", "srlora.start": "zero_b"},
    # What four times the parameters would give.
    "LoRA, 4 r": {"method": "lora", "lora.rank": "4 r", "lora.alpha": "4 r"},
}
"""What stands in the main table, by the names there, and the options of each."""
GLUE = ("sst2", "stsb", "mrpc")
RATES = {  # the same for every method
    **dict.fromkeys(("sst2", "stsb", "mrpc"), (1e-4, 3e-4, 1e-3, 3e-3)),
    **dict.fromkeys(("mnist", "fashion_mnist", "mnist_rank2"), (1e-3, 3e-3, 1e-2)),
    "mnist_sgd": (0.02, 0.06, 0.2, 0.6),
    "reviews": (1e-4, 3e-4, 1e-3),
}
TASKS = tuple(RATES)
RATE_SEEDS = (100,)
MAIN_SEEDS = (0, 1, 2)
ABLATION_TASKS, ABLATION_SEEDS = ("mnist", "fashion_mnist"), (0, 1)
RANK_OF = {"mnist_rank2": 2}
"""The rank of LoRA in the file of a task, where it is not 8."""


@dataclass(frozen=True)
class Question:
    """One comparison of options.

    Args:
        title: What is asked.
        variants: By their names the options of ``srlora`` beside those of ``of``, which stand in every comparison.
        of: The name in ``METHODS`` of what the variants differ from.
        seeds: Of the variants.
    """

    title: str
    variants: dict[str, dict[str, object]]
    of: str = "SRLoRA"
    seeds: tuple[int, ...] = ABLATION_SEEDS


QUESTIONS = {
    "moments": Question(
        "What should a restarted pair keep of the optimizer's moments?",
        {
            "keep": {"optimizer_reset": "keep"},
            "first_moment": {"optimizer_reset": "first_moment"},
            "survivors": {"optimizer_reset": "survivors"},
            "pair_steps": {"optimizer_reset": "pair_steps"},
        },
    ),
    "score": Question(
        "Which pairs should be fused?",
        {
            "relative": {"score": "relative"},
            "change": {"score": "change"},
            "most changed": {"score": "change", "choose": "highest"},
            "highest": {"choose": "highest"},
            "oldest": {"choose": "oldest"},
            "quarter, grace 2": {"fusion_ratio": 0.25, "grace": 2},
        },
    ),
    "schedule": Question(
        "When should the switches happen? All have 5 of them.",
        {
            "first half": {"num_switches": 5, "switch_until": 0.5},
            "first three quarters": {"num_switches": 5, "switch_until": 0.75},
            "once settled": {"switch_when": "settled"},
        },
    ),
    "interval": Question(
        "Are the intervals too short?",
        {"1 switch": {"target_rank": 16}, "2 switches": {"num_switches": 2}},
    ),
    "exhaustion": Question(
        "What should a site do that has used its directions? There are 16 for 5 switches.",
        {
            "stop": {"target_rank": 16, "num_switches": 5},
            "wrap": {"target_rank": 16, "num_switches": 5, "exhausted": "wrap"},
            "renew": {"target_rank": 16, "num_switches": 5, "exhausted": "renew"},
        },
    ),
    "gamma": Question(
        "How many pairs should a switch fuse?", {"0.25": {"fusion_ratio": 0.25}, "0.75": {"fusion_ratio": 0.75}}
    ),
    "target": Question(
        "How many directions should a run use?", {str(rank): {"target_rank": rank} for rank in (16, 64, 128)}
    ),
    "zero_b": Question(
        "What goes with pairs that begin with B at zero?",
        {
            "no switches": {"target_rank": 8},
            "1 switch": {"target_rank": 16},
            "pair_steps": {"optimizer_reset": "pair_steps"},
            "oldest": {"choose": "oldest"},
            "quarter, grace 2": {"fusion_ratio": 0.25, "grace": 2},
            "first half": {"num_switches": 5, "switch_until": 0.5},
        },
        of="SRLoRA, zero_b",
        seeds=MAIN_SEEDS,
    ),
}


@dataclass(frozen=True)
class Run:
    """A cell and what it stands for.

    Args:
        task: Its name here, that of a file in ``tasks/``.
        name: Of its method in ``METHODS``, or of a variant.
        cell: How it is run.
    """

    task: str
    name: str
    cell: Cell

    @property
    def rate(self) -> float:
        """Its learning rate."""
        return self.cell.config.train.learning_rate


class Study(Grid):
    """Runs whose curves and switches are kept in their line, so that the report needs nothing else."""

    @property
    @override
    def results(self) -> Path:
        return RESULTS

    @override
    def about(self, cell: Cell) -> dict[str, object]:
        lines = read_jsonl(cell.folder / "metrics.jsonl")
        train = [line for line in lines if line["split"] == "train"]
        skipped = ("split", "epoch")
        return {
            "curve": [[line["step"], round(line["loss"], 5)] for line in train],
            "step_seconds": round(statistics.median(line["step_time"] for line in train), 5),
            "evaluations": [{k: v for k, v in line.items() if k not in skipped} for line in lines if line not in train],
            "switches": summarise_switches(read_jsonl(cell.folder / "switches.jsonl")),
        }


def make_run(task: str, name: str, options: dict[str, object], rate: float, seed: int) -> Run:
    """One run; what stands in ``tasks/<task>.yaml`` holds for all methods."""
    wide = {"4 r": 4 * RANK_OF.get(task, 8)}
    options = {key: wide.get(value, value) for key, value in options.items()}
    arguments = [f"--config={HERE / 'tasks' / f'{task}.yaml'}", *(f"--{key}={value}" for key, value in options.items())]
    arguments += [f"--seed={seed}", f"--train.learning_rate={rate:g}"]
    if task in GLUE:
        arguments += [f"--model.name_or_path={MINILM.folder()}", f"--task.data_dir={os.environ.get('GLUE_DIR', '')}"]
    config, method = _parse(tuple(arguments)), str(options["method"])
    folder = RUNS / f"{task}-{method}-seed{seed}-{digest(asdict(config), 'no')[:8]}"
    config = replace(config, output_dir=str(folder))
    return Run(task, name, Cell(task, method, seed, (*arguments, f"--output_dir={folder}"), config))


@cache
def _parse(arguments: tuple[str, ...]) -> RunConfig:
    with warnings.catch_warnings():  # a task's options for switches are without effect on LoRA
        warnings.simplefilter("ignore")
        return parse(list(arguments))


@cache
def rate_runs(task: str) -> list[Run]:
    """Those that choose each method's learning rate."""
    return [
        make_run(task, name, options, rate, seed)
        for seed in RATE_SEEDS
        for rate in RATES[task]
        for name, options in METHODS.items()
    ]


def chosen_rate(task: str, name: str) -> float | None:
    """Of the lowest mean final validation loss; None while some run has no result."""
    results, losses = Results(RESULTS), {}
    for run in rate_runs(task):
        if run.name == name:
            line = results.of(run.cell)
            if line is None:
                return None
            losses.setdefault(run.rate, []).append(line["final"]["loss"])
    return min(losses, key=lambda rate: statistics.mean(losses[rate]))


def main_runs(task: str) -> list[Run]:
    """The methods side by side, those whose rates are chosen."""
    rates = {name: rate for name in METHODS if (rate := chosen_rate(task, name)) is not None}
    return [make_run(task, name, METHODS[name], rate, seed) for seed in MAIN_SEEDS for name, rate in rates.items()]


def variant_runs(task: str, question: str) -> list[Run]:
    """The variants of a question, at the rate of what they differ from."""
    asked = QUESTIONS[question]
    rate = chosen_rate(task, asked.of)
    if rate is None:
        return []
    variants = {
        name: METHODS[asked.of] | {f"srlora.{key}": value for key, value in options.items()}
        for name, options in asked.variants.items()
    }
    return [make_run(task, name, options, rate, seed) for seed in asked.seeds for name, options in variants.items()]


def summarise_switches(lines: list[dict]) -> dict[str, object]:
    """How long pairs live, over all sites.

    Returns:
        ``recycled``, for each switch after the first the share of fused pairs that the switch before had started;
        ``by_chance``, what that share would be if pairs were drawn at random; ``lifetimes``, how many fused pairs
        had lived 1, 2, ... intervals.
    """
    born: dict[tuple[str, int], int] = {}
    fused: dict[int, list[int]] = {}
    young: dict[int, list[float]] = {}
    for line in lines:
        number, site = line["switch"], line["site"]
        ages = [number - born[site, slot] for slot in line["slots"] if (site, slot) in born]
        if number > 1:
            fused.setdefault(number, []).extend(ages)
            all_ages = [number - at for (name, _), at in born.items() if name == site]
            young.setdefault(number, []).append(all_ages.count(1) / len(all_ages))
        elif number == 1:
            fused.setdefault(1, []).extend(ages)
        born.update({(site, slot): number for slot in line["slots"]})
    lifetimes = [age for ages in fused.values() for age in ages]
    return {
        "recycled": [round(ages.count(1) / len(ages), 4) for number, ages in fused.items() if number > 1],
        "by_chance": [round(statistics.mean(shares), 4) for shares in young.values()],
        "lifetimes": [lifetimes.count(k) for k in range(1, max(lifetimes, default=0) + 1)],
    }


def as_grid(runs: list[Run], folder: Path) -> Study:
    """For :func:`benchmarks.reproduce.running.run_grid`."""
    return Study([run.cell for run in runs], folder, "study", (sys.executable,))
