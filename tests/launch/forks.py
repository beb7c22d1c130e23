"""Starts runs on forked ranks (see forked.py), and compares what they leave with an undisturbed one."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ENGINES = {"cpu2": "ddp", "zero2_cpu": "zero2"}
OPTIONS = {
    "train__timeout": 25,
    "train__max_steps": 12,
    "train__eval_every": 4,
    "checkpoint__every": 2,
    "model__dropout": 0.1,
}


class Forks:
    """The process of forked.py; one that did not answer in time is replaced, lest a later order gets its answer."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen | None = None

    def start(self, limit: float = 100, **order: object) -> dict:
        """Run ``forked.Order``."""
        return self._ask({"world_size": 2, "limit": limit, **order}, limit)

    def run_cases(self, cases: dict[str, dict], limit: float = 280) -> dict[str, dict]:
        """Run each ``conftest.Case`` in a process of its own, one after the other."""
        return self._ask({"cases": cases}, limit)

    def _ask(self, order: dict, limit: float) -> dict:
        if self.process is None:
            command = [sys.executable, str(Path(__file__).with_name("forked.py"))]
            options = {"cwd": ROOT, "env": self.environment, "text": True, "start_new_session": True}
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            # The first one waits for the imports.
            ready, _, _ = select.select([self.process.stdout], [], [], limit + 60)
            assert ready, "forked.py does not answer"
            return json.loads(self.process.stdout.readline())
        except BaseException:  # the time-out of a test too
            self.kill()
            raise

    def kill(self) -> None:
        """End it and the ranks that it has forked."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    timed = ("step_time", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines(folder / "metrics.jsonl")]


def assert_same_results(runs: Path, name: str, yaml: str) -> None:
    mine, whole = runs / name, runs / f"whole {yaml}"
    for adapter in ("adapter", "adapter_last"):
        expected = load_file(whole / adapter / "adapter_model.safetensors")
        got = load_file(mine / adapter / "adapter_model.safetensors")
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert lines(mine / "switches.jsonl") == lines(whole / "switches.jsonl")
    timed = ("step_time", "tokens_per_second")
    assert [
        {key: value for key, value in line.items() if key not in timed} for line in lines(mine / "metrics.jsonl")
    ] == [{key: value for key, value in line.items() if key not in timed} for line in lines(whole / "metrics.jsonl")]
    ledgers = [sorted((folder / "ledger").iterdir()) for folder in (mine, whole)]
    for path, other in zip(*ledgers, strict=True):
        entry, expected = load_file(path), load_file(other)
        assert path.name == other.name
        assert entry.keys() == expected.keys()
        assert all(torch.equal(entry[key], expected[key]) for key in expected)
    summary = json.loads((mine / "summary.json").read_text())
    assert summary["storage"] == ENGINES[yaml]  # the engine asked for is the one that ran
    assert not list(mine.rglob(".*"))  # nothing half written stays behind
