"""What this machine can do: the types that DeepSpeed trains in, and whether bitsandbytes' weights work."""

from __future__ import annotations

import torch


def deepspeed_types() -> set[str]:
    """The types in which DeepSpeed trains on this device, by the names of ``model.dtype``.

    Most CPUs lack the instructions for float16, and old GPUs lack bfloat16.
    """
    from deepspeed.accelerator import get_accelerator

    device, found = get_accelerator(), {"float32"}
    found |= {"float16"} if device.is_fp16_supported() else set()
    return found | ({"bfloat16"} if device.is_bf16_supported() else set())


def quantised_error(kind: str) -> tuple[float, float]:
    """Quantise a small linear layer with bitsandbytes, call it, and measure the errors.

    Args:
        kind: ``nf4`` or ``int8``.

    Returns:
        Two relative errors: of the dequantised weight, and of the layer's output against the product with that weight.
    """
    import bitsandbytes as bnb

    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=generator), torch.randn(8, 128, generator=generator).to(device)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
        layer = layer.to(device)
        back = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()
    else:
        layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type=kind, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, module=layer)
        layer = layer.to(device)
        back = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    called, product = layer.train()(x).float(), x @ back.T
    stored = (back.cpu() - weight).norm() / weight.norm()
    return stored.item(), ((called - product).norm() / product.norm()).item()
