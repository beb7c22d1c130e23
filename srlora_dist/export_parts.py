"""Which tensors an export holds beside the live pairs: all that another load of the base would lack.

That is what is trained, wherever it is; buffers that training moves; parameters that no checkpoint held when
Transformers loaded the model; and embeddings that were resized. PEFT saves a part of this by itself. The rest is saved
under the names of the base's own parameters, which ``PeftModel.from_pretrained`` puts in place as well.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from operator import attrgetter

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from srlora_dist.base_label import BaseLabel
from srlora_dist.digest import digest_run
from srlora_dist.sites import FUSED, Site, find_peft_model, some

logger = logging.getLogger(__name__)


class ExportParts:
    """The rule of what is exported and kept in checkpoints, made before a model is prepared and completed by ``bind``.

    Args:
        model: The PEFT model, not yet prepared.
        sites: Its sites.
        adapter_name: The adapter that is trained.

    Attributes:
        own_weights: Sites whose W another load of the base would not have, such as a new head: W itself is exported.
        names: The parameter or buffer of the PEFT model for each name in the export, known after ``bind``.
        other_layers: Rank and scale of each LoRA layer of the adapter that is no site, likewise.
        base: The base that the adapter belongs to, likewise.

    Raises:
        ValueError: Another adapter computes along, which the export would lack.
    """

    def __init__(self, model: nn.Module, sites: list[Site], adapter_name: str) -> None:
        self.adapter_name = adapter_name
        peft_model = find_peft_model(model)
        refuse_other_adapters(peft_model, sites, adapter_name)
        weights = {f"base_model.model.{site.name}.base_layer.weight": site for site in sites}
        lacking = {**_resized_embeddings(peft_model), **_never_loaded(peft_model)}
        if not any(_was_loaded(parameter) for parameter in peft_model.parameters()):
            lacking |= _heads(peft_model, sites)
        self._lacking = [name for name in lacking if name not in weights]
        self.own_weights = [weights[name].name for name in lacking if name in weights and not weights[name].quantised]
        self._vocab_size = _vocab_size(_config(peft_model)) if _resized_embeddings(peft_model) else None
        _warn_of_what_is_outside(model, peft_model)
        self.names: dict[str, str] = {}
        self.other_layers: dict[str, tuple[int, float]] = {}
        self.base: BaseLabel | None = None
        self._digests: dict[str, int] = {}
        self._named_lost = False

    def bind(self, model: nn.Module, sites: list[Site], digests: list[int]) -> None:
        """Decide what the export will hold, from what is trained now, and say what PEFT would have left out.

        Args:
            model: The prepared model; its buffers are as in the untouched base.
            sites: Its sites.
            digests: Of each site's untouched W.

        Raises:
            ValueError: Another adapter computes along.
        """
        peft_model = find_peft_model(model)
        refuse_other_adapters(peft_model, sites, self.adapter_name)
        self._digests = {name: digest_run(buffer) for name, buffer in peft_model.named_buffers()}
        self.base = BaseLabel.of(sites, digests, leave_out=self.own_weights, vocab_size=self._vocab_size)
        self.other_layers = dict(_other_layers(peft_model, sites, self.adapter_name))
        self.names = self._named_by_peft(peft_model)
        owned = {id(tensor) for tensor in _of_adapters(peft_model)}
        parameters = dict(peft_model.named_parameters(remove_duplicate=False))
        placed = {id(parameters[name]) for name in self.names.values() if name in parameters}
        added = []
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
        for name in [*trained, *(name for name in self._lacking if name in parameters)]:
            if id(parameters[name]) not in owned | placed:
                placed.add(id(parameters[name]))
                added.append(name)
        self.names |= {name: name for name in added}
        self._say(added, _moving(peft_model, self.names))

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the export holds, by their names in the PEFT model."""
        found = dict(find_peft_model(model).named_parameters(remove_duplicate=False))
        return {name: found[name] for name in self.names.values() if name in found}

    def buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """The buffers that the export holds: of modules that are trained whole, and others that have moved."""
        peft_model = find_peft_model(model)
        found, lasting = dict(peft_model.named_buffers()), _lasting_buffers(peft_model)
        moved = [name for name, buffer in found.items() if self._digests.get(name) != digest_run(buffer)]
        lost = [name for name in moved if name not in lasting]
        if lost and not self._named_lost:
            self._named_lost = True
            logger.warning("%s moved in training, and no file can hold it: it is not persistent", some(lost))
        names = dict.fromkeys([*self.names.values(), *(name for name in moved if name in lasting)])
        return {name: found[name] for name in names if name in found}

    def require_alone(self, model: nn.Module, sites: list[Site]) -> None:
        """Notice where another adapter was made active since ``bind``.

        Raises:
            ValueError: It would be missing from what is written.
        """
        refuse_other_adapters(find_peft_model(model), sites, self.adapter_name)

    def _named_by_peft(self, peft_model: PeftModel) -> dict[str, str]:
        """What PEFT itself saves of the adapter, without its look at the hub for the size of the vocabulary."""
        tensors = [name for name, _ in peft_model.named_parameters(remove_duplicate=False)]
        names = {name: name for name in [*tensors, *_lasting_buffers(peft_model)] if f".{FUSED}." not in name}
        return get_peft_model_state_dict(
            peft_model, state_dict=names, adapter_name=self.adapter_name, save_embedding_layers=False
        )

    def _say(self, added: list[str], moving: list[str]) -> None:
        names = [name.removeprefix("base_model.model.") for name in [*added, *moving]]
        names += [f"{name}.weight" for name in self.own_weights]
        if names:
            warnings.warn(
                f"beside the adapter the export will hold {some(names)}: trained, or moved by training as the "
                "statistics of a batch norm are (PEFT drops those), or not in the checkpoint of the base. "
                "PeftModel.from_pretrained puts them into the base; a server that reads LoRA pairs alone lacks them",
                stacklevel=4,
            )


def refuse_other_adapters(peft_model: PeftModel, sites: list[Site], adapter_name: str) -> None:
    """Raise where another adapter computes along, or where the one that is trained does not.

    Raises:
        ValueError: With the layers and the remedy.
    """
    others: dict[str, list[str]] = {}
    for name, module in peft_model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            active = {module.active_adapter} if isinstance(module.active_adapter, str) else set(module.active_adapters)
            for other in (active & set(dict(_adapters_of(module)))) - {adapter_name, FUSED}:
                others.setdefault(other, []).append(name.removeprefix("base_model.model."))
    for other, names in others.items():
        raise ValueError(
            f"the adapter {other!r} is active beside {adapter_name!r} in {some(names)}, and an export of "
            f"{adapter_name!r} would lack it: call model.set_adapter({adapter_name!r}), or merge the other one into "
            "the base (merge_and_unload) before this one is added"
        )
    asleep = [site.name for site in sites if adapter_name not in site.lora.active_adapters]
    if asleep:
        raise ValueError(
            f"the adapter {adapter_name!r} is not active in {some(asleep)}, so that it would not be trained: call "
            f"model.set_adapter({adapter_name!r})"
        )


def _adapters_of(module: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Each adapter's name with each of its parts in a layer of PEFT."""
    for attribute in module.adapter_layer_names:
        parts = attrgetter(attribute)(module)
        if isinstance(parts, (nn.ModuleDict, nn.ParameterDict)):
            yield from parts.items()


def _of_adapters(peft_model: PeftModel) -> Iterator[Tensor]:
    """Every parameter that belongs to some adapter and not to the base."""
    for module in peft_model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for _, part in _adapters_of(module):
                yield from part.parameters() if isinstance(part, nn.Module) else [part]


def _of_base(peft_model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base, but for the copies that PEFT keeps of modules it trains whole."""
    owned = {id(tensor) for tensor in _of_adapters(peft_model)}
    kept = {
        f"{name}.original_module."
        for name, module in peft_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        if id(parameter) not in owned and not any(name.startswith(prefix) for prefix in kept):
            yield name, parameter


def _was_loaded(parameter: nn.Parameter) -> bool:
    """Whether Transformers has read a parameter from a checkpoint."""
    return getattr(parameter, "_is_hf_initialized", False)


def _never_loaded(peft_model: PeftModel) -> dict[str, None]:
    """What started at random in a model that Transformers has loaded, so that another load has other numbers there.

    Nothing where most of a model is without the mark, for then something else has taken the marks off.
    """
    base = dict(_of_base(peft_model))
    fresh = [name for name, p in base.items() if not _was_loaded(p) and p.is_floating_point()]
    return dict.fromkeys(fresh if len(fresh) * 2 < len(base) else [])


def _heads(peft_model: PeftModel, sites: list[Site]) -> dict[str, None]:
    """Sites that look like new heads, where Transformers has left no marks: by their names, or beside the body."""
    base = peft_model.get_base_model()
    body = getattr(base, "base_model_prefix", "")
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None

    def is_head(site: Site) -> bool:
        beside = body and hasattr(base, body) and not site.name.startswith(f"{body}.") and site.lora is not output
        return bool(beside) or site.name.split(".")[-1] in SEQ_CLS_HEAD_NAMES

    layers = tuple(f"base_model.model.{site.name}." for site in sites if is_head(site))
    return dict.fromkeys(name for name, _ in _of_base(peft_model) if layers and name.startswith(layers))


def _config(peft_model: PeftModel) -> object:
    return getattr(peft_model.get_base_model(), "config", None)


def _vocab_size(config: object) -> int | None:
    size = getattr(config, "vocab_size", None)
    if size is None and hasattr(config, "get_text_config"):
        size = getattr(config.get_text_config(), "vocab_size", None)
    return size


def _resized_embeddings(peft_model: PeftModel) -> dict[str, None]:
    """Parameters of the embeddings, if the vocabulary is another than in the configuration that was loaded.

    PEFT asks the same, of the hub; this looks into what is on this machine alone.
    """
    base, config = peft_model.get_base_model(), _config(peft_model)
    source = getattr(config, "name_or_path", "")
    if not source or not hasattr(type(config), "from_pretrained"):
        return {}
    try:
        published = type(config).from_pretrained(source, local_files_only=True)
        if _vocab_size(published) in (None, _vocab_size(config)):
            return {}
        embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (OSError, ValueError, NotImplementedError):
        return {}
    inside = {id(p) for layer in embeddings if layer is not None for p in layer.parameters()}
    return dict.fromkeys(name for name, p in _of_base(peft_model) if id(p) in inside)


def _lasting_buffers(peft_model: PeftModel) -> list[str]:
    """Names of the buffers that a state dict holds."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in peft_model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer is not None and name not in module._non_persistent_buffers_set  # noqa: SLF001 (there is no other way)
    ]


def _moving(peft_model: PeftModel, names: dict[str, str]) -> list[str]:
    """Modules with statistics that the forward pass in training mode moves, but for those that PEFT saves whole."""
    saved = set(names.values())
    return [
        name
        for name, module in peft_model.named_modules()
        if getattr(module, "track_running_stats", False)
        and getattr(module, "running_mean", None) is not None
        and f"{name}.running_mean" not in saved
        and ".original_module" not in name
    ]


def _other_layers(
    peft_model: PeftModel, sites: list[Site], adapter_name: str
) -> Iterator[tuple[str, tuple[int, float]]]:
    """By the names that PEFT looks up in ``rank_pattern``."""
    known = {id(site.lora) for site in sites}
    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling and id(layer) not in known:
            if isinstance(layer, ParamWrapper):  # one around the other for each parameter of a module
                while name.endswith(".base_layer"):
                    name = name.removesuffix(".base_layer")
                name = f"{name}.{layer.parameter_name}"
            yield name, (layer.r[adapter_name], float(layer.scaling[adapter_name]))


def _warn_of_what_is_outside(model: nn.Module, peft_model: PeftModel) -> None:
    """Warn of what the model around the PEFT model trains."""
    inside = {id(parameter) for parameter in peft_model.parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        warnings.warn(
            f"{some(outside)} is trained outside of the PEFT model: put it in before get_peft_model, with "
            "modules_to_save, or save it yourself, for checkpoints and the export will lack it",
            stacklevel=4,
        )


def warn_of_start(model: nn.Module, adapter_name: str) -> None:
    """Warn where A was initialised in a way of its own, such as EVA, which switch 0 overwrites."""
    way = getattr(find_peft_model(model).peft_config[adapter_name], "init_lora_weights", True)
    if isinstance(way, str) and way != "gaussian":
        warnings.warn(
            f"init_lora_weights is {way!r}, and switch 0 starts every pair along the singular directions of W instead: "
            "what it computed for A is not used. Leave it out, or train with plain LoRA (method: lora)",
            stacklevel=3,
        )
