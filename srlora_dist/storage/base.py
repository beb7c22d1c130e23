"""The interface of a storage: what the method may ask of the weights, factors and moments, however ranks hold them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srlora_dist.layers.adapter import used_adapter_error
from srlora_dist.layers.digest import digest_span
from srlora_dist.layers.pairs import add_pairs_, add_pairs_to_sum_, fill_pairs_, places_of_pairs
from srlora_dist.layers.site import PAIR_DIM, Site
from srlora_dist.storage.collectives import Collectives
from srlora_dist.storage.factor_spans import FactorSpan, OwnedSpan, by_site
from srlora_dist.storage.optimizer_state import call_around_steps, moments_of, reset_moments_, second_moment_of
from srlora_dist.storage.quantized import dequantise, digest_scales


class Storage(Collectives, ABC):
    """How the ranks hold the weights, factors, gradients and moments of the sites.

    Attributes:
        name: ``plain``, ``ddp``, ``zero0``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.
        optimizer: The innermost torch optimizer. It alone sees the gradients that are applied.
        gathers: Whether :meth:`gather_parameters` makes copies, because a rank holds only a part.
        cuts_optimizer: Whether a rank's optimizer holds only a part of the trained parameters.
        held: The spans of factors that this rank's optimizer steps.
        tracked: The spans among them that this rank keeps statistics of. Together the ranks track each element once.
        residuals: The low part of ``W = high + low`` for each site whose 16-bit W is edited in place. It covers the
            span of :meth:`weight_to_edit`. The model computes with the high part alone.
        loss_scaler: DeepSpeed's loss scaler, or None.
    """

    name: str
    gathers = False
    cuts_optimizer = True
    loss_scaler: object = None

    def __init__(self, optimizer: Optimizer, sites: list[Site]) -> None:
        super().__init__(sites[0].lora_a.device)
        self.optimizer = optimizer
        self.sites = sites
        self.held: list[FactorSpan] = []
        self.tracked: list[FactorSpan] = []
        self.residuals: dict[int, Tensor] = {}

    def _map_factors(self) -> None:
        """List the spans of all factors. A subclass calls this as soon as :meth:`owned_span` works."""
        for number, site in enumerate(self.sites):
            for factor in ("A", "B"):
                span = self.owned_span(site.factor(factor))
                self.held.append(FactorSpan(**vars(span), site=number, factor=factor))
        self.tracked = self.held

    @cached_property
    def _held_by_site(self) -> dict[int, list[FactorSpan]]:
        return by_site(self.held)

    # How weights are held: each subclass answers these.

    @abstractmethod
    def owned_span(self, parameter: nn.Parameter) -> OwnedSpan:
        """The span of a trained parameter that this rank's optimizer holds.

        Raises:
            ValueError: The optimizer does not train it.
        """

    @abstractmethod
    def local_span(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """This rank's span of a parameter of the model, as a view, and the span's offset."""

    @abstractmethod
    def disjoint_span(self, number: int) -> tuple[Tensor, int]:
        """This rank's disjoint span of a site's W and its offset. Together the ranks cover W once."""

    @abstractmethod
    def gather_stored(self, number: int, to_rank: int) -> Tensor | None:
        """A site's W on one rank, as it is stored (transposed, in 16 bits or packed); None on the other ranks.

        Collective: every rank must call it; what is sent depends on the storage.
        """

    @abstractmethod
    def gather_parameters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Whole floating-point parameters on every rank. A result may be the live tensor: do not write to it.

        Collective: every rank must call it with the same parameters; what is sent depends on the storage.
        """

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter as it is stored, however it is sharded."""
        return parameter.shape

    def copies(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:  # noqa: ARG002 (the interface)
        """The trained parameters and moments that every rank holds whole, and that must be the same on all ranks."""
        return iter(())

    def weight_copies(self, number: int) -> Iterator[Tensor]:  # noqa: ARG002 (the interface)
        """A site's W, its low part and its second adapter, as far as every rank holds them whole."""
        return iter(())

    def is_away(self, number: int) -> bool:  # noqa: ARG002 (the interface)
        """Whether a site's W lies on a disk and must be read before use."""
        return False

    def weight_to_edit(self, number: int) -> tuple[Tensor, int]:
        """The span of a site's stored W that this rank edits, and its offset."""
        return self.local_span(self.sites[number].weight)

    def held_bytes(self, parameter: nn.Parameter) -> int:
        """Bytes that a parameter takes on this rank between steps."""
        return self.local_span(parameter)[0].nbytes

    def after_edit(self, number: int) -> None:  # noqa: B027 (a default)
        """Update the other copies of W after an edit of :meth:`weight_to_edit`. No-op here: there are none."""

    def to_rest_layout_(self) -> None:  # noqa: B027 (a default)
        """Put parameters into their at-rest layout before they are read or edited. No-op here."""

    def forget_fetch_order(self) -> None:  # noqa: B027 (a default)
        """Drop the order in which forward-only passes fetched the weights. No-op here: none is recorded."""

    def writable_copies_(self, parameter: nn.Parameter) -> list[tuple[Tensor, int]]:
        """Every copy of a parameter's span in this rank's model, with its offset. The caller must write all of them."""
        return [self.local_span(parameter)]

    @contextmanager
    def in_memory(self, number: int) -> Iterator[None]:  # noqa: ARG002 (the interface)
        """Keep this rank's part of a site's W in memory while it is read or edited. No-op here: it always is."""
        yield

    # The same for every storage, in terms of the methods above.

    def gather_weight(self, number: int, to_rank: int = 0) -> Tensor | None:
        """A site's W, (m, n) in float32, on one rank; None on the other ranks.

        Collective: see :meth:`gather_stored`.

        Raises:
            ValueError: A quantised W is no longer in its original layout. Raised on that rank alone.
        """
        with self.in_memory(number):
            stored = self.gather_stored(number, to_rank)
        return None if stored is None else self.widen(number, stored)

    def widen(self, number: int, stored: Tensor) -> Tensor:
        """Convert the whole stored W of a site to (m, n) in float32.

        Raises:
            ValueError: A quantised W is no longer in its original layout.
        """
        site = self.sites[number]
        whole = dequantise(site, stored) if site.quantised else stored.float()
        return whole.T if site.transposed else whole

    def digest_weights(self) -> list[int]:
        """The digest of each site's W, the same on every rank. Collective: one all-reduce of 16 bytes per site."""
        halves = torch.zeros(len(self.sites), 2, dtype=torch.int64)
        for number in range(len(self.sites)):
            digest = self.digest_weight(number)
            halves[number] = torch.tensor([digest >> 32, digest & 0xFFFFFFFF])  # halves cannot overflow in the sum
        halves = self.all_reduce_(halves.to(self.device)).tolist()
        return [((high << 32) + low) % 2**64 for high, low in halves]

    def digest_weight(self, number: int) -> int:
        """This rank's part of the digest of a site's W. The digest is the sum of the parts of all ranks."""
        site = self.sites[number]
        with self.in_memory(number):
            total = digest_span(*self.disjoint_span(number))
        if site.quantised and self.rank == 0:  # every rank has the scales
            total += digest_scales(site)
        return total % 2**64

    def allocate_residuals(self, device: str) -> None:
        """Allocate the low parts of the 16-bit weights that are edited in place.

        Args:
            device: ``weight`` keeps them on the device of the weight; ``cpu`` keeps them in host memory, pinned if the
                weight is on a GPU.
        """
        for number, site in enumerate(self.sites):
            if site.weight.dtype == torch.float32 or site.fused_a is not None:
                continue
            with self.in_memory(number):
                span, _ = self.weight_to_edit(number)
                to_host = device == "cpu" and span.device.type != "cpu"
                place = {"device": "cpu", "pin_memory": True} if to_host else {"device": span.device}
                self.residuals[number] = torch.zeros(span.numel(), dtype=span.dtype, **place)

    def edit_weight_(self, number: int, left: Tensor, right: Tensor) -> None:
        """Add ``scale * left @ right``, (m, k) times (k, n), to this rank's part of a site's W. Sends nothing."""
        site = self.sites[number]
        if site.transposed:
            left, right = right.T, left.T
        with self.in_memory(number):
            span, start = self.weight_to_edit(number)
            left, right = left.to(span.device), right.to(span.device)
            if number in self.residuals:
                add_pairs_to_sum_(span, self.residuals[number], start, left, right, site.scale)
            else:
                add_pairs_(span, start, left, right, site.scale)
            self.after_edit(number)

    def write_parameter_(self, parameter: nn.Parameter, pair_dim: int, slots: Tensor, whole: Tensor) -> None:
        """Write the given pairs of a whole factor to every copy in this rank's model."""
        for span, start in self.writable_copies_(parameter):
            fill_pairs_(span, start, pair_dim, slots, whole)

    def span_in_model(self, span: FactorSpan) -> Tensor:
        """This span in the copy that the model computes with, as a view."""
        held, start = self.local_span(self.sites[span.site].factor(span.factor))
        return held[span.start - start : span.start - start + span.numel]

    def find_misplaced(self) -> FactorSpan | None:
        """A span whose owner differs from what the model computes with, so this rank's map is wrong; or None."""
        for span in self.held:
            copy = self.span_in_model(span)
            if not torch.equal(span.of(span.owner).to(copy.device, copy.dtype), copy):
                return span
        return None

    def require_usable(self, fresh: bool) -> None:
        """Check that the optimizer holds the factors where this storage expects them.

        Args:
            fresh: Whether training starts anew, so that every B must still be 0.

        Collective: see :meth:`raise_together`.

        Raises:
            ValueError: On some rank the map of factors is wrong, or B is not 0 and switch 0 would overwrite it.
        """
        error = None
        misplaced = self.find_misplaced()
        used = [span for span in self.held if fresh and span.factor == "B" and bool(span.of(span.owner).any())]
        if misplaced is not None:
            error = ValueError(
                f"the optimizer of {self.name} does not hold {self.sites[misplaced.site].name} where it is "
                "expected: use the engine's default layout, or another engine"
            )
        elif used:
            error = used_adapter_error(self.sites[used[0].site].name)
        self.raise_together(error)

    def write_pairs_(
        self, number: int, factor: str, slots: Tensor, whole: Tensor, optimizer_reset: str, second_moment: float = 0.0
    ) -> None:
        """Write the given slots of a whole factor to all copies this rank holds and reset their optimizer moments.

        Args:
            number: Index of the site.
            factor: ``"A"`` or ``"B"``.
            slots: The pairs to write, (k,) int64 on the CPU.
            whole: The factor after the switch.
            optimizer_reset: ``srlora.optimizer_reset``.
            second_moment: What the second moments become with ``survivors``.
        """
        pair_dim = PAIR_DIM[factor]
        for span in (span for span in self._held_by_site[number] if span.factor == factor):
            fill_pairs_(span.of(span.owner), span.start, pair_dim, slots, whole)
            at = places_of_pairs(span.start, span.numel, whole.shape, pair_dim, slots)
            reset_moments_(self.optimizer, span, at, optimizer_reset, second_moment)
        self.write_parameter_(self.sites[number].factor(factor), pair_dim, slots, whole)

    def second_moment(self, span: FactorSpan) -> Tensor:
        """The optimizer's second moment of a span, flat; 0 before the first step."""
        return second_moment_of(self.optimizer, span)

    @contextmanager
    def changed_by_switch(self, number: int) -> Iterator[list[Tensor]]:
        """Views of all that a switch changes at a site on this rank, except the model's copies of the factors."""
        with self.in_memory(number):
            views = [] if self.sites[number].fused_a is not None else [self.weight_to_edit(number)[0]]
            views += [self.residuals[number]] if number in self.residuals else []
            for span in self._held_by_site[number]:
                views += [span.of(tensor) for tensor in (span.owner, *moments_of(self.optimizer, span))]
            yield views
            self.after_edit(number)

    def on_optimizer_step(
        self, before: Callable[[list[Tensor]], None], after: Callable[[list[Tensor]], None]
    ) -> list[RemovableHandle]:
        """Call ``before`` ahead of each optimizer step and ``after`` behind it; see :func:`call_around_steps`."""
        return call_around_steps(self.optimizer, before, after)
