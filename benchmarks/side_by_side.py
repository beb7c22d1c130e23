"""What the benchmarks share: ours and a peer timed in turn in one process, the ratios, and where they are written.

A benchmark answers one question. It runs ours and the peer on the same work in alternation, so that what disturbs the
machine disturbs both, and reports the ratio of each round: its median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START = datetime.now()
PACKAGES = ("torch", "peft", "deepspeed", "transformers")


@dataclass
class Row:
    """The answer to one question on one case.

    Args:
        question: What is compared.
        ours: What stands for this project.
        peer: What it is compared with.
        case: Sizes, ranks and all else that the figures depend on.
        ratios: One a round.
        bound: ``at most``, ``at least`` or ``exactly``.
        target: What the ratio should be, or None where none was set.
        seconds: Median time of each contender, where time was measured.
        more: Other figures by their names.
        reason: Why the target is missed; told where it is.
    """

    question: str
    ours: str
    peer: str
    case: str
    ratios: list[float]
    bound: str = "at most"
    target: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def median(self) -> float:
        """Of the ratios."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third of the ratios."""
        if len(self.ratios) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third

    @property
    def is_met(self) -> bool | None:
        """Whether the median reaches the target; None where there is none."""
        if self.target is None:
            return None
        reached = {"at most": self.median <= self.target, "at least": self.median >= self.target}
        return reached.get(self.bound, self.median == self.target)


def alternate(contenders: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each contender in each round; they take turns, and who begins changes from round to round."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        turn = names[number % len(names) :] + names[: number % len(names)]
        for name in turn:
            synchronize()
            began = time.perf_counter()
            contenders[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of each contender."""
    return {name: statistics.median(each) for name, each in seconds.items()}


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def hardware() -> str:
    """In words."""
    if torch.accelerator.is_available():
        return torch.cuda.get_device_name()
    model = next((line for line in _cpu_lines() if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} CPU cores ({model.split(':')[-1].strip()})"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def report(name: str, rows: list[Row], options: argparse.Namespace) -> None:
    """Print the rows and append them to ``results/<name>.jsonl``, which ``--tiny`` leaves out."""
    if options.tiny:
        print(*map(describe, rows), sep="\n", flush=True)
        return
    about = {"run": os.environ.get("SRLORA_BENCHMARK_RUN", f"{START:%Y-%m-%dT%H:%M:%S}"), "date": f"{START:%Y-%m-%d}"}
    about |= {"hardware": hardware(), "device": device().type, "quick": options.quick}
    about["commit"] = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    about |= {package: version(package) for package in PACKAGES}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        for row in rows:
            print(describe(row), flush=True)
            file.write(json.dumps(asdict(row) | about) + "\n")


def verdict(row: Row) -> str:
    """Whether the target is met, and whether the rounds spread too far to tell."""
    if row.is_met is None:
        return ""
    low, high = row.quartiles
    unclear = row.bound != "exactly" and low < row.target < high
    return ("met" if row.is_met else "short") + (", within the spread" if unclear else "")


def describe(row: Row) -> str:
    """One line for the terminal."""
    low, high = row.quartiles
    reason = f": {row.reason}" if row.is_met is False else ""
    wanted = f", target {row.bound} {row.target:g}" if row.target is not None else ""
    more = "".join(f", {name} {value:.3g}" for name, value in row.more.items())
    figures = f"{row.median:.3g} x ({low:.3g} to {high:.3g}{wanted})"
    return f"{row.question} [{row.case}]: {figures} {verdict(row)}{reason}{more}"


def arguments(doc: str, **options: dict) -> argparse.Namespace:
    """The command line of a benchmark: ``--quick``, ``--tiny`` and what it adds; tiny is quick, too."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: about a minute on 2 cores")
    parser.add_argument("--tiny", action="store_true", help="try that it runs: the figures say nothing and go nowhere")
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    found = parser.parse_args()
    found.quick |= found.tiny
    return found


def tiny_run(folder: Path) -> dict[str, object]:
    """Options of a run that takes a second: a decoder of one layer, and lines of text, which are written."""
    from srlora_dist.commands.doctor.runs import write_files
    from srlora_dist.tasks.loading import quiet

    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        write_files(folder)
    sizes = {"task.max_length": 16, "task.max_train_samples": 32, "task.max_eval_samples": 4, "srlora.target_rank": 16}
    files = {"task.name": "lm", "task.data_dir": str(folder), "model.name_or_path": str(folder)}
    return files | sizes | {"train.max_steps": 8, "train.batch_size": 4, "train.eval_batch_size": 4}


if str(ROOT) not in sys.path:  # the package may not be installed, and ranks are started as the tests start them
    sys.path.insert(0, str(ROOT))
