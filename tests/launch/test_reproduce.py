"""launch/reproduce.py on real runs: one fails, one is interrupted, goes on, and is not done again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.reproduce.grid import build_grid
from benchmarks.reproduce.running import START, run_grid
from tests.launch.conftest import ROOT, Bench

pytestmark = pytest.mark.slow
TRAIN = ROOT / "launch" / "train.py"


def options(bench: Bench) -> list[str]:
    """Short runs of a tiny model; a target rank below the rank is no fault for LoRA, and fails SRLoRA."""
    steps = {"train__max_steps": 400, "train__eval_every": 400, "train__log_every": 20, "srlora__target_rank": 2}
    of_grid = ("--output_dir", "--task.name")
    for_runs = [word for word in bench.arguments("grid", **steps) if not word.startswith(of_grid)]
    own = ["--table=3", "--tasks", "rte", "--seeds=1", "--accelerate=launch/accelerate/cpu1.yaml"]
    return [*own, f"--output_dir={bench.run_folder('grid')}", *for_runs]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def starts(folder: Path) -> int:
    return sum(path.read_text().count(START) for path in (folder / "logs").iterdir())


def test_a_grid_goes_on_after_a_failure_and_after_an_interruption(bench: Bench) -> None:
    folder, chosen = bench.run_folder("grid"), options(bench)
    command = [sys.executable, "launch/reproduce.py", *chosen, "--methods", "srlora", "lora"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=bench.environment(), **pipes)
    try:
        limit = time.monotonic() + 200
        while not any(
            line["split"] == "train" for path in folder.glob("rte-lora*/metrics.jsonl") for line in lines(path)
        ):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert "the same command goes on" in errors
    assert "srlora.target_rank 2 is below the LoRA rank" in out
    assert [(line["method"], line["status"]) for line in lines(folder / "results.jsonl")] == [("srlora", "failed")]

    grid = build_grid([*chosen, "--methods", "lora"], ROOT / "launch" / "paper")
    assert run_grid(grid, TRAIN) == ([], False)
    done = lines(folder / "results.jsonl")[-1]
    assert (done["method"], done["status"], done["steps"], done["storage"]) == ("lora", "done", 400, "plain")
    assert 0 < done["resumed_after"][0] < 400
    assert str(bench.folder) not in json.dumps(done)

    assert starts(folder) == 3
    assert run_grid(grid, TRAIN) == ([], False)
    assert starts(folder) == 3
