"""Reads bitsandbytes weights. Their payload is never written, only dequantised to compute the directions."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from srlora_dist.layers.digest import digest_span
from srlora_dist.layers.site import Site


def dequantise(site: Site, payload: Tensor) -> Tensor:
    """W of a quantised site, (m, n) in float32.

    Args:
        site: The site. Every rank has all of its scales, however the payload is sharded.
        payload: The whole payload as it is stored.

    Raises:
        ValueError: The payload is no longer as bitsandbytes wrote it.
    """
    from bitsandbytes import functional  # there is such a weight, so the package is installed

    m, n = site.shape
    if site.quantised == "int8":
        return functional.int8_vectorwise_dequant(payload.view(m, n), _scales(site.lora.get_base_layer())).float()
    state = _state(site.lora.get_base_layer())
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes has repacked the 4-bit weight of {site.name} for inference on this CPU: "
            "do not run the model in evaluation mode before the Switcher is made"
        )
    state = copy.copy(state)
    state.dtype = torch.float32  # else it rounds to the type that the weight was loaded in, unlike the forward pass
    return functional.dequantize_4bit(payload.view(torch.uint8).view(-1, 1), state).view(m, n)


def require_cuttable(site: Site) -> None:
    """Check that FSDP2 can shard a quantised weight.

    Raises:
        ValueError: The weight is int8, or its 4-bit payload is stored as integers, which Accelerate does not shard.
    """
    if site.quantised == "int8":
        raise ValueError(f"{site.name} is int8, which bitsandbytes cannot use under FSDP2: choose NF4, or ZeRO-3")
    if site.quantised and not site.weight.is_floating_point():
        raise ValueError(
            f"the 4-bit payload of {site.name} is stored as {site.weight.dtype}, which Accelerate leaves out of FSDP2: "
            "load the model with BitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16, ...), or in whatever "
            "floating-point type the rest of it is"
        )


def digest_scales(site: Site) -> int:
    """Digest of the scales of a quantised W."""
    return digest_layer_scales(site.lora.get_base_layer(), site.quantised)


def digest_layer_scales(layer: nn.Module, kind: str) -> int:
    """Digest of the scales of a layer without an adapter; ``kind`` is how it is quantised."""
    if kind == "int8":
        return digest_span(_scales(layer), 1)
    state = _state(layer)
    return (digest_span(state.absmax, 1) + (digest_span(state.state2.absmax, 2) if state.nested else 0)) % 2**64


def _state(layer: nn.Module) -> object:
    """Shape, scales and kind of a 4-bit weight. FSDP2 leaves them on the layer only."""
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def _scales(layer: nn.Module) -> Tensor:
    # The first forward pass moves them from the weight to the layer's state.
    scales = layer.weight.SCB
    return scales if scales is not None else layer.state.SCB
