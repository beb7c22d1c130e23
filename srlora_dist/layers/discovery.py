"""Finds the adapted layers of a PEFT model and refuses, with a remedy, those that SRLoRA cannot work on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from srlora_dist.errors import shorten_list
from srlora_dist.layers.adapter import find_peft_model, is_used, require_lora, used_adapter_error
from srlora_dist.layers.bypassed import LEAVE_OUT, Fault, find_bypassed, is_all_linear
from srlora_dist.layers.site import FUSED, Site, quantisation

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def find_sites(model: nn.Module, adapter_name: str = "default", only: Collection[str] | None = None) -> list[Site]:
    """Find the sites of one adapter, in the order of the model's modules.

    Layers that cannot be worked on are left out with a warning where the user has not named them, as with
    ``target_modules="all-linear"``; they stay what PEFT made them.

    Args:
        model: A PEFT model.
        adapter_name: The adapter.
        only: Names of the sites that were found before the model was prepared; None finds all that there are.

    Raises:
        ValueError: There is no such adapter or no adapted layer, or a layer is not a linear LoRA layer of
            a supported type.
    """
    peft_model = find_peft_model(model)
    if adapter_name == FUSED:
        raise ValueError(f"srlora.adapter_name is {FUSED!r}, the name of the second adapter: choose another")
    require_lora(peft_model, adapter_name)
    base = peft_model.get_base_model()
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
    }
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} has no LoRA layers: check target_modules of the LoraConfig")
    layers = _fit_layers(peft_model, layers, adapter_name) if only is None else _named(layers, only)
    _refuse(layers, adapter_name)
    _refuse_quantised_heads(base, adapter_name)
    sites = [_site(name, layer, adapter_name) for name, layer in layers.items()]
    _require_supported_types(sites)
    return sites


def _fit_layers(peft_model: PeftModel, layers: dict[str, LoraLayer], adapter_name: str) -> dict[str, LoraLayer]:
    """Drop the layers that cannot be worked on, whatever the options.

    Raises:
        ValueError: The user has named such a layer, or there is no other.
    """
    base, config = peft_model.get_base_model(), peft_model.peft_config[adapter_name]
    linear = {name: layer for name, layer in layers.items() if _is_linear(layer)}
    faults = {name: _fault_of_kind(layer) for name, layer in layers.items() if name not in linear}
    faults |= find_bypassed(base, linear) | _shared_weights(peft_model, linear)
    # PEFT adapts the experts of a mixture wherever their names fit, so nobody has named those.
    unnamed = {name for name, layer in layers.items() if isinstance(layer, ParamWrapper)}
    named = {} if is_all_linear(base, config, adapter_name) else {n: f for n, f in faults.items() if n not in unnamed}
    fit = {name: layer for name, layer in layers.items() if name not in faults}
    for what, remedy in (named if fit else faults).values():
        names = [name for name, fault in faults.items() if fault[0] == what]
        raise ValueError(f"SRLoRA cannot work on a layer that {what}: {shorten_list(names)}; {remedy}")
    if faults:
        kinds = dict.fromkeys(what for what, _ in faults.values())
        named = [
            f"{shorten_list([n for n, f in faults.items() if f[0] == what])} (a layer that {what})" for what in kinds
        ]
        warnings.warn(
            f"SRLoRA leaves out {'; '.join(named)}: such a layer keeps the LoRA pairs that PEFT gave it", stacklevel=4
        )
    return fit


def _fault_of_kind(layer: LoraLayer) -> Fault:
    if isinstance(layer, ParamWrapper):
        return "PEFT adapts as a bare tensor, as the experts and the router of a mixture", LEAVE_OUT
    return "is not a linear layer", LEAVE_OUT


def _named(layers: dict[str, LoraLayer], names: Collection[str]) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in layers.items() if name in names}


def _shared_weights(model: nn.Module, layers: dict[str, LoraLayer]) -> dict[str, Fault]:
    """Find layers whose W is also the weight of another layer, which an edit would change too."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        name: ("shares its weight with others", LEAVE_OUT)
        for name, layer in layers.items()
        if uses[id(layer.get_base_layer().weight)] > 1
    }


def _refuse(layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Raise one error for each kind of layer that cannot be worked on, listing the sites."""
    checks = (
        (
            "uses DoRA or another LoRA variant",
            "set use_dora=False, or leave out the option of that variant in the LoraConfig",
            lambda x: adapter_name in x.lora_variant,
        ),
        (
            "has LoRA dropout, which breaks the preservation of the function",
            "set lora_dropout=0",
            lambda x: not isinstance(x.lora_dropout[adapter_name], nn.Identity) and x.lora_dropout[adapter_name].p > 0,
        ),
        ("has a bias in its LoRA pair", "set lora_bias=False", lambda x: x.lora_bias.get(adapter_name, False)),
        ("has a trainable pretrained weight", "freeze it", lambda x: x.get_base_layer().weight.requires_grad),
        (
            "has a frozen A or B",
            f"make it trainable, or {LEAVE_OUT}",
            lambda x: _is_frozen(x, adapter_name),
        ),
        ("has a scale of 0 or less", "set lora_alpha above 0", lambda x: x.scaling[adapter_name] <= 0),
        ("is merged", "call unmerge_adapter() first", lambda x: x.merged),
    )
    used = [
        name
        for name, layer in layers.items()
        if _is_frozen(layer, adapter_name) and is_used(layer.lora_B[adapter_name].weight)
    ]
    if used:  # loaded for inference
        raise used_adapter_error(shorten_list(used))
    for what, remedy, holds in checks:
        names = [name for name, layer in layers.items() if holds(layer)]
        if names:
            raise ValueError(f"SRLoRA cannot work on a layer that {what}: {shorten_list(names)}; {remedy}")


def _is_frozen(layer: LoraLayer, adapter_name: str) -> bool:
    return not all(factors[adapter_name].weight.requires_grad for factors in (layer.lora_A, layer.lora_B))


def _refuse_quantised_heads(base: nn.Module, adapter_name: str) -> None:
    """Raise where PEFT has copied a quantised layer to train it: bitsandbytes fails at its first call."""
    names = [
        name.split(".modules_to_save.")[0]
        for name, module in base.named_modules()
        if f".modules_to_save.{adapter_name}" in f".{name}" and type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    ]
    if names:
        raise ValueError(
            f"SRLoRA cannot train a quantised layer: {shorten_list(names)}; load the model with "
            f"BitsAndBytesConfig(llm_int8_skip_modules={names})"
        )


def keep_payloads_(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, where the first evaluation would end the training.

    With AVX512-BF16 it repacks the payload of a layer in place at its first call in evaluation mode; the next training
    step raises, and what is read from the payload is garbage.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _require_supported_types(sites: list[Site]) -> None:
    for site in sites:
        storage = getattr(site.lora.get_base_layer(), "quant_storage", None)
        if storage not in (None, site.weight.dtype):
            raise ValueError(
                f"the 4-bit payload of {site.name} was stored as {storage} and is {site.weight.dtype} now: the engine "
                "has cast it, which destroys it. Set bnb_4bit_quant_storage to uint8"
            )
        for parameter in (site.lora_a, site.lora_b, *(() if site.quantised else (site.weight,))):
            if parameter.dtype not in FLOATS:
                raise ValueError(
                    f"{site.name} is stored as {parameter.dtype}, and SRLoRA supports float32, bfloat16, float16 and "
                    "bitsandbytes' NF4, FP4 and int8: load the model in one of them"
                )


def _is_linear(layer: LoraLayer) -> bool:
    return isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)) and not isinstance(layer, ParamWrapper)


def _site(name: str, layer: LoraLayer, adapter_name: str) -> Site:
    linear = layer.get_base_layer()
    transposed = isinstance(linear, Conv1D)
    return Site(
        name=name,
        lora=layer,
        weight=linear.weight,
        lora_a=layer.lora_A[adapter_name].weight,
        lora_b=layer.lora_B[adapter_name].weight,
        shape=(linear.nf, linear.nx) if transposed else (linear.out_features, linear.in_features),
        rank=layer.r[adapter_name],
        scale=float(layer.scaling[adapter_name]),
        transposed=transposed,
        quantised=quantisation(linear),
        fused_a=layer.lora_A[FUSED].weight if FUSED in layer.lora_A else None,
        fused_b=layer.lora_B[FUSED].weight if FUSED in layer.lora_B else None,
        fused_rank=layer.r.get(FUSED, 0),
    )
