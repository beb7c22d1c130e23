"""Notices, before anything is written, if something other than the Switcher and its optimizer has changed the model."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from srlora_dist.checkpoint.training_state import trained_parameters
from srlora_dist.layers.digest import digest_span
from srlora_dist.layers.site import FUSED
from srlora_dist.storage.base import Storage

SAMPLES_OF_WEIGHT = 8192
"""Most elements that are compared per matrix: all of a small one, evenly spread ones of a large one."""

SAMPLES_OF_FACTOR = 16
"""Most elements that are compared per factor, for they are copied at each step."""

ROUNDINGS = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}
"""Roundings that a weight may move by where nothing was written in place: each merge that is undone moves it by two."""


EDITED = "srlora_edited"
"""Attribute that marks a LoRA layer whose weight is no longer the pretrained one."""


class Watch:
    """Remembers samples of the model as the Switcher left it, and compares the model with them.

    A weight may change only at switches, and a pair only at switches and in steps of the optimizer that ``bind`` got.
    Between switches this costs two copies of a few elements per factor; nothing is sent, and no device is waited for.

    Args:
        storage: How the ranks hold the sites.
        adapter_name: The adapter that is trained.

    Attributes:
        hooks: Handles of the hooks on the LoRA layers.
    """

    def __init__(self, storage: Storage, adapter_name: str) -> None:
        self.storage, self.adapter_name = storage, adapter_name
        self._in_place = [site.lora for site in storage.sites if site.fused_a is None]
        # A function of the module, so that a model with these hooks can be copied and pickled.
        self.hooks = [layer.register_forward_pre_hook(_refuse_reference) for layer in self._in_place]
        self._views_are_old = True

    @torch.no_grad()
    def remember(self, is_edited: bool) -> None:
        """Remember the model as it is now.

        Args:
            is_edited: Whether weights that are edited in place may differ from the pretrained ones.

        Collective: see ``Storage.to_rest_layout_``.
        """
        self.storage.to_rest_layout_()
        for layer in self._in_place:
            setattr(layer, EDITED, is_edited)
        self._held = [list(self._parts(number)) for number in range(len(self.storage.sites))]
        self._samples = [[_sample(part).clone().cpu() for _, part in parts] for parts in self._held]
        self._versions = self._count_writes()
        self._views = self._view_factors()
        self._pairs = self._sample_pairs()
        self._drift = [torch.zeros_like(pairs) for pairs in self._pairs]
        self._views_are_old = True  # FSDP2 moves its shards in the first forward pass

    @torch.no_grad()
    def before_step(self) -> None:
        """Note whether pairs have moved since the last step; call it before the optimizer moves them."""
        for drift, now, before in zip(self._drift, self._sample_pairs(), self._pairs, strict=True):
            drift.add_((now - before).abs_())

    @torch.no_grad()
    def remember_pairs(self) -> None:
        """Remember the pairs anew, after the optimizer has moved them."""
        if self._views_are_old:
            self._views, self._views_are_old = self._view_factors(), False
        self._pairs = self._sample_pairs()

    @property
    def num_bytes(self) -> int:
        """Memory for the elements that are remembered on this rank."""
        kept = [sample for samples in self._samples for sample in samples]
        return sum(tensor.nbytes for tensor in (*kept, *self._pairs, *self._drift))

    def was_written(self) -> bool:
        """Whether a weight was written in place, perhaps with the same numbers. Needs no operation on tensors."""
        return self._count_writes() != self._versions

    def require_untouched(self, in_step: bool = False) -> None:
        """Raise on every rank if the model is not as it was left, on any of them.

        Args:
            in_step: Whether the optimizer has stepped since :meth:`remember_pairs`, so that pairs cannot be compared.

        Collective: see ``Storage.to_rest_layout_``; one all-reduce of 8 bytes; after a failure also the messages.

        Raises:
            RuntimeError: The model has changed; the message names what has, and the remedy.
        """
        self.storage.to_rest_layout_()
        found = self._find_change(in_step)
        self.storage.raise_together(RuntimeError(found) if found else None, RuntimeError)
        self._versions = self._count_writes()  # with the same numbers

    @torch.no_grad()
    def _find_change(self, in_step: bool) -> str | None:
        remedy = "load the base anew, and go on from a checkpoint with bind(resume_from=...)"
        for site in self.storage.sites:
            layer, name = site.lora, self.adapter_name
            factors = [side[name].weight if name in side else None for side in (layer.lora_A, layer.lora_B)]
            now = (layer.get_base_layer().weight, *factors)
            if any(a is not b for a, b in zip(now, (site.weight, site.lora_a, site.lora_b), strict=True)):
                return f"the parameters of {site.name} are others than those that bind() got: {remedy}"
            if name not in layer.active_adapters or layer.scaling[name] != site.scale:
                return (
                    f"the adapter {name!r} of {site.name} is active with scale {site.scale} no more (set_adapter, "
                    "set_scale), so that the model computes something else than what is written: set it back"
                )
        for number, site in enumerate(self.storage.sites):
            now = dict(self._parts(number))
            kept = zip(self._held[number], self._samples[number], self._versions[number], strict=True)
            for (what, _), sample, version in kept:
                part = now.get(what)
                exactly = part is None or part._version != version
                if part is None or _differs(_sample(part).cpu(), sample, exactly):
                    return (
                        f"{what} of {site.name} was changed by something else than the Switcher, such as "
                        f"load_state_dict() or accelerator.load_state(): it does not fit the record of what was fused "
                        f"any more, so nothing is written; {remedy}"
                    )
        # What is not a number has diverged, which the scores tell; no comparison with it holds.
        moved = any(bool((drift > 0).any()) for drift in self._drift)
        if not in_step and not moved:
            self._views = self._view_factors()
            pairs = zip(self._sample_pairs(), self._pairs, strict=True)
            moved = any(now.shape != before.shape or bool(((now - before).abs() > 0).any()) for now, before in pairs)
        if moved:
            return (
                "the pairs were changed by something else than the optimizer that bind() got: by another optimizer, "
                "which bind() has to get, or by load_state_dict() or set_peft_model_state_dict(), which put old pairs "
                f"onto a weight that has changed since; {remedy}. Changes of your own belong between optimizer.step() "
                "and switcher.step()"
            )
        return None

    def _parts(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """What a switch changes at a site on this rank, beside the pairs."""
        storage, site = self.storage, self.storage.sites[number]
        if not storage.is_away(number):
            in_place = site.fused_a is None
            yield "the weight", (storage.weight_to_edit(number) if in_place else storage.local_span(site.weight))[0]
        if number in storage.residuals:
            yield "the residual", storage.residuals[number]
        if site.fused_a is not None:
            for name, factor in (("A", site.fused_a), ("B", site.fused_b)):
                yield f"{name} of the adapter {FUSED!r}", storage.local_span(factor)[0]

    def _count_writes(self) -> list[list[int]]:
        return [[part._version for _, part in parts] for parts in self._held]

    def _view_factors(self) -> list[list[Tensor]]:
        """A few elements of each factor, as views, by device."""
        views: dict[torch.device, list[Tensor]] = defaultdict(list)
        for site in self.storage.sites:
            for factor in (site.lora_a, site.lora_b):
                span = self.storage.local_span(factor)[0]
                views[span.device].append(_sample(span, SAMPLES_OF_FACTOR))
        return list(views.values())

    def _sample_pairs(self) -> list[Tensor]:
        return [torch.cat(views) for views in self._views]


def require_same_model(model: nn.Module, storage: Storage, plan: dict[str, object]) -> None:
    """Raise where ranks have other sites, other trained parameters, other weights to copy or another plan.

    Args:
        model: The prepared model.
        storage: How this rank holds it; nothing was sent before.
        plan: Other settings that have to be the same, by name.

    Collective: one all-reduce of 16 bytes; after a failure also what each rank has.

    Raises:
        ValueError: On every rank, with the first difference.
    """
    lines = [f"adapts {site.name} {site.shape} with rank {site.rank}" for site in storage.sites]
    lines += [f"trains {name} {tuple(storage.whole_shape(p))}" for name, p in trained_parameters(model).items()]
    lines += [f"has {name} {value}" for name, value in plan.items()]
    if not storage.gathers:
        floats = [site for site in storage.sites if not site.quantised]
        samples = [_sample(site.weight.detach().view(-1)) for site in floats]
        digests = [f"{digest_span(sample):016x}" for sample in samples]
        lines += [f"holds {site.name} with digest {digest}" for site, digest in zip(floats, digests, strict=True)]
    whole = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
    if storage.find_difference([int.from_bytes(whole, "big")]) is None:
        return
    for rank, theirs in enumerate(everyone := storage.gather_objects(lines)):
        for first, other in zip([*everyone[0], "has no more"], [*theirs, "has no more"], strict=False):
            if first != other:
                raise ValueError(
                    f"the ranks hold different models: rank 0 {first}, and rank {rank} {other}. Pipeline, tensor and "
                    "expert parallelism are not supported: build the same model on every rank, from the same seed"
                )


def _refuse_reference(layer: LoraLayer, *_: object) -> None:
    if layer.disable_adapters and getattr(layer, EDITED, False):
        raise RuntimeError(
            "the model was called without its adapter (disable_adapter), as a reference, but SRLoRA edits the weight "
            "in place, so it is not the pretrained model: choose fusion: adapter, which never writes it"
        )


def _sample(span: Tensor, most: int = SAMPLES_OF_WEIGHT) -> Tensor:
    """A view of evenly spread elements of a span. The stride is odd: an even one would meet few columns of a matrix."""
    return span[:: (-(-span.numel() // most) | 1) if span.numel() > most else 1]


def _differs(now: Tensor, before: Tensor, exactly: bool) -> bool:
    if now.shape != before.shape:
        return True
    roundings = ROUNDINGS[now.dtype] * torch.finfo(now.dtype).eps if now.dtype in ROUNDINGS and not exactly else 0.0
    now, before = now.double(), before.double()
    return bool((now - before).nan_to_num().norm() > roundings * before.norm())
