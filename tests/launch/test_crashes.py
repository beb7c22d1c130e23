"""Whatever kills a rank, the same command goes on and ends where a run that was never killed ends, bit for bit.

``SRLORA_TEST_KILLS=100 pytest tests/launch/test_crashes.py -k random`` kills so often on each engine; the seed of the
moments is ``SRLORA_TEST_SEED``.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from srlora_dist.errors import STOPPED_BY_SIGNAL
from tests.launch.conftest import ROOT, Bench
from tests.launch.forks import ENGINES, OPTIONS, Forks, assert_same_results, lines
from tests.launch.test_bad_inputs import script_with

logger = logging.getLogger(__name__)
NUM_KILLS, SEED = (int(os.environ.get(f"SRLORA_TEST_{name}", value)) for name, value in (("KILLS", 1), ("SEED", 0)))


def assert_ended(ended: dict, killed: int, folder: Path) -> None:
    """The other rank does not hang, and says who is missing, unless all of its work was done."""
    other = 1 - killed
    assert ended["hung"] == []
    assert ended["statuses"][str(killed)] in (-signal.SIGKILL, 0)
    if ended["statuses"][str(other)] == 0:
        assert (folder / "adapter_last" / "adapter_config.json").exists()
    elif ended["statuses"][str(killed)] != 0:
        gone, never_came = f"rank {killed} of 2 is gone", "the 2 processes of the launch did not come together"
        assert gone in ended["stderr"][other] or never_came in ended["stderr"][other], ended["stderr"][other]


@pytest.mark.timeout(120 + 120 * NUM_KILLS)
@pytest.mark.parametrize("yaml", ENGINES)
def test_killed_at_random_moments(yaml: str, bench: Bench, forks: Forks, undisturbed: dict[str, float]) -> None:
    draw, num_kills, num_runs = random.Random(SEED), 0, 0
    while num_kills < NUM_KILLS:
        name = f"random {yaml} {num_runs}"
        arguments = bench.arguments(name, **OPTIONS)
        while not (bench.run_folder(name) / "summary.json").exists():
            rank, seconds = draw.randrange(2), draw.uniform(0, undisturbed[yaml])
            order = {"rank": rank, "seconds": seconds} if num_kills < NUM_KILLS else {}
            ended = forks.start(yaml=yaml, arguments=arguments, **order)
            if order:
                assert_ended(ended, rank, bench.run_folder(name))
                num_kills += ended["statuses"][str(rank)] != 0
            else:
                assert ended["statuses"] == {"0": 0, "1": 0}, ended["stderr"]
        assert_same_results(bench.folder / "runs", name, yaml)
        num_runs += 1
    logger.info("%s: %d kills (seed %d) in %d runs, each with the undisturbed results", yaml, num_kills, SEED, num_runs)


def test_a_rank_that_dies_at_the_very_end_costs_no_training(bench: Bench, forks: Forks, undisturbed: dict) -> None:
    assert undisturbed
    arguments = bench.arguments("at the end", **OPTIONS)
    order = {"rank": 1, "place": "srlora_dist.training.trainer:FineTuner.run"}
    ended = forks.start(yaml="cpu2", arguments=arguments, **order)
    assert_ended(ended, 1, bench.run_folder("at the end"))
    assert not (bench.run_folder("at the end") / "summary.json").exists()
    again = forks.start(yaml="cpu2", arguments=arguments)
    assert again["statuses"] == {"0": 0, "1": 0}, again["stderr"]
    assert "resuming after step 12" in again["stderr"][0]
    assert_same_results(bench.folder / "runs", "at the end", "cpu2")


PLACES = {  # where, after which call, in which rank
    "in a switch, between fusing and re-initialising": (
        "srlora_dist.method.switch:SwitchExecutor._add_to_weight_",
        18,
        1,
    ),
    "in a switch, before the ledger is written": ("srlora_dist.method.switch:SwitchExecutor._compare", 2, 0),
    "while an entry of the ledger is renamed": ("srlora_dist.checkpoint.files:_sync", 3, 0),
    "in the singular value decomposition": ("srlora_dist.method.directions:compute_directions", 4, 0),
    "while a checkpoint is written": ("srlora_dist.checkpoint.files:describe", 9, 0),
    "while a checkpoint is renamed": ("pathlib:Path.rename", 3, 0),
    "while old checkpoints are removed": ("srlora_dist.checkpoint.format:remove_folder", 2, 0),
    "in the backward pass": ("accelerate:Accelerator.backward", 9, 1),
    "while an adapter is exported": ("srlora_dist.checkpoint.export:_write", 2, 0),
    "while the summary is written": ("srlora_dist.training.run:draw", 1, 0),
    "before the first checkpoint, with the run before it moved away": ("srlora_dist.training.run_log:make_room", 1, 0),
}


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_killed_at_places(bench: Bench, forks: Forks, undisturbed: dict[str, float]) -> None:
    """Each kill is in a run of its own; the engines take turns."""
    assert undisturbed
    for number, (what, (place, call, rank)) in enumerate(PLACES.items()):
        yaml = list(ENGINES)[number % 2]
        name = f"place {number}"
        arguments = bench.arguments(name, **OPTIONS, srlora__svd_cache=bench.folder / f"svd {number}")
        ended = forks.start(yaml=yaml, arguments=arguments, rank=rank, place=place, call=call)
        assert ended["statuses"][str(rank)] == -signal.SIGKILL, f"{what}: {place} was not called so often"
        assert_ended(ended, rank, bench.run_folder(name))
        again = forks.start(yaml=yaml, arguments=arguments)
        assert again["statuses"] == {"0": 0, "1": 0}, f"{what}: {again['stderr']}"
        assert_same_results(bench.folder / "runs", name, yaml)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_run_after_a_checkpoint(name: str, bench: Bench, forks: Forks, undisturbed: dict) -> None:
    assert undisturbed
    yaml = "cpu2" if name == "SIGTERM" else "zero2_cpu"
    arguments = bench.arguments(name, **OPTIONS | {"checkpoint__every": 0})
    order = {"place": "accelerate:Accelerator.backward", "call": 9, "signal": getattr(signal, name)}
    ended = forks.start(yaml=yaml, arguments=arguments, rank=1, **order)  # in step 5, and rank 1 alone is told
    assert ended["statuses"] == {"0": STOPPED_BY_SIGNAL, "1": STOPPED_BY_SIGNAL}, ended["stderr"]
    assert "stopped by a signal after step 5 of 12" in ended["stderr"][0]
    assert "Traceback" not in "".join(ended["stderr"])
    checkpoints = bench.run_folder(name) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-5"]
    again = forks.start(yaml=yaml, arguments=arguments)
    assert again["statuses"] == {"0": 0, "1": 0}, again["stderr"]
    assert "resuming after step 5" in again["stderr"][0]
    assert_same_results(bench.folder / "runs", name, yaml)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_launcher_restarts_a_killed_run(bench: Bench, forks: Forks, undisturbed: dict, tmp_path: Path) -> None:
    assert undisturbed
    once = tmp_path / "killed"
    line = (
        "import accelerate, pathlib, signal; backward = accelerate.Accelerator.backward; calls = iter(range(99)); "
        f"once = pathlib.Path({str(once)!r}); "
        "die = lambda: (once.touch(), os.kill(os.getpid(), signal.SIGKILL)); "
        "accelerate.Accelerator.backward = lambda *a, **k: (backward(*a, **k), "
        "next(calls) == 12 and os.environ['RANK'] == '1' and not once.exists() and die())[0]"
    )
    arguments = bench.arguments("restarted", **OPTIONS)
    before = ("--config_file", "launch/accelerate/cpu2.yaml", "--max_restarts", "1")
    began = time.perf_counter()
    ended = bench.launch(*arguments, script=script_with(tmp_path, line), before=before)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert once.exists()
    assert "resuming after step 6" in ended.stderr
    assert time.perf_counter() - began < 200
    assert_same_results(bench.folder / "runs", "restarted", "cpu2")


@pytest.mark.timeout(300)
def test_the_death_of_the_launcher_is_a_request_to_stop(bench: Bench) -> None:
    """With one process accelerate launch dies of SIGTERM and does not pass it on."""
    folder = bench.run_folder("orphan")
    arguments = bench.arguments("orphan", train__max_steps=5000, train__eval_every=5000, checkpoint__every=0)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu1.yaml"]
    launcher = subprocess.Popen([*command, "launch/train.py", *arguments], cwd=ROOT, env=bench.environment())
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(lines(folder / "metrics.jsonl")) > 3)
    launcher.terminate()
    assert launcher.wait(timeout=10) != 0
    wait_for(lambda: any((folder / "checkpoints").glob("step-*")))
    assert not (folder / "summary.json").exists()


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)
