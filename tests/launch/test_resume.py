"""Runs that are stopped and started again from the command line, on other engines too, or meet bad numbers."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch.conftest import ROOT, Bench, Case, Ended
from tests.launch.forks import OPTIONS, Forks, assert_same_results, lines

STOP = {"place": "srlora_dist.training.loop_state:LoopCheckpointer.save", "signal": signal.SIGTERM}


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines(folder / "metrics.jsonl")])


@pytest.mark.timeout(300)
def test_a_run_goes_on_with_other_engines_and_ranks(bench: Bench, forks: Forks) -> None:
    """1 -> 2 (DDP) -> 3 (ZeRO-3) -> 2 (ZeRO-2) -> 1; FSDP2 cannot be launched without a GPU, see tests/ranks."""
    options = OPTIONS | {"model__dropout": "null", "train__batch_size": 12, "train__max_steps": 10}
    whole = bench.arguments("undisturbed", **options)
    assert forks.start(yaml="cpu1", world_size=1, arguments=whole)["statuses"] == {"0": 0}
    arguments = bench.arguments("chain", **options)
    chain = [("cpu1", 1), ("cpu2", 2), ("zero3_cpu", 3), ("zero2_cpu", 2), ("cpu1", 1)]
    for part, (yaml, world_size) in enumerate(chain):
        # A signal in a checkpoint is heeded at the end of that step.
        stop = {"rank": 0, "call": 1, **STOP} if part < 4 else {}
        ended = forks.start(yaml=yaml, world_size=world_size, arguments=arguments, **stop)
        expected = 75 if part < 4 else 0
        assert set(ended["statuses"].values()) == {expected}, ended["stderr"]
    folder, expected = bench.run_folder("chain"), bench.run_folder("undisturbed")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["resumed_after"] == [2, 4, 6, 8]
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        line["step"] for line in lines(expected / "metrics.jsonl")
    ]
    keys = ("step", "switch", "site", "slots", "directions", "new_directions")
    picked, wanted = (
        [[line[key] for key in keys] for line in lines(run / "switches.jsonl")] for run in (folder, expected)
    )
    assert picked == wanted
    torch.testing.assert_close(losses(folder), losses(expected), rtol=0, atol=1e-5)
    assert abs(summary["final"]["loss"] - json.loads((expected / "summary.json").read_text())["final"]["loss"]) < 1e-4


@pytest.mark.timeout(400)
def test_three_ranks_go_on_bit_for_bit(bench: Bench, forks: Forks) -> None:
    """The order in which DDP sums gradients shows in the last bit, where two ranks have only one order."""
    options = OPTIONS | {"train__batch_size": 12}
    for name, starts in (("never stopped", [{}]), ("stopped once", [{"rank": 0, "call": 2, **STOP}, {}])):
        arguments = bench.arguments(name, **options)
        for start in starts:
            ended = forks.start(yaml="cpu2", world_size=3, arguments=arguments, **start)
            assert set(ended["statuses"].values()) == {75 if start else 0}, ended["stderr"]
    whole, resumed = (
        load_file(bench.run_folder(name) / "adapter_last" / "adapter_model.safetensors")
        for name in ("never stopped", "stopped once")
    )
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


POISON = """
import os
import accelerate
import torch

backward, count = accelerate.Accelerator.backward, iter(range(10**6))
BAD = {bad}


def poisoned(self, loss, **more):
    number = next(count)
    if number in BAD and os.environ["RANK"] == "1":
        loss = loss * float("{value}")
    return backward(self, loss, **more)


accelerate.Accelerator.backward = poisoned
"""


@pytest.fixture(scope="module")
def skipped(bench: Bench, forks: Forks) -> dict[str, dict]:
    """Rank 1 has one bad micro-batch in step 3, and two in step 6, on each engine."""
    results = {}
    for yaml, value in (("cpu2", "nan"), ("zero2_cpu", "nan"), ("zero3_cpu", "inf")):
        options = OPTIONS | {"model__dropout": "null", "train__accumulation_steps": 2}
        code = POISON.format(bad={4, 10, 11}, value=value)
        arguments = bench.arguments(f"skip {yaml}", **options)
        results[yaml] = forks.start(yaml=yaml, arguments=arguments, code=code)
    return results


@pytest.mark.timeout(240)
@pytest.mark.parametrize("yaml", ["cpu2", "zero2_cpu", "zero3_cpu"])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(yaml: str, bench: Bench, skipped: dict[str, dict]) -> None:
    assert skipped[yaml]["statuses"] == {"0": 0, "1": 0}, skipped[yaml]["stderr"]
    folder = bench.run_folder(f"skip {yaml}")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["skipped_steps"] == 2
    text = skipped[yaml]["stderr"][0]
    assert "step 3: the gradient is NaN or infinite" in text
    assert "step 6: the gradient is NaN or infinite" in text
    scores = [score for line in lines(folder / "switches.jsonl") for score in line["scores"]]
    assert scores
    assert torch.tensor(scores).isfinite().all()
    adapter = load_file(folder / "adapter_last" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    evaluations = [line["loss"] for line in lines(folder / "metrics.jsonl") if line["split"] == "eval"]
    reference = bench.run_folder("skip cpu2") / "metrics.jsonl"
    expected = [line["loss"] for line in lines(reference) if line["split"] == "eval"]
    torch.testing.assert_close(torch.tensor(evaluations), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("yaml", ["cpu2", "zero3_cpu"])
def test_too_many_bad_steps_in_a_row_stop_every_rank(yaml: str, bench: Bench, forks: Forks) -> None:
    name = f"diverged {yaml}"
    arguments = bench.arguments(name, **OPTIONS, train__max_bad_steps=3)
    code = POISON.format(bad=set(range(8, 99)), value="nan")  # from step 5 on
    ended = forks.start(yaml=yaml, arguments=arguments, code=code)
    assert ended["statuses"] == {"0": 1, "1": 1}
    assert ended["hung"] == []
    assert "in 3 steps in a row (train.max_bad_steps), up to step 7" in ended["stderr"][0]
    assert "Traceback" not in "".join(ended["stderr"])
    checkpoints = [path.name for path in (bench.run_folder(name) / "checkpoints").iterdir()]
    assert "step-4" in checkpoints


@pytest.fixture(scope="module")
def resumed(bench: Bench, forks: Forks) -> dict[str, Ended]:
    """A run that was stopped after step 4, copied, and started again with all kinds of changes."""
    arguments = bench.arguments("stopped", **OPTIONS)
    ended = forks.start(yaml="cpu1", world_size=1, arguments=arguments, rank=0, call=2, **STOP)
    assert ended["statuses"] == {"0": 75}, ended["stderr"]
    import shutil

    cases = {}
    for name, changes in RESUMES.items():
        shutil.copytree(bench.run_folder("stopped"), bench.run_folder(f"resume {name}"))
        folder = bench.run_folder(f"resume {name}")
        filled = {
            key: value.format(folder=folder) if isinstance(value, str) else value for key, value in changes.items()
        }
        if name == "damaged":
            path = folder / "checkpoints" / "step-4" / "trainable.safetensors"
            path.write_bytes(path.read_bytes()[:-8])
        environment = {key: filled.pop(key) for key in changes if key.isupper()}
        cases[name] = Case(bench.arguments(f"resume {name}", **OPTIONS | filled), environment)
    cases["nothing there"] = Case(bench.arguments("nothing there", **OPTIONS, checkpoint__resume="must"))
    return bench.run_all(cases)


RESUMES = {
    "the same": {},
    "damaged": {},
    "another rate": {"train__learning_rate": 0.02},
    "another type": {"model__dtype": "bfloat16"},
    "in 4 bits": {"model__quantization": "nf4", "model__dtype": "float32"},
    "another length": {"train__max_steps": 13},
    "another method": {"method": "pissa"},
    "fewer samples": {"task__max_train_samples": 20},
    "never": {"checkpoint__resume": "never"},
    "never, but requeued": {"checkpoint__resume": "never", "SLURM_RESTART_COUNT": "1"},
    "an older one": {"checkpoint__resume": "{folder}/checkpoints/step-2"},
    "no checkpoint": {"checkpoint__resume": "{folder}/adapter"},
    "another log": {"train__log_every": 3, "train__accumulation_steps": 1, "checkpoint__every": 3},
}
REFUSED = {
    "another rate": "with train.learning_rate 0.01, and this one has 0.02",
    "another type": "with model.dtype float32, and this one has bfloat16",
    "in 4 bits": "with model.quantization none, and this one has nf4",
    "another length": "with train.max_steps 12, and this one has 13",
    "another method": "with method srlora, and this one has pissa",
    "fewer samples": "with task.max_train_samples None, and this one has 20",
    "no checkpoint": "adapter, but there is no checkpoint in",
    "nothing there": "checkpoint.resume is must, but there is no checkpoint in",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_of_another_run_is_refused(name: str, resumed: dict[str, Ended]) -> None:
    run = resumed[name]
    assert run.returncode != 0
    assert run.seconds < 30
    assert len(run.errors) == 1, run.stderr
    assert REFUSED[name] in run.errors[0]
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", sorted(RESUMES.keys() - REFUSED.keys()))
def test_a_stopped_run_goes_on(name: str, bench: Bench, forks: Forks, resumed: dict[str, Ended]) -> None:
    run, folder = resumed[name], bench.run_folder(f"resume {name}")
    assert run.returncode == 0, run.stderr
    summary = json.loads((folder / "summary.json").read_text())
    after = {"never": [], "an older one": [2], "damaged": [2]}.get(name, [4])
    assert summary["resumed_after"] == after
    if name == "damaged":
        assert "step-4/trainable.safetensors has" in run.stderr
    if not (bench.run_folder("one") / "summary.json").exists():
        assert forks.start(yaml="cpu1", world_size=1, arguments=bench.arguments("one", **OPTIONS))["statuses"] == {
            "0": 0
        }
    expected = load_file(bench.run_folder("one") / "adapter_last" / "adapter_model.safetensors")
    got = load_file(folder / "adapter_last" / "adapter_model.safetensors")
    if name != "another log":  # which has other micro-batches
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        assert lines(folder / "switches.jsonl") == lines(bench.run_folder("one") / "switches.jsonl")


def alone(forks: Forks, arguments: list[str]) -> tuple[int, str]:
    """Status and stderr of a run of one process."""
    ended = forks.start(yaml="cpu1", world_size=1, arguments=[str(part) for part in arguments])
    return ended["statuses"]["0"], ended["stderr"][0]


def test_a_finished_run_is_started_anew(bench: Bench, forks: Forks, resumed: dict[str, Ended]) -> None:
    folder = bench.run_folder("resume the same")
    status, text = alone(forks, bench.arguments("resume the same", **OPTIONS))
    assert status == 0, text
    assert json.loads((folder / "summary.json").read_text())["resumed_after"] == []
    assert "resuming" not in text


def test_a_finished_run_is_kept_by_a_job_that_was_requeued_at_its_end(
    bench: Bench, forks: Forks, resumed: dict[str, Ended]
) -> None:
    arguments, folder = bench.arguments("resume another log", **OPTIONS), bench.run_folder("resume another log")
    before = json.loads((folder / "summary.json").read_text())
    code = "import os; os.environ['SLURM_RESTART_COUNT'] = '1'"
    ended = forks.start(yaml="cpu1", world_size=1, arguments=[str(part) for part in arguments], code=code)
    assert ended["statuses"] == {"0": 0}, ended["stderr"]
    after = json.loads((folder / "summary.json").read_text())
    assert (after["resumed_after"], after["final"]) == ([4, 12], before["final"])


@pytest.mark.parametrize(("choice", "status"), [("stop", 1), ("go_on", 0)])
def test_a_full_disk_stops_the_run_or_is_passed_over(
    choice: str, status: int, bench: Bench, forks: Forks, undisturbed: dict[str, float]
) -> None:
    """The second and the third checkpoint meet a limit of 1 kB a file."""
    assert undisturbed
    code = """
import resource, signal
import srlora_dist.checkpoint.format as module
write, count = module.write_checkpoint, iter(range(9))
def full(*args):
    limit = 1000 if next(count) in (1, 2) else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        return write(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
import srlora_dist.checkpoint.save
srlora_dist.checkpoint.save.write_checkpoint = full
"""
    name = f"full disk {choice}"
    arguments = bench.arguments(name, **OPTIONS, checkpoint__if_disk_full=choice)
    ended = forks.start(yaml="cpu2", arguments=arguments, code=code)
    assert ended["statuses"] == {"0": status, "1": status}, ended["stderr"]
    assert "cannot write the checkpoint of step 4" in ended["stderr"][0]
    assert "Traceback" not in "".join(ended["stderr"])
    checkpoints = {path.name for path in (bench.run_folder(name) / "checkpoints").iterdir()}
    if choice == "stop":
        assert checkpoints == {"step-2"}
        again = forks.start(yaml="cpu2", arguments=arguments)
        assert again["statuses"] == {"0": 0, "1": 0}, again["stderr"]
        assert "resuming after step 2" in again["stderr"][0]
    else:
        assert "going on without a checkpoint of step 4" in ended["stderr"][0]
        assert {"step-10", "step-12"} <= checkpoints
    assert_same_results(bench.folder / "runs", name, "cpu2")


def test_an_adapter_of_a_checkpoint_needs_no_model(bench: Bench, resumed: dict[str, Ended], tmp_path: Path) -> None:
    import subprocess
    import sys

    run = bench.run_folder("resume another log")
    command = [sys.executable, "-m", "srlora_dist", "export", str(run / "checkpoints"), str(tmp_path / "adapter")]
    environment = bench.environment() | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    got, live = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "adapter", run / "adapter_last"))
    assert got.keys() == live.keys()
    assert all(torch.equal(got[key], live[key]) for key in live)


def test_an_earlier_run_is_moved_even_by_a_start_that_fails(bench: Bench, forks: Forks, tmp_path: Path) -> None:
    """Also one with a ledger of its own; and a start that has failed leaves nothing that is worth a folder."""
    arguments = bench.arguments("replaced", **OPTIONS, srlora__ledger_dir=tmp_path / "ledger")
    bad = [*arguments, "--srlora.directions_from", str(tmp_path / "nowhere")]
    status, text = alone(forks, arguments)
    assert status == 0, text
    folder = bench.run_folder("replaced")
    kept = [folder.with_name(f"replaced.{number}") for number in (1, 2, 3)]

    def content(of: Path) -> dict[Path, bytes]:
        return {path.relative_to(of): path.read_bytes() for path in of.rglob("*") if path.is_file()}

    before = content(folder) | {Path("ledger", path.name): path.read_bytes() for path in tmp_path.glob("ledger/*")}
    assert Path("summary.json") in before
    assert Path("ledger", "switch-00000.safetensors") in before
    for _ in range(2):
        status, text = alone(forks, bad)
        assert status == 1
        assert "error: srlora.directions_from" in text
        assert content(kept[0]) == before
    status, text = alone(forks, arguments)
    assert status == 0, text
    assert content(folder).keys() - before.keys() <= {path for path in content(folder) if "tfevents" in path.name}
    assert not kept[1].exists()
    adapter = Path("adapter_last", "adapter_model.safetensors")
    last = (folder / adapter).read_bytes()
    status, text = alone(forks, [*arguments, "--train.learning_rate=5e-3"])
    assert status == 0, text
    assert f"was moved to {kept[1]}" in text
    assert (kept[1] / adapter).read_bytes() == last != (folder / adapter).read_bytes()
    assert (kept[1] / "summary.json").exists()
    assert content(kept[0]) == before
    assert not kept[2].exists()


@pytest.mark.timeout(200)
def test_bad_steps_are_counted_over_restarts_and_switches_keep_their_steps(bench: Bench, forks: Forks) -> None:
    """Steps 3 and 5 are skipped; rank 1 dies in step 9, after the switch that follows the sixth good step."""
    options = OPTIONS | {"train__accumulation_steps": 1, "model__dropout": "null"}
    code = POISON.format(bad={2, 4}, value="nan")
    whole, killed = (bench.arguments(name, **options) for name in ("skips", "skips and dies"))
    assert set(forks.start(yaml="cpu2", arguments=whole, code=code)["statuses"].values()) == {0}
    die = {"rank": 1, "place": "accelerate:Accelerator.backward", "call": 9}
    forks.start(yaml="cpu2", arguments=killed, code=code, **die)
    again = forks.start(yaml="cpu2", arguments=killed)
    assert set(again["statuses"].values()) == {0}, again["stderr"]
    expected, got = bench.run_folder("skips"), bench.run_folder("skips and dies")
    assert lines(got / "switches.jsonl") == lines(expected / "switches.jsonl")
    assert {line["step"] for line in lines(got / "switches.jsonl")} == {0, 8}
    arguments = bench.arguments("worse and worse", **options | {"checkpoint__every": 1}, train__max_bad_steps=3)
    all_bad = POISON.format(bad=range(99), value="nan")
    for _ in range(2):
        ended = forks.start(yaml="cpu2", arguments=arguments, code=all_bad)
        assert ended["statuses"] == {"0": 1, "1": 1}
        assert "in a row (train.max_bad_steps)" in ended["stderr"][0]


@pytest.mark.timeout(120)
def test_adalora_says_that_it_wrote_no_checkpoint(bench: Bench, forks: Forks) -> None:
    arguments = bench.arguments("adalora", **OPTIONS, method="adalora")
    stop = {"rank": 0, "place": "accelerate:Accelerator.backward", "call": 3, "signal": signal.SIGTERM}
    ended = forks.start(yaml="cpu1", world_size=1, arguments=arguments, **stop)
    assert ended["statuses"] == {"0": 1}
    assert "stopped by a signal after step 2, and no checkpoint was written" in ended["stderr"][0]


def test_resuming_into_another_folder_brings_the_adapters(
    bench: Bench, forks: Forks, resumed: dict[str, Ended]
) -> None:
    checkpoint = bench.run_folder("resume the same") / "checkpoints" / "step-12"
    other = bench.arguments("elsewhere", **OPTIONS, checkpoint__resume=checkpoint)
    status, text = alone(forks, other)
    assert status == 0, text
    for name in ("adapter", "adapter_last"):
        got, expected = (
            load_file(bench.run_folder(run) / name / "adapter_model.safetensors")
            for run in ("elsewhere", "resume the same")
        )
        assert all(torch.equal(got[key], expected[key]) for key in expected)
