"""Which precision a run gets from its options, the launch and the DeepSpeed file, and which it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from srlora_dist.config.run import ModelOptions
from srlora_dist.engine.precision import cast_trainable_, mixed_precision, require_precision

AUTO = {name: {"enabled": "auto"} for name in ("bf16", "fp16")}


@pytest.mark.parametrize(
    ("dtype", "launched", "deepspeed", "expected"),
    [
        ("float32", "no", None, "no"),
        ("float32", "bf16", None, "bf16"),  # ordinary mixed precision on float32 weights
        ("bfloat16", "no", None, "bf16"),
        ("bfloat16", "bf16", None, "bf16"),
        ("float16", "no", None, "fp16"),
        ("float32", "no", AUTO, "no"),
        ("bfloat16", "no", AUTO, "bf16"),
        ("float16", "no", {}, "fp16"),
        ("bfloat16", "no", {"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
    ],
)
def test_precision_follows_the_type_of_the_weights(dtype, launched, deepspeed, expected, monkeypatch):
    monkeypatch.setattr("srlora_dist.engine.precision.deepspeed_types", lambda: {"float32", "bfloat16", "float16"})
    assert mixed_precision(ModelOptions(dtype=dtype), "any", launched, deepspeed, has_gpu=True) == expected


@pytest.mark.parametrize(
    ("dtype", "launched", "deepspeed", "message"),
    [
        ("bfloat16", "fp16", None, "mixed_precision fp16, but model.dtype is bfloat16"),
        ("float32", "bf16", AUTO, "mixed_precision bf16, but model.dtype is float32"),
        ("float32", "fp8", None, "mixed_precision fp8, which is not supported"),
        ("float32", "no", {"bf16": {"enabled": True}}, "bf16.enabled true, but model.dtype is float32"),
        ("bfloat16", "no", {"bf16": {"enabled": False}}, "bf16.enabled false, but model.dtype is bfloat16"),
        ("bfloat16", "no", {"fp16": {"enabled": True}}, "fp16.enabled true, but model.dtype is bfloat16"),
        ("float16", "no", None, "model.dtype float16 needs a GPU on engine ddp"),
        ("float32", "fp16", None, "mixed_precision fp16 needs a GPU on engine ddp"),
    ],
)
def test_contradictions_are_refused(dtype, launched, deepspeed, message):
    with pytest.raises(ValueError, match=message):
        mixed_precision(ModelOptions(dtype=dtype), "ddp", launched, deepspeed, has_gpu=False)


@pytest.mark.parametrize(
    ("dtype", "device", "remedy"),
    [
        ("float16", {"float32", "bfloat16"}, "choose bfloat16 or float32"),
        ("bfloat16", {"float32", "float16"}, "choose float32"),
    ],
)
def test_what_deepspeed_cannot_do_on_this_device_is_said_first(dtype, device, remedy, monkeypatch):
    monkeypatch.setattr("srlora_dist.engine.precision.deepspeed_types", lambda: device)
    with pytest.raises(ValueError, match=f"model.dtype is {dtype}, in which DeepSpeed does not train on .*{remedy}"):
        mixed_precision(ModelOptions(dtype=dtype), "zero2", "no", AUTO, has_gpu=False)
    assert mixed_precision(ModelOptions(), "zero2", "no", AUTO, has_gpu=False) == "no"


def test_fsdp_cuts_no_8_bit_weights():
    with pytest.raises(ValueError, match="int8, which FSDP2 cannot cut"):
        mixed_precision(ModelOptions(quantization="int8"), "fsdp2", "no", None, has_gpu=True)


def frozen(dtype: torch.dtype) -> nn.Module:
    """Two frozen layers, one of which a model may keep in float32, and a trained one."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=dtype), nn.LayerNorm(4), nn.Linear(4, 4, dtype=dtype))
    return model.requires_grad_(False).append(nn.Linear(4, 2, dtype=dtype))


def test_only_what_is_trained_becomes_float32():
    model = frozen(torch.bfloat16)
    cast_trainable_(model, "float32")
    assert {parameter.dtype for parameter in model[3].parameters()} == {torch.float32}
    assert model[0].weight.dtype == torch.bfloat16
    require_precision(model, ModelOptions(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("stored", "options", "found"),
    [
        (torch.float32, {"dtype": "bfloat16"}, "has float32"),
        (torch.bfloat16, {}, "has bfloat16, float32"),
        (torch.float16, {"dtype": "bfloat16"}, "has float16, float32"),
        (torch.float32, {"quantization": "nf4"}, "has float32"),
    ],
)
def test_weights_in_another_type_stop_the_run(stored, options, found):
    with pytest.raises(ValueError, match=found):
        require_precision(frozen(stored), ModelOptions(**options))
