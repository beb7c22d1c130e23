"""The types of weights and of the forward pass: one ``model.dtype`` means the same on every engine."""

from __future__ import annotations

import torch
from torch import nn

from srlora_dist.config.run import ModelOptions
from srlora_dist.layers.site import FUSED
from srlora_dist.storage.capabilities import deepspeed_types

MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""What Accelerate calls the forward pass on weights of each type."""
QUANTISED_LAYERS = {"nf4": "Linear4bit", "fp4": "Linear4bit", "int8": "Linear8bitLt"}
"""The class of a quantised layer; bitsandbytes and PEFT's wrapper call it alike."""


def mixed_precision(
    options: ModelOptions, engine: str, launched: str, deepspeed: dict[str, object] | None, has_gpu: bool
) -> str:
    """Choose Accelerate's ``mixed_precision``: what ``model.dtype`` implies, or else what the launch asks for.

    Args:
        options: What the run asks for.
        engine: The engine of the launch.
        launched: The ``mixed_precision`` of the launch; ``no`` if it names none.
        deepspeed: The DeepSpeed settings; None without DeepSpeed.
        has_gpu: Whether there is an accelerator.

    Raises:
        ValueError: These contradict each other, or the engine or the machine cannot do what they ask for.
    """
    implied = MIXED_PRECISION[options.dtype]
    if launched not in MIXED_PRECISION.values():
        raise ValueError(f"the launch asks for mixed_precision {launched}, which is not supported: choose bf16 or no")
    # Autocast over fp32 weights is ordinary mixed precision; DeepSpeed would convert the weights.
    if launched not in ("no", implied) and (deepspeed is not None or implied != "no"):
        raise ValueError(
            f"the launch asks for mixed_precision {launched}, but model.dtype is {options.dtype}: "
            "leave one of them out, or make them agree"
        )
    if options.quantization == "int8" and engine == "fsdp2":
        raise ValueError("model.quantization is int8, which FSDP2 cannot cut: choose nf4, or launch with ddp.yaml")
    chosen = launched if implied == "no" else implied
    if deepspeed is not None:
        _require_same(options, deepspeed)
        require_deepspeed_type(next(name for name, known in MIXED_PRECISION.items() if known == chosen), "model.dtype")
    elif chosen == "fp16" and not has_gpu:
        what = "mixed_precision fp16" if launched == "fp16" else "model.dtype float16"
        raise ValueError(f"{what} needs a GPU on engine {engine}: choose bfloat16, or launch with DeepSpeed")
    return chosen


def require_deepspeed_type(dtype: str, option: str) -> None:
    """Stop where DeepSpeed cannot train in this type on this device: it would say so after the model is loaded.

    Args:
        dtype: As ``model.dtype`` names it.
        option: What asks for it.

    Raises:
        ValueError: It cannot; the message says in which it can.
    """
    if dtype == "float32":  # every device has it, and to ask takes seconds of imports
        return
    found = deepspeed_types()
    if dtype not in found:
        raise ValueError(
            f"{option} is {dtype}, in which DeepSpeed does not train on this {_device()}: choose "
            f"{' or '.join(name for name in ('bfloat16', 'float32') if name in found)}"
        )


def _device() -> str:
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type + " device"
    return f"processor ({torch.backends.cpu.get_cpu_capability()})"


def require_precision(model: nn.Module, options: ModelOptions) -> None:
    """Stop where the pretrained weights are not stored in the way that was asked for.

    Args:
        model: With its adapter, prepared for the engine. What Transformers always keeps in float32 is let pass.
        options: What was asked for.

    Raises:
        ValueError: A type that was asked for is not there, or another one is.
    """
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    found = {str(parameter.dtype).removeprefix("torch.") for parameter in frozen if parameter.is_floating_point()}
    found |= {type(module).__name__ for module in model.modules()} & {*QUANTISED_LAYERS.values()}
    asked = {options.dtype, QUANTISED_LAYERS.get(options.quantization, options.dtype)}
    if found - {"float32"} != asked - {"float32"}:
        raise ValueError(
            f"model.dtype is {options.dtype} and model.quantization {options.quantization}, but the prepared model "
            f"has {', '.join(sorted(found))}: this model or engine cannot do it, choose others"
        )


def cast_trainable_(model: nn.Module, dtype: str) -> None:
    """Hold all that is trained in one type, a new head too, which comes in that of the pretrained weights.

    It is float32 where the optimizer steps these tensors themselves: it would lose most of its small steps in 16 bits.
    What is fused follows the pairs.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or f".{FUSED}." in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def _require_same(options: ModelOptions, deepspeed: dict[str, object]) -> None:
    for name in ("bf16", "fp16"):
        theirs = str(deepspeed.get(name, {}).get("enabled", "auto")).lower()
        ours = str(name == MIXED_PRECISION[options.dtype]).lower()
        if theirs not in ("auto", ours):
            raise ValueError(
                f"the DeepSpeed file has {name}.enabled {theirs}, but model.dtype is {options.dtype}, and DeepSpeed "
                f'converts the whole model: set {name}.enabled to "auto" or make them agree'
            )
