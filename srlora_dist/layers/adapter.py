"""Finds the LoRA adapter of a model, and explains what is wrong where there is none to work on."""

from __future__ import annotations

from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

MAKE_ONE = "peft.get_peft_model(model, LoraConfig(...))"


def find_peft_model(model: nn.Module) -> PeftModel:
    """Find the PEFT model in whatever it is wrapped in.

    Raises:
        ValueError: There is no PEFT model.
    """
    modules = list(model.modules())
    peft_model = next((module for module in modules if isinstance(module, PeftModel)), None)
    if peft_model is not None:
        return peft_model
    if any(isinstance(module, BaseTunerLayer) for module in modules):
        raise ValueError(
            "the model has PEFT's layers, but no PeftModel around them, without which nothing can be exported: "
            "model.add_adapter() of transformers, from_pretrained() of an adapter's folder, inject_adapter_in_model() "
            f"and get_peft_model(mixed=True) make none. Load the model without adapters, and wrap it with {MAKE_ONE}"
        )
    raise ValueError(f"the model has no LoRA layers: wrap it with {MAKE_ONE} first")


def require_lora(peft_model: PeftModel, adapter_name: str) -> None:
    """Raise where there is no such adapter, or where it is not LoRA.

    Raises:
        ValueError: There is no such adapter, or it is of another type; the message has what there is.
    """
    adapters = peft_model.peft_config
    if adapter_name not in adapters:
        raise ValueError(f"srlora.adapter_name is {adapter_name!r}, but the model has {sorted(adapters)}: name one")
    kind = adapters[adapter_name].peft_type
    if kind != PeftType.LORA:
        raise ValueError(
            f"the adapter {adapter_name!r} is {PeftType(kind).value}, and SRLoRA works on LoRA alone: make it with "
            f"{MAKE_ONE}"
        )


def is_used(lora_b: Tensor) -> bool:
    """Whether B is not 0, which means that the adapter was trained or has its own start; False on the meta device."""
    return not lora_b.is_meta and bool(lora_b.any())


def used_adapter_error(where: str) -> ValueError:
    """The error for an adapter that turns out not to be new; several places raise it.

    Args:
        where: The layers of the adapter.
    """
    return ValueError(
        f"the adapter at {where} is not freshly initialised (B is not 0), and switch 0 would overwrite it. To go on "
        "from a trained adapter, call base = model.merge_and_unload(), save it and wrap it with "
        f"{MAKE_ONE}; the next export then belongs to that base. A new adapter needs init_lora_weights=True"
    )
