"""Pictures and instructions on several ranks: SGD on ZeRO-2 stopped and resumed, and the mean over tokens."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch.conftest import Bench
from tests.launch.forks import Forks, lines, untimed
from tests.unit.tasks.test_images import write_classes, write_idx, write_vit
from tests.unit.tasks.test_instruct import write_jsonl, write_model

PICTURES = {
    "task__name": "fashion_mnist",
    "task__data_dir": "idx",
    "model__name_or_path": "vit",
    "train__optimizer": "sgd",
    "train__learning_rate": 0.1,
    "train__schedule": "cosine",
    "train__eval_every": 3,
    "checkpoint__every": 2,
    "train__timeout": 25,
}
INSTRUCTIONS = {"task__name": "instruct", "task__data_dir": "jsonl", "model__name_or_path": "chat"}


@pytest.fixture(scope="module")
def folder(bench: Bench) -> Path:
    write_vit(bench.folder / "vit")
    write_idx(bench.folder / "idx", counts=(30, 9))
    write_model(bench.folder / "chat")
    draw, words = random.Random(0), ["one", "two", "three", "and", "that", "more"]
    rows = [
        {"prompt": "it is " * draw.randint(1, 3), "completion": " ".join(draw.choices(words, k=draw.randint(1, 9)))}
        for _ in range(24)
    ]
    write_jsonl(bench.folder / "jsonl", rows)
    return bench.folder


def arguments(bench: Bench, name: str, **options: object) -> list[str]:
    for key in ("task__data_dir", "model__name_or_path"):
        options[key] = bench.folder / options[key]
    return bench.arguments(name, **options)


def run(forks: Forks, yaml: str, arguments: list[str], world_size: int = 2) -> None:
    ended = forks.start(yaml=yaml, arguments=arguments, world_size=world_size)
    assert set(ended["statuses"].values()) == {0}, ended["stderr"]


def test_sgd_on_pictures_is_resumed_on_zero2_as_if_never_stopped(bench: Bench, forks: Forks, folder: Path) -> None:
    run(forks, "zero2_cpu", arguments(bench, "pictures", **PICTURES))
    stopped = arguments(bench, "stopped pictures", **PICTURES)
    order = {"rank": 1, "place": "srlora_dist.training.loop_state:LoopCheckpointer.save", "call": 2}
    ended = forks.start(yaml="zero2_cpu", arguments=stopped, **order)
    assert ended["statuses"]["1"] == -signal.SIGKILL, ended["stderr"]
    again = forks.start(yaml="zero2_cpu", arguments=stopped)
    assert again["statuses"] == {"0": 0, "1": 0}, again["stderr"]
    assert "resuming after step 3" in again["stderr"][0]
    whole, mine = (bench.run_folder(name) for name in ("pictures", "stopped pictures"))
    assert untimed(whole) == untimed(mine)
    expected, got = (load_file(path / "adapter_last" / "adapter_model.safetensors") for path in (whole, mine))
    assert got.keys() == expected.keys()
    assert "base_model.model.classifier.weight" in got
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    state = json.loads((mine / "checkpoints" / "step-6" / "state.json").read_text())
    assert (state["optimizer"]["name"], state["optimizer"]["moments"]) == ("SGD", ["momentum_buffer"])
    rates = [line["learning_rate"] for line in lines(mine / "metrics.jsonl") if line["split"] == "train"]
    assert rates[3] == pytest.approx(0.05)
    assert not any("tokens_per_second" in line for line in lines(mine / "metrics.jsonl"))
    assert json.loads((mine / "summary.json").read_text())["storage"] == "zero2"


def test_another_optimizer_is_no_resume(bench: Bench, forks: Forks, folder: Path) -> None:
    changed = PICTURES | {"train__schedule": "linear", "train__optimizer": "adamw", "checkpoint__resume": "must"}
    ended = forks.start(yaml="cpu2", arguments=arguments(bench, "pictures", **changed))
    assert set(ended["statuses"].values()) == {1}
    assert "is of a run with train.optimizer sgd, and this one has adamw" in ended["stderr"][0]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_step_is_the_same_on_any_ranks_and_micro_batches(
    packing: str, bench: Bench, forks: Forks, folder: Path
) -> None:
    options = INSTRUCTIONS | {"task__packing": packing, "train__batch_size": 4, "train__learning_rate": 0.003}
    layouts = {"plain": ("cpu1", 1, 1), "ddp": ("cpu2", 2, 2)}
    if packing == "false":
        layouts["zero2"] = "zero2_cpu", 2, 1
    for storage, (yaml, world_size, accumulation_steps) in layouts.items():
        name = f"{storage} packing {packing}"
        steps = {"train__accumulation_steps": accumulation_steps}
        run(forks, yaml, arguments(bench, name, **options, **steps), world_size)
        assert json.loads((bench.run_folder(name) / "summary.json").read_text())["storage"] == storage
    expected, *others = (lines(bench.run_folder(f"{s} packing {packing}") / "metrics.jsonl") for s in layouts)
    for got in others:
        for mine, theirs in zip(got, expected, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-5)


def test_packed_instructions_train_in_4_bits_on_two_ranks(bench: Bench, forks: Forks, folder: Path) -> None:
    options = INSTRUCTIONS | {"task__packing": "true", "train__batch_size": 4, "train__learning_rate": 0.01}
    options |= {"model__dtype": "bfloat16", "model__quantization": "nf4"}
    run(forks, "cpu2", arguments(bench, "instructions nf4", **options))
    folder = bench.run_folder("instructions nf4")
    losses = [line["loss"] for line in lines(folder / "metrics.jsonl") if line["split"] == "eval"]
    assert losses[-1] < losses[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["storage"], summary["weights"]) == ("ddp", "nf4 computing in bfloat16")


def test_a_picture_that_is_gone_does_not_cost_the_run(bench: Bench, forks: Forks, folder: Path) -> None:
    """It is cut after the run was stopped, and so left out, or removed; the run goes on with as many steps."""
    data = write_classes(bench.folder / "files", classes=tuple("abcdefgh"))
    options = PICTURES | {"task__name": "images", "task__data_dir": "files", "train__batch_size": 4}
    options |= {"train__max_steps": "null", "train__epochs": 0.75, "train__eval_batch_size": 2}
    mine = arguments(bench, "gone", **options)
    ended = forks.start(
        yaml="cpu2", arguments=mine, rank=1, place="srlora_dist.training.loop_state:LoopCheckpointer.save", call=2
    )
    assert ended["statuses"]["1"] == -signal.SIGKILL, ended["stderr"]
    (data / "train" / "a" / "0.png").unlink()
    (data / "train" / "b" / "1.png").write_bytes((data / "train" / "b" / "1.png").read_bytes()[:-30])
    again = forks.start(yaml="cpu2", arguments=mine)
    assert again["statuses"] == {"0": 0, "1": 0}, again["stderr"]
    assert "1 of 47 pictures cannot be read, and are left out" in again["stderr"][0]
    assert "2 of 32 training samples are gone since the checkpoint" in again["stderr"][0]
    assert "is gone" not in again["stderr"][1]
    summary = json.loads((bench.run_folder("gone") / "summary.json").read_text())
    assert (summary["steps"], len(summary["resumed_after"])) == (6, 1)
