"""The files of launch/accelerate and ds_configs say what they should; those for GPUs are not started here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from srlora_dist.config import RunConfig, TrainOptions
from srlora_dist.engine import _fill_deepspeed
from tests.launch.conftest import ROOT

FOLDER = ROOT / "launch" / "accelerate"
KINDS = {
    "cpu1": DistributedType.NO,
    "single": DistributedType.NO,
    "cpu2": DistributedType.MULTI_GPU,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    **{f"zero{stage}{where}": DistributedType.DEEPSPEED for stage in (1, 2, 3) for where in ("", "_cpu")},
}


def test_there_is_no_other_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_yaml_begins_with_its_command_and_is_of_its_kind(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    command = f"# accelerate launch --config_file launch/accelerate/{name}.yaml launch/train.py"
    assert path.read_text().splitlines()[0] == command
    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS[name]
    # With use_cpu Accelerate drops DeepSpeed; with MULTI_GPU it has no effect.
    assert config.use_cpu == (name == "cpu1")
    assert (config.gpu_ids == "-1,-1") == (name.endswith("_cpu") or name == "cpu2")
    if config.num_processes > 1:
        assert config.main_process_port == 0
    if KINDS[name] == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
    if KINDS[name] == DistributedType.DEEPSPEED:
        assert config.mixed_precision is None  # Accelerate refuses it beside a DeepSpeed file
        assert config.deepspeed_config["deepspeed_config_file"] == f"ds_configs/{name.removesuffix('_cpu')}.json"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_file_leaves_to_the_run_what_the_run_decides(stage: int) -> None:
    settings = json.loads(Path(ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert settings[key] == "auto"
    assert settings["bf16"] == settings["fp16"] == {"enabled": "auto"}
    assert not {"optimizer", "scheduler"} & settings.keys()


def filled(**theirs: object) -> dict[str, object]:
    settings = {"zero_optimization": {"stage": 2}, **theirs}
    accelerator = SimpleNamespace(
        num_processes=2, state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
    )
    options = TrainOptions(batch_size=24, accumulation_steps=3, max_grad_norm=0.5)
    _fill_deepspeed(accelerator, RunConfig(train=options))
    return settings


def test_deepspeed_gets_the_values_of_the_run() -> None:
    settings = filled(gradient_accumulation_steps="auto", gradient_clipping=0.5)
    assert settings["train_batch_size"] == 24
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5


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
