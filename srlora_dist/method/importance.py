"""Computes the moving averages of Eq. 3-5 on the spans that a rank tracks, and the pair scores of Eq. 6-7."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from srlora_dist.method.statistics import PairStatistics, sum_by_pair
from srlora_dist.storage.base import Storage
from srlora_dist.storage.factor_spans import FactorSpan, OwnedSpan, local_part

GROUP_ELEMENTS = {"cpu": 1 << 16, "other": 1 << 24}
"""Elements that are updated together: on a CPU few enough for its cache, elsewhere enough to need few kernels."""

MOST_GROUPINGS = 16
"""Sets of tensors with a gradient for which the groups are kept: one in most runs, under ZeRO-3 one per sub-group."""


@dataclass
class Group:
    """Spans of tensors that the optimizer steps; their statistics lie end to end and are updated as one tensor.

    Args:
        spans: The spans, of one device and type.
        mean: Moving averages of the sensitivity of their elements (Eq. 4), flat.
        deviation: Moving averages of its deviation (Eq. 5), flat.
    """

    spans: list[OwnedSpan]
    mean: Tensor
    deviation: Tensor

    def __post_init__(self) -> None:
        # To use a tensor as it is costs less than to make a view of it.
        self._are_whole = all(owned.numel == local_part(owned.owner).numel() for owned in self.spans)

    def sensitivity(self) -> Tensor:
        """Eq. 3, flat and in float32."""
        if self._are_whole:
            weights = [local_part(owned.owner) for owned in self.spans]
            grads = [local_part(owned.owner.grad) for owned in self.spans]
        else:
            weights = [owned.of(owned.owner) for owned in self.spans]
            grads = [owned.of(owned.owner.grad) for owned in self.spans]
        if weights[0].dtype != torch.float32:  # trained in 16 bits: averages of such short numbers would stand still
            weights, grads = ([tensor.float() for tensor in tensors] for tensors in (weights, grads))
        return torch._utils._flatten_dense_tensors(torch._foreach_mul(weights, grads)).abs_()


class Importance(PairStatistics):
    """How sensitive the loss is to each element of the factors, and how much that varies.

    Between switches nothing is sent: each rank updates the statistics of its own spans, from the gradient that the
    optimizer is about to apply. When a switch is due, one all-reduce adds up the ranks' parts of the pair scores.

    Args:
        storage: How the ranks hold the factors.
        beta1: Decay of the moving average of the sensitivity (Eq. 4).
        beta2: Decay of the moving average of its deviation (Eq. 5).
        relative: Divide what a factor adds to a pair's score by the mean square of the pair's elements in it.
        resets_all: A switch clears the statistics of all pairs, not only of those that it restarts.

    Attributes:
        seconds: Host time of the updates; a GPU may still be at work when they return.
    """

    kinds = ("mean", "deviation")

    def __init__(
        self, storage: Storage, beta1: float, beta2: float, relative: bool = False, resets_all: bool = True
    ) -> None:
        super().__init__(storage)
        self.beta1, self.beta2 = beta1, beta2
        self.relative, self.resets_all = relative, resets_all
        self._groups: dict[tuple[int, ...], list[Group]] = {}

    @override
    @torch.no_grad()
    def observe_(self, owners: list[Tensor]) -> None:
        """Eq. 3-5 for the tensors that are about to be stepped; nothing is sent, and no device is waited for."""
        began = time.perf_counter()
        present = tuple(id(owner) for owner in owners if owner.grad is not None)
        if present not in self._groups:
            if len(self._groups) == MOST_GROUPINGS:  # layers that are left out at random
                self._groups.clear()
            self._groups[present] = list(self._make_groups(set(present)))
        for group in self._groups[present]:
            change = group.sensitivity()
            group.mean.lerp_(change, 1 - self.beta1)
            change.sub_(group.mean).abs_()
            group.deviation.lerp_(change, 1 - self.beta2)
        self.seconds += time.perf_counter() - began

    @override
    @torch.no_grad()
    def pair_scores(self) -> list[Tensor]:
        """Eq. 6-7. Collective: one all-reduce of 8 bytes per pair, or of 32 if they are relative."""

        def score(span: FactorSpan) -> Tensor:
            # In float32 the product of two averages of 1e-20 would be 0.
            return self.of(span, "mean").double() * self.of(span, "deviation").double()

        if not self.relative:
            return self.by_site(self.storage.all_reduce_(sum_by_pair(self.storage, score)))
        parts = [sum_by_pair(self.storage, of, factor) for of in (score, mean_square) for factor in ("A", "B")]
        of_a, of_b, size_of_a, size_of_b = self.storage.all_reduce_(torch.stack(parts))
        return self.by_site(_quotient(of_a, size_of_a) + _quotient(of_b, size_of_b))

    @override
    def clear_(self) -> None:
        for buffers, _ in self._buffers:
            buffers.zero_()

    @override
    def reset_(self, number: int, slots: Tensor) -> None:
        for span in self.spans_of(number):
            for kind in self.kinds:
                if self.resets_all:
                    self.of(span, kind).zero_()
                else:
                    at = self.places(span, slots)
                    self.of(span, kind).index_fill_(0, at, 0)

    def _make_groups(self, present: set[int]) -> Iterator[Group]:
        """All that is tracked of the owners with these ids, in groups."""
        for (mean, deviation), spans in self._buffers:
            most = GROUP_ELEMENTS.get(mean.device.type, GROUP_ELEMENTS["other"])
            groups: list[tuple[int, list[OwnedSpan]]] = []  # (where its statistics begin, spans)
            stop = 0
            for start, owned in _cut(_joined(spans, present), most):
                first, members = groups[-1] if groups else (0, [])
                fits = members and start == stop and start + owned.numel - first <= most
                if fits and members[0].owner.dtype == owned.owner.dtype:
                    members.append(owned)
                else:
                    groups.append((start, [owned]))
                stop = start + owned.numel
            for first, members in groups:
                last = first + sum(owned.numel for owned in members)
                yield Group(members, mean[first:last], deviation[first:last])


def mean_square(span: FactorSpan) -> Tensor:
    """What is averaged over a pair's elements to tell how large it is."""
    return span.of(span.owner).double().square()


def _quotient(part: Tensor, size: Tensor) -> Tensor:
    """A pair that is 0 has no score."""
    return torch.where(size > 0, part / size.where(size > 0, 1), 0)


def _joined(spans: list[FactorSpan], present: set[int]) -> list[tuple[int, OwnedSpan]]:
    """The spans of these owners as (where its statistics begin, span), with neighbours joined."""
    found: list[tuple[int, OwnedSpan]] = []
    start = 0
    for span in spans:
        if id(span.owner) in present and span.numel:
            begin, last = found[-1] if found else (0, None)
            is_next = last is not None and begin + last.numel == start and last.offset + last.numel == span.offset
            if is_next and last.owner is span.owner:
                last.numel += span.numel
            else:
                found.append((start, OwnedSpan(span.owner, span.offset, span.start, span.numel)))
        start += span.numel
    return found


def _cut(spans: list[tuple[int, OwnedSpan]], most: int) -> Iterator[tuple[int, OwnedSpan]]:
    """Cut these spans into spans of at most this many elements."""
    for begin, owned in spans:
        for k in range(0, owned.numel, most):
            yield begin + k, OwnedSpan(owned.owner, owned.offset + k, owned.start + k, min(most, owned.numel - k))


class ChangeScore(PairStatistics):
    """The mean square of a pair's change since its start, over its column of B plus over its row of A.

    Each rank keeps what its spans were started as, and no step has to be observed.
    """

    kinds = ("start",)
    needs_gradients = False

    @override
    @torch.no_grad()
    def pair_scores(self) -> list[Tensor]:
        """Collective: one all-reduce of 8 bytes per pair."""

        def square(span: FactorSpan) -> Tensor:
            return (span.of(span.owner).float() - self.of(span, "start")).double().square()

        return self.by_site(self.storage.all_reduce_(sum_by_pair(self.storage, square)))

    @override
    def reset_(self, number: int, slots: Tensor) -> None:
        for span in self.spans_of(number):
            at = self.places(span, slots)
            self.of(span, "start").index_copy_(0, at, span.of(span.owner)[at].float())
