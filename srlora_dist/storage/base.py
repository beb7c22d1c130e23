"""What a storage must offer: the seam between the method and the way tensors are held."""

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
from srlora_dist.storage.optimizer_state import SECOND_MOMENTS, resettable_moments
from srlora_dist.storage.quantized import dequantise, digest_scales


class Storage(Collectives, ABC):
    """How the ranks hold the weights, factors, gradients and moments of the sites.

    Attributes:
        name: ``plain``, ``ddp``, ``zero0``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.
        optimizer: The innermost torch optimizer, the one place that sees the gradients that are applied.
        gathers: Whether :meth:`gather_parameters` makes copies, because a rank holds only a part.
        cuts_optimizer: Whether a rank's optimizer holds only a part of what is trained.
        held: The spans of factors that this rank's optimizer steps.
        tracked: Those of them that this rank keeps statistics of; over all ranks each element is tracked once.
        residuals: For each site whose 16-bit W is edited in place the low part of ``W = high + low``, of the span that
            :meth:`weight_to_edit` gives; the model computes with the high part alone.
        loss_scaler: DeepSpeed's, or None.
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
        """List the spans of all factors; a kind calls this when it can answer :meth:`stepped`."""
        for number, site in enumerate(self.sites):
            for factor in ("A", "B"):
                piece = self.stepped(site.factor(factor))
                self.held.append(FactorSpan(**vars(piece), site=number, factor=factor))
        self.tracked = self.held

    @cached_property
    def _held_of_site(self) -> dict[int, list[FactorSpan]]:
        return by_site(self.held)

    # How weights are held: each kind answers these.

    @abstractmethod
    def stepped(self, parameter: nn.Parameter) -> OwnedSpan:
        """The piece of a trained parameter that this rank's optimizer holds.

        Raises:
            ValueError: The optimizer does not train it.
        """

    @abstractmethod
    def local_span(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """The span of a parameter, as the model holds it, that this rank holds (a view), and its offset."""

    @abstractmethod
    def disjoint_span(self, number: int) -> tuple[Tensor, int]:
        """The span of W of a site that this rank answers for, and its offset: over all ranks each element once."""

    @abstractmethod
    def gather_stored(self, number: int, to_rank: int) -> Tensor | None:
        """W of a site on one rank just as it is stored (transposed, 16-bit, packed), and None elsewhere.

        Collective: every rank must call it; what is sent depends on the storage.
        """

    @abstractmethod
    def gather_parameters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Whole floating-point parameters on every rank; a result may be the live tensor, so it is not to be written.

        Collective: every rank must call it with the same parameters; what is sent depends on the storage.
        """

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter as it is stored, however it is cut."""
        return parameter.shape

    def copies(self, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:  # noqa: ARG002 (the interface)
        """What every rank holds whole of trained parameters and their moments, so that it has to be the same there."""
        return iter(())

    def weight_copies(self, number: int) -> Iterator[Tensor]:  # noqa: ARG002 (the interface)
        """What every rank holds whole of a site's W, of its low part and of its second adapter."""
        return iter(())

    def is_away(self, number: int) -> bool:  # noqa: ARG002 (the interface)
        """Whether a site's W would have to be fetched from a disk."""
        return False

    def weight_to_edit(self, number: int) -> tuple[Tensor, int]:
        """The span of W, as it is stored, that this rank edits, and its offset."""
        return self.local_span(self.sites[number].weight)

    def held_bytes(self, parameter: nn.Parameter) -> int:
        """Memory that a parameter takes on this rank between steps."""
        return self.local_span(parameter)[0].nbytes

    def after_edit(self, number: int) -> None:  # noqa: B027 (a default)
        """Bring the copies of W beside the edited span up to date; here there are none."""

    def to_rest_layout_(self) -> None:  # noqa: B027 (a default)
        """Bring the parameters into the state in which they are read and edited; here there is no other."""

    def forget_fetch_order(self) -> None:  # noqa: B027 (a default)
        """Forget in which order passes without a backward one have used the weights; here nobody keeps it."""

    def writable_copies_(self, parameter: nn.Parameter) -> list[tuple[Tensor, int]]:
        """Every span of a parameter that this rank's model holds, and its offset; whoever asks writes all of them."""
        return [self.local_span(parameter)]

    @contextmanager
    def in_memory(self, number: int) -> Iterator[None]:  # noqa: ARG002 (the interface)
        """Hold this rank's part of a site's W in memory while it is read or edited; here it always is."""
        yield

    # The same for every kind, in terms of these.

    def gather_weight(self, number: int, to_rank: int = 0) -> Tensor | None:
        """W of a site, (m, n) in float32, on one rank and None elsewhere.

        Collective: see :meth:`gather_stored`.

        Raises:
            ValueError: A quantised W is not in its original layout any more; on that rank alone.
        """
        with self.in_memory(number):
            stored = self.gather_stored(number, to_rank)
        return None if stored is None else self.widen(number, stored)

    def widen(self, number: int, stored: Tensor) -> Tensor:
        """W of a site, (m, n) in float32, from the whole of it as it is stored.

        Raises:
            ValueError: A quantised W is not in its original layout any more.
        """
        site = self.sites[number]
        whole = dequantise(site, stored) if site.quantised else stored.float()
        return whole.T if site.transposed else whole

    def digest_weights(self) -> list[int]:
        """The digest of each site's W, the same on every rank. Collective: one all-reduce of 16 bytes a site."""
        halves = torch.zeros(len(self.sites), 2, dtype=torch.int64)
        for number in range(len(self.sites)):
            digest = self.digest_weight(number)
            halves[number] = torch.tensor([digest >> 32, digest & 0xFFFFFFFF])  # halves cannot overflow in the sum
        halves = self.all_reduce_(halves.to(self.device)).tolist()
        return [((high << 32) + low) % 2**64 for high, low in halves]

    def digest_weight(self, number: int) -> int:
        """This rank's part of the digest of a site's W; the parts of all ranks add up to it."""
        site = self.sites[number]
        with self.in_memory(number):
            total = digest_span(*self.disjoint_span(number))
        if site.quantised and self.rank == 0:  # the scales are on every rank
            total += digest_scales(site)
        return total % 2**64

    def allocate_residuals(self, device: str) -> None:
        """Make room for the low parts of the 16-bit weights that are edited in place.

        Args:
            device: ``weight`` keeps them where the weight is, ``cpu`` in host memory, pinned if the weight is on a GPU.
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
        """Add ``scale * left @ right``, (m, k) times (k, n), to what this rank holds of a site's W; nothing is sent."""
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
        """Write the given pairs of a whole factor to what this rank's model holds of it."""
        for span, start in self.writable_copies_(parameter):
            fill_pairs_(span, start, pair_dim, slots, whole)

    def span_in_model(self, span: FactorSpan) -> Tensor:
        """The same span in the copy that the model computes with, a view."""
        held, start = self.local_span(self.sites[span.site].factor(span.factor))
        return held[span.start - start : span.start - start + span.numel]

    def find_misplaced(self) -> FactorSpan | None:
        """A span whose owner does not hold what the model computes with: then the map of this rank is wrong."""
        for span in self.held:
            copy = self.span_in_model(span)
            if not torch.equal(span.of(span.owner).to(copy.device, copy.dtype), copy):
                return span
        return None

    def require_usable(self, fresh: bool) -> None:
        """The optimizer has to hold the factors where this storage expects them; a fresh adapter holds nothing yet.

        Collective: see :meth:`raise_together`.

        Raises:
            ValueError: On any rank the map of factors is wrong; or a B is not 0, which switch 0 would overwrite.
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
            number: Of the site.
            factor: ``"A"`` or ``"B"``.
            slots: (k,) on the CPU.
            whole: The factor as it shall be.
            optimizer_reset: ``srlora.optimizer_reset``.
            second_moment: What the second moments become with ``survivors``.
        """
        pair_dim = PAIR_DIM[factor]
        for span in (span for span in self._held_of_site[number] if span.factor == factor):
            fill_pairs_(span.of(span.owner), span.start, pair_dim, slots, whole)
            state = self.optimizer.state.get(span.owner, {})
            at = places_of_pairs(span.start, span.numel, whole.shape, pair_dim, slots)
            for moment, value in resettable_moments(state, span.owner, optimizer_reset, second_moment):
                span.of(moment).index_fill_(0, at.to(moment.device), value)
        self.write_parameter_(self.sites[number].factor(factor), pair_dim, slots, whole)

    def second_moment(self, span: FactorSpan) -> Tensor:
        """Of a span, flat; 0 before the first step."""
        state = self.optimizer.state.get(span.owner, {})
        return next((span.of(state[key]) for key in SECOND_MOMENTS if key in state), torch.zeros(span.numel))

    @contextmanager
    def changed_by_switch(self, number: int) -> Iterator[list[Tensor]]:
        """Views of all that a switch changes of a site on this rank, but for the model's copies of the factors."""
        with self.in_memory(number):
            views = [] if self.sites[number].fused_a is not None else [self.weight_to_edit(number)[0]]
            views += [self.residuals[number]] if number in self.residuals else []
            for span in self._held_of_site[number]:
                state = self.optimizer.state.get(span.owner, {})
                moments = (moment for moment, _ in resettable_moments(state, span.owner, "zero"))
                views += [span.of(tensor) for tensor in (span.owner, *moments)]
            yield views
            self.after_edit(number)

    def on_optimizer_step(
        self, before: Callable[[list[Tensor]], None], after: Callable[[list[Tensor]], None]
    ) -> list[RemovableHandle]:
        """Call ``before`` with the tensors that are about to be stepped, their final gradients in ``.grad``.

        And ``after`` with those that were: before DeepSpeed publishes what it has stepped.

        Returns:
            Handles that end this.
        """

        def stepped(optimizer: Optimizer) -> list[Tensor]:
            return [owner for group in optimizer.param_groups for owner in group["params"]]

        def pre_hook(optimizer: Optimizer, *_: object) -> None:
            if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
                raise RuntimeError(
                    "the optimizer unscales fp16 gradients itself (fused=True with a GradScaler), so they cannot be "
                    "observed: use fused=False, or train in fp32"
                )
            before(stepped(optimizer))

        return [
            self.optimizer.register_step_pre_hook(pre_hook),
            self.optimizer.register_step_post_hook(lambda optimizer, *_: after(stepped(optimizer))),
        ]


def not_stepped(sites: list[Site], parameter: nn.Parameter) -> ValueError:
    """The error of an optimizer that does not train a parameter."""
    names = [f"the LoRA parameters of {s.name}" for s in sites if parameter is s.lora_a or parameter is s.lora_b]
    what = names[0] if names else f"a trainable parameter of shape {tuple(parameter.shape)}"
    return ValueError(f"the optimizer does not hold {what}: build it from all trainable ones, or freeze the others")
