"""Which parameters of a PEFT model belong to its base, and which of them another load of the base would lack."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from operator import attrgetter

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from srlora_dist.layers.site import Site

logger = logging.getLogger(__name__)


def adapters_of(module: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """The parts of all adapters in a layer of PEFT, each with the adapter's name."""
    for attribute in module.adapter_layer_names:
        parts = attrgetter(attribute)(module)
        if isinstance(parts, (nn.ModuleDict, nn.ParameterDict)):
            yield from parts.items()


def inside(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """The parameters of a part of an adapter."""
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]


def of_adapters(peft_model: PeftModel) -> Iterator[nn.Parameter]:
    """Every parameter that belongs to some adapter and not to the base."""
    for module in peft_model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for _, part in adapters_of(module):
                yield from inside(part)


def _of_base(peft_model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base, without the copies that PEFT keeps of modules it trains whole."""
    owned = {id(tensor) for tensor in of_adapters(peft_model)}
    kept = {
        f"{name}.original_module."
        for name, module in peft_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        if id(parameter) not in owned and not any(name.startswith(prefix) for prefix in kept):
            yield name, parameter


def was_loaded(parameter: nn.Parameter) -> bool:
    """Whether Transformers has read a parameter from a checkpoint."""
    return getattr(parameter, "_is_hf_initialized", False)


def never_loaded(peft_model: PeftModel) -> dict[str, None]:
    """Parameters that Transformers initialised at random, so that another load has other values there.

    Transformers marks each parameter that it loads. If most of a model has no mark, something has removed the marks,
    and the result is empty.
    """
    base = dict(_of_base(peft_model))
    # A quantised weight is of another class and has no mark.
    fresh = [name for name, p in base.items() if not was_loaded(p) and type(p) is nn.Parameter]
    return dict.fromkeys(fresh if len(fresh) * 2 < len(base) else [])


def new_heads(peft_model: PeftModel, sites: list[Site]) -> dict[str, None]:
    """Parameters of the sites that look like new heads: by their names, or because they lie outside of the body.

    For models on which Transformers has left no marks.
    """
    base = peft_model.get_base_model()
    body = getattr(base, "base_model_prefix", "")
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None

    def is_head(site: Site) -> bool:
        beside = body and hasattr(base, body) and not site.name.startswith(f"{body}.") and site.lora is not output
        return bool(beside) or site.name.split(".")[-1] in SEQ_CLS_HEAD_NAMES

    layers = tuple(f"base_model.model.{site.name}." for site in sites if is_head(site))
    return dict.fromkeys(name for name, _ in _of_base(peft_model) if layers and name.startswith(layers))


def _vocab_size(config: object) -> int | None:
    """Size of the vocabulary; None for a model with none or several."""
    size = getattr(config, "vocab_size", None)
    if size is None and hasattr(config, "get_text_config"):
        try:
            size = getattr(config.get_text_config(), "vocab_size", None)
        except ValueError:  # it has several
            return None
    return size


def resized_embeddings(peft_model: PeftModel) -> tuple[int | None, dict[str, None]]:
    """Size of the vocabulary and the parameters of the embeddings, if the published configuration has another size.

    PEFT asks the hub for it; this function reads only what is on this machine.
    """
    base = peft_model.get_base_model()
    config = getattr(base, "config", None)
    source, size = getattr(config, "name_or_path", ""), _vocab_size(config)
    if not source or size is None or not hasattr(type(config), "from_pretrained"):
        return None, {}
    try:
        published = type(config).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        logger.warning(
            "%s has no configuration on this machine, so whether the embeddings were resized is not known: if they "
            "were, name them in modules_to_save",
            source,
        )
        return None, {}
    if _vocab_size(published) in (None, size):
        return None, {}
    try:
        embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    except NotImplementedError:
        return None, {}
    ids = {id(p) for layer in embeddings if layer is not None for p in layer.parameters()}
    return size, dict.fromkeys(name for name, p in _of_base(peft_model) if id(p) in ids)


def lasting_buffers(peft_model: PeftModel) -> list[str]:
    """Names of the persistent buffers, which a state dict holds."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in peft_model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer is not None and name not in module._non_persistent_buffers_set  # noqa: SLF001 (there is no other way)
    ]
