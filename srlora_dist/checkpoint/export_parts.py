"""Decides which tensors an export holds beside the live pairs: all that another load of the base would lack.

These are all other trained parameters; buffers that training changes; parameters that were in no checkpoint when
Transformers loaded the model; and resized embeddings. PEFT itself saves some of them. The others are saved under the
names of the base's own parameters, from which ``PeftModel.from_pretrained`` loads them as well.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from srlora_dist.checkpoint.base_label import BaseLabel
from srlora_dist.checkpoint.base_parts import (
    adapters_of,
    inside,
    lasting_buffers,
    never_loaded,
    new_heads,
    of_adapters,
    resized_embeddings,
    was_loaded,
)
from srlora_dist.errors import shorten_list
from srlora_dist.layers.adapter import find_peft_model
from srlora_dist.layers.digest import digest_span
from srlora_dist.layers.site import FUSED, Site

logger = logging.getLogger(__name__)


class ExportParts:
    """What is exported and kept in checkpoints. Made before the model is prepared, and completed by ``bind``.

    Args:
        model: The PEFT model, not yet prepared.
        sites: The sites of the model.
        adapter_name: The adapter that is trained.

    Attributes:
        own_weights: Sites whose W another load of the base would lack, such as a new head. Their W itself is exported.
        names: The parameter or buffer of the PEFT model behind each name in the export. Known after ``bind``.
        other_layers: Rank and scale of each LoRA layer of the adapter that is not a site. Known after ``bind``.
        base: The base that the adapter belongs to. Known after ``bind``.

    Raises:
        ValueError: Another adapter is trained too, which the export would lack.
    """

    def __init__(self, model: nn.Module, sites: list[Site], adapter_name: str) -> None:
        self.adapter_name = adapter_name
        peft_model = find_peft_model(model)
        self._companions: set[str] = set()
        self.require_alone(model, sites)
        weights = {f"base_model.model.{site.name}.base_layer.weight": site for site in sites}
        self._vocab_size, embeddings = resized_embeddings(peft_model)
        lacking = {**embeddings, **never_loaded(peft_model)}
        if not any(was_loaded(parameter) for parameter in peft_model.parameters()):
            lacking |= new_heads(peft_model, sites)
        self._lacking = [name for name in lacking if name not in weights]
        self.own_weights = [weights[name].name for name in lacking if name in weights and not weights[name].quantised]
        _warn_of_what_is_outside(model, peft_model)
        self.names: dict[str, str] = {}
        self.other_layers: dict[str, tuple[int, float]] = {}
        self.base: BaseLabel | None = None
        self._digests: dict[str, int] = {}
        self._named_lost = False

    def bind(self, model: nn.Module, sites: list[Site], digests: list[int]) -> None:
        """Decide what the export will hold, from what is trained now, and warn of what PEFT would have left out.

        Args:
            model: The prepared model. Its buffers must still be as in the untouched base.
            sites: The sites of the model.
            digests: Digest of each site's untouched W.

        Raises:
            ValueError: Another adapter is trained too.
        """
        peft_model = find_peft_model(model)
        self.require_alone(model, sites)
        self._digests = {name: digest_span(buffer) for name, buffer in peft_model.named_buffers()}
        self.base = BaseLabel.of(sites, digests, leave_out=self.own_weights, vocab_size=self._vocab_size)
        self.other_layers = dict(_other_layers(peft_model, sites, self.adapter_name))
        self.names = self._named_by_peft(peft_model)
        owned = {id(tensor) for tensor in of_adapters(peft_model)}
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
        """The buffers that the export holds: those of modules that are trained whole, and others that have changed."""
        peft_model = find_peft_model(model)
        found, lasting = dict(peft_model.named_buffers()), lasting_buffers(peft_model)
        moved = [name for name, buffer in found.items() if self._digests.get(name) != digest_span(buffer)]
        lost = [name for name in moved if name not in lasting]
        if lost and not self._named_lost:
            self._named_lost = True
            logger.warning("%s moved in training, and no file can hold it: it is not persistent", shorten_list(lost))
        names = dict.fromkeys([*self.names.values(), *(name for name in moved if name in lasting)])
        return {name: found[name] for name in names if name in found}

    def require_alone(self, model: nn.Module, sites: list[Site]) -> None:
        """Check that the trained adapter is active, and that no other adapter is trained; warn of frozen active ones.

        Raises:
            ValueError: The adapter is not active, or another one is trained, which the export would lack. The message
                names the layers and the remedy.
        """
        asleep = [site.name for site in sites if self.adapter_name not in site.lora.active_adapters]
        if asleep:
            raise ValueError(
                f"the adapter {self.adapter_name!r} is not active in {shorten_list(asleep)}, so that it is not "
                f"trained: call model.set_adapter({self.adapter_name!r})"
            )
        frozen: dict[str, list[str]] = {}
        for other, layer, trains in _active_beside(find_peft_model(model), self.adapter_name):
            if trains:
                raise ValueError(
                    f"the adapter {other!r} is trained beside {self.adapter_name!r} in {layer}, and an export of "
                    f"{self.adapter_name!r} would lack it: call model.set_adapter({self.adapter_name!r}), or freeze "
                    f"{other!r} and load it beside the export"
                )
            frozen.setdefault(other, []).append(layer)
        for other, layers in frozen.items():
            if other not in self._companions:
                self._companions.add(other)
                warnings.warn(
                    f"the adapter {other!r} is active beside {self.adapter_name!r} in {shorten_list(layers)} and "
                    f"frozen, so an export does not hold it: load {other!r} beside it and activate both, as here",
                    stacklevel=4,
                )

    def _named_by_peft(self, peft_model: PeftModel) -> dict[str, str]:
        """The names under which PEFT itself saves the adapter. Does not ask the hub for the vocabulary's size."""
        tensors = [name for name, _ in peft_model.named_parameters(remove_duplicate=False)]
        names = {name: name for name in [*tensors, *lasting_buffers(peft_model)] if f".{FUSED}." not in name}
        return get_peft_model_state_dict(
            peft_model, state_dict=names, adapter_name=self.adapter_name, save_embedding_layers=False
        )

    def _say(self, added: list[str], moving: list[str]) -> None:
        names = [name.removeprefix("base_model.model.") for name in [*added, *moving]]
        names += [f"{name}.weight" for name in self.own_weights]
        if names:
            warnings.warn(
                f"beside the adapter the export will hold {shorten_list(names)}: trained, or moved by training as the "
                "statistics of a batch norm are (PEFT drops those), or not in the checkpoint of the base. "
                "PeftModel.from_pretrained puts them into the base; a server that reads LoRA pairs alone lacks them",
                stacklevel=4,
            )


def _active_beside(peft_model: PeftModel, adapter_name: str) -> Iterator[tuple[str, str, bool]]:
    """Each other active adapter, with a layer where it is active and whether it is trained there."""
    for name, module in peft_model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        active = [module.active_adapter] if isinstance(module.active_adapter, str) else module.active_adapters
        for other, part in adapters_of(module):
            if other in active and other not in (adapter_name, FUSED):
                yield other, name.removeprefix("base_model.model."), any(p.requires_grad for p in inside(part))


def _moving(peft_model: PeftModel, names: dict[str, str]) -> list[str]:
    """Modules whose statistics change in training mode, such as a batch norm, without those that PEFT saves whole."""
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
    """Rank and scale of the LoRA layers that are not sites, by the names that PEFT looks up in ``rank_pattern``."""
    known = {id(site.lora) for site in sites}
    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling and id(layer) not in known:
            if isinstance(layer, ParamWrapper):  # they are nested, one for each parameter of a module
                while name.endswith(".base_layer"):
                    name = name.removesuffix(".base_layer")
                name = f"{name}.{layer.parameter_name}"
            yield name, (layer.r[adapter_name], float(layer.scaling[adapter_name]))


def _warn_of_what_is_outside(model: nn.Module, peft_model: PeftModel) -> None:
    """Warn of trained parameters of a model that wraps the PEFT model."""
    known = {id(parameter) for parameter in peft_model.parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if outside:
        warnings.warn(
            f"{shorten_list(outside)} is trained outside of the PEFT model: put it in before get_peft_model, with "
            "modules_to_save, or save it yourself, for checkpoints and the export will lack it",
            stacklevel=4,
        )


def warn_of_start(model: nn.Module, adapter_name: str) -> None:
    """Warn if A was initialised in a special way, such as EVA, because switch 0 overwrites it."""
    way = getattr(find_peft_model(model).peft_config[adapter_name], "init_lora_weights", True)
    if isinstance(way, str) and way != "gaussian":
        warnings.warn(
            f"init_lora_weights is {way!r}, and switch 0 starts every pair along the singular directions of W instead: "
            "what it computed for A is not used. Leave it out, or train with plain LoRA (method: lora)",
            stacklevel=3,
        )
