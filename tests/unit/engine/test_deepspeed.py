"""DeepSpeed gets the values of the run, and a file that contradicts them is refused."""

from __future__ import annotations

import json

import pytest

from srlora_dist.config.run import RunConfig, TrainOptions
from srlora_dist.engine.deepspeed import compiled_operators, fill_auto
from tests.launch.conftest import ROOT


def filled(optimizer: str = "adamw", **theirs: object) -> dict[str, object]:
    options = TrainOptions(batch_size=24, accumulation_steps=3, max_grad_norm=0.5, optimizer=optimizer)
    return fill_auto({"zero_optimization": {"stage": 2}, **theirs}, RunConfig(train=options), num_processes=2)


def test_deepspeed_gets_the_values_of_the_run() -> None:
    settings = filled(gradient_accumulation_steps="auto", gradient_clipping=0.5)
    assert settings["train_batch_size"] == 24
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5


def test_offload_leaves_another_optimizer_than_adam_alone() -> None:
    assert "zero_force_ds_cpu_optimizer" not in filled()
    assert filled("sgd")["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping 1.0, but train.max_grad_norm is 0.5"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps 1, but train.accumulation_steps is 3"),
    ],
)
def test_deepspeed_that_would_do_something_else_is_refused(theirs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled(**theirs)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("zero3", []),
        ("zero2_offload", ["cpu_adam", "pin_memory"]),
        ("zero3_nvme", ["cpu_adam", "pin_memory", "async_io"]),
    ],
)
def test_a_run_waits_for_the_operators_that_it_uses(name: str, more: list[str]) -> None:
    settings = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    assert compiled_operators(settings) == ["deepspeed_shm_comm", *more]
