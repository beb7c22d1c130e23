"""The file of results: one line of JSON for each run that has ended, well or not."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import date
from functools import lru_cache
from pathlib import Path

import yaml

from benchmarks.reproduce.grid import UNNAMED, Cell, digest
from srlora_dist.checkpoint.files import write_whole
from srlora_dist.config.option import flatten
from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.sources import model_title
from srlora_dist.training.run_log import read_jsonl

FROM_SUMMARY = ("steps", "best_step", "start", "best", "final", "skipped_steps", "resumed_after", "storage")
FROM_SUMMARY += ("world_size", "trainable_parameters", "train_seconds", "peak_memory_bytes", "versions")


class Results:
    """Appends to ``results.jsonl`` and finds what is there.

    Args:
        path: The file; one that a crash has cut is mended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                write_whole(path, lambda beside: beside.write_bytes(whole))

    def of(self, cell: Cell) -> dict[str, object] | None:
        """The last good result of a run with these options; None if there is none."""
        if not self.path.exists():
            return None
        state, wanted = self.path.stat(), cell.digest
        lines = _read_once(self.path, state.st_size, state.st_mtime_ns)
        good = [line for line in lines if line["config"] == wanted and line["status"] == "done"]
        return good[-1] if good else None

    def add_done(self, cell: Cell, summary: dict[str, object], seconds: float, more: dict[str, object]) -> None:
        """Append the result of a run.

        Args:
            cell: The run.
            summary: Its ``summary.json``.
            seconds: From the start of the command to its end; of the last start, if it was resumed.
            more: What else to note.
        """
        found = {name: summary[name] for name in FROM_SUMMARY}
        findings = sorted({finding["kind"] for finding in summary["findings"]})
        metrics = read_jsonl(cell.folder / "metrics.jsonl")  # a crash of the machine may have lost them
        about = {"model": model_title(summary["model"]), "epochs": metrics[-1]["epoch"] if metrics else None}
        self._append(cell, "done", {**about, **found, "findings": findings, "seconds": round(seconds, 1), **more})

    def add_failed(self, cell: Cell, error: str, status: int) -> None:
        """Append that a run has failed; it is tried again by the next call of the grid."""
        self._append(cell, "failed", {"error": error, "exit_status": status})

    def _append(self, cell: Cell, status: str, more: dict[str, object]) -> None:
        line = {"task": cell.task, "method": cell.method, "seed": cell.seed, "status": status}
        line |= {"config": cell.digest, "date": date.today().isoformat(), "options": changed_options(cell.config)}
        with self.path.open("a") as file:
            file.write(json.dumps(line | more) + "\n")
            file.flush()
            os.fsync(file.fileno())


@lru_cache(maxsize=1)
def _read_once(path: Path, *_state: int) -> list[dict]:
    """The lines of a file as long as it stays the same; a report asks for thousands."""
    return read_jsonl(path)


def changed_options(config: RunConfig) -> dict[str, object]:
    """Options with another value than their default, without those that say where things lie."""
    defaults = flatten(asdict(RunConfig()))
    options = flatten(asdict(config)).items()
    skipped = UNNAMED | {"method", "seed", "task.name", "model.name_or_path"}
    return {name: value for name, value in options if value != defaults[name] and name not in skipped}


def finished_summary(cell: Cell) -> dict[str, object] | None:
    """The summary in the run's folder, if a run with these options has ended there; None if not."""
    try:
        config = yaml.safe_load((cell.folder / "config.yaml").read_text())
        summary = json.loads((cell.folder / "summary.json").read_text())
        return summary if digest(config, cell.mixed_precision) == cell.digest else None
    except (OSError, ValueError, KeyError, AttributeError, yaml.YAMLError):
        return None
