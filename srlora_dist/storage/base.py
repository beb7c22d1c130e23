"""What a storage must offer, and the collectives: the seam between the method and the way tensors are held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_dist.digest import digest_run
from srlora_dist.pairs import add_pairs_, add_pairs_to_sum_, fill_pairs_
from srlora_dist.sites import PAIR_DIM, Site
from srlora_dist.storage.moments import resettable_moments
from srlora_dist.storage.quantised import dequantise, digest_scales

T = TypeVar("T")


@dataclass(eq=False)
class Run:
    """A span of one factor: the same span of the weight, the gradient and the moments that this rank's optimizer holds.

    Args:
        site: Number of the site.
        factor: ``"A"`` or ``"B"``.
        start: Offset in the flattened factor.
        owner: The tensor that the optimizer steps: the parameter itself, or a flat fragment of several.
        offset: Offset in the flattened owner.
        numel: Length.
    """

    site: int
    factor: str
    start: int
    owner: Tensor
    offset: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This run of the owner's weight, gradient or moment, a view."""
        return local_part(tensor).view(-1)[self.offset : self.offset + self.numel]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, or its shard if it is a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Storage(ABC):
    """How the ranks hold the weights, factors, gradients and moments of the sites.

    Attributes:
        name: ``plain``, ``ddp``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.
        optimizer: The innermost torch optimizer, the one place that sees the gradients that are applied.
        gathers: Whether :meth:`gather_parameters` makes copies, because a rank holds only a part.
        held: The runs of factors that this rank's optimizer steps.
        tracked: Those of them that this rank keeps statistics of; over all ranks each element is tracked once.
        residuals: For each site whose 16-bit W is edited in place the low part of ``W = high + low``, of the run that
            :meth:`weight_to_edit` gives; the model computes with the high part alone.
    """

    name: str
    gathers = False

    def __init__(self, optimizer: Optimizer, sites: list[Site]) -> None:
        self.optimizer = optimizer
        self.sites = sites
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.device = sites[0].lora_a.device
        self.held: list[Run] = []
        self.tracked: list[Run] = []
        self.residuals: dict[int, Tensor] = {}

    # How weights are held: each kind answers these.

    @abstractmethod
    def parameter_run(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """The run of a parameter, as the model holds it, that this rank holds (a view), and its offset."""

    @abstractmethod
    def weight_run(self, number: int) -> tuple[Tensor, int]:
        """The run of W of a site that this rank answers for, and its offset: over all ranks each element once."""

    @abstractmethod
    def gather_stored(self, number: int) -> Tensor | None:
        """W of a site on rank 0 just as it is stored (transposed, 16-bit, packed), and None elsewhere.

        Collective: every rank must call it; what is sent depends on the storage.
        """

    @abstractmethod
    def gather_parameters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Whole floating-point parameters on every rank; a result may be the live tensor, so it is not to be written.

        Collective: every rank must call it with the same parameters; what is sent depends on the storage.
        """

    def weight_to_edit(self, number: int) -> tuple[Tensor, int]:
        """The run of W, as it is stored, that this rank edits, and its offset."""
        return self.parameter_run(self.sites[number].weight)

    def held_bytes(self, parameter: nn.Parameter) -> int:
        """Memory that a parameter takes on this rank between steps."""
        return self.parameter_run(parameter)[0].nbytes

    def after_edit(self, number: int) -> None:  # noqa: B027 (a default)
        """Bring the copies of W beside the edited run up to date; here there are none."""

    def settle(self) -> None:  # noqa: B027 (a default)
        """Bring the parameters into the state in which they are read and edited; here there is no other."""

    def write_parameter_(self, parameter: nn.Parameter, pair_dim: int, slots: Tensor, whole: Tensor) -> None:
        """Write the given pairs of a whole factor to what this rank's model holds of it."""
        run, start = self.parameter_run(parameter)
        fill_pairs_(run, start, pair_dim, slots, whole)

    @contextmanager
    def in_memory(self, number: int) -> Iterator[None]:  # noqa: ARG002 (the interface)
        """Hold this rank's part of a site's W in memory while it is read or edited; here it always is."""
        yield

    # The same for every kind, in terms of these.

    def gather_weight(self, number: int) -> Tensor | None:
        """W of a site, (m, n) in float32, on rank 0 and None elsewhere.

        Collective: see :meth:`gather_stored`.

        Raises:
            ValueError: A quantised W is not in its original layout any more.
        """
        site = self.sites[number]
        with self.in_memory(number):
            stored = self.gather_stored(number)
        if stored is None:
            return None
        whole = dequantise(site, stored) if site.quantised else stored.float()
        return whole.T if site.transposed else whole

    def digest_weight(self, number: int) -> int:
        """This rank's part of the digest of a site's W; the parts of all ranks add up to it."""
        site = self.sites[number]
        with self.in_memory(number):
            total = digest_run(*self.weight_run(number))
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
                run, _ = self.weight_to_edit(number)
                to_host = device == "cpu" and run.device.type != "cpu"
                place = {"device": "cpu", "pin_memory": True} if to_host else {"device": run.device}
                self.residuals[number] = torch.zeros(run.numel(), dtype=run.dtype, **place)

    def edit_weight_(self, number: int, left: Tensor, right: Tensor) -> None:
        """Add ``scale * left @ right``, (m, k) times (k, n), to what this rank holds of a site's W; nothing is sent."""
        site = self.sites[number]
        if site.transposed:
            left, right = right.T, left.T
        with self.in_memory(number):
            run, start = self.weight_to_edit(number)
            left, right = left.to(run.device), right.to(run.device)
            if number in self.residuals:
                add_pairs_to_sum_(run, self.residuals[number], start, left, right, site.scale)
            else:
                add_pairs_(run, start, left, right, site.scale)
            self.after_edit(number)

    def model_run(self, run: Run) -> Tensor:
        """The same span in the copy that the model computes with, a view."""
        held, start = self.parameter_run(self.sites[run.site].factor(run.factor))
        return held[run.start - start : run.start - start + run.numel]

    def find_misplaced(self) -> Run | None:
        """A run whose owner does not hold what the model computes with: then the map of this rank is wrong."""
        for run in self.held:
            copy = self.model_run(run)
            if not torch.equal(run.of(run.owner).to(copy.device, copy.dtype), copy):
                return run
        return None

    def require_fresh_adapter(self) -> None:
        """The map of factors must be right, and they must not hold anything yet: switch 0 overwrites them.

        Collective: see :meth:`raise_together`.

        Raises:
            ValueError: On any rank the map is wrong, or a B is not 0.
        """
        error = None
        misplaced = self.find_misplaced()
        used = [run for run in self.held if run.factor == "B" and bool(run.of(run.owner).any())]
        if misplaced is not None:
            error = ValueError(
                f"the optimizer of {self.name} does not hold {self.sites[misplaced.site].name} where it is "
                "expected: use the engine's default layout, or another engine"
            )
        elif used:
            error = ValueError(
                f"the adapter at {self.sites[used[0].site].name} is not freshly initialised (B is not 0), and switch 0 "
                "would overwrite it: use LoraConfig(init_lora_weights=True) and a new adapter"
            )
        self.raise_together(error)

    def write_pairs_(self, number: int, factor: str, slots: Tensor, whole: Tensor, optimizer_reset: str) -> None:
        """Write the given slots of a whole factor to all copies this rank holds and reset their optimizer moments."""
        pair_dim = PAIR_DIM[factor]
        for run in self.held:
            if run.site != number or run.factor != factor:
                continue
            fill_pairs_(run.of(run.owner), run.start, pair_dim, slots, whole)
            state = self.optimizer.state.get(run.owner, {})
            for moment, zero in resettable_moments(state, run.owner, optimizer_reset):
                fill_pairs_(run.of(moment), run.start, pair_dim, slots, torch.full_like(whole, zero))
        self.write_parameter_(self.sites[number].factor(factor), pair_dim, slots, whole)

    def on_optimizer_step(self, hook: Callable[[list[Tensor]], None]) -> None:
        """Call ``hook`` with the tensors that are about to be stepped, their final gradients in ``.grad``."""

        def pre_hook(optimizer: Optimizer, *_: object) -> None:
            if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
                raise RuntimeError(
                    "the optimizer unscales fp16 gradients itself (fused=True with a GradScaler), so they cannot be "
                    "observed: use fused=False, or train in fp32"
                )
            hook([owner for group in optimizer.param_groups for owner in group["params"]])

        self.optimizer.register_step_pre_hook(pre_hook)

    # Collectives.

    def all_reduce_(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Sum (or ``max``) over ranks in place. Collective: one all-reduce of the tensor."""
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Copy rank 0's tensor to all in place. Collective: one broadcast of the tensor."""
        if self.distributed:
            dist.broadcast(tensor, src=0)
        return tensor

    def on_rank_0(self, task: str, work: Callable[[], T]) -> T | None:
        """Do what rank 0 alone does, files above all; None elsewhere. If it fails, every rank raises.

        Collective: see :meth:`raise_together`.

        Raises:
            ValueError: Rank 0 could not do the task.
        """
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as failure:  # whatever it is, the other ranks wait
                known = isinstance(failure, ValueError)
                error = failure if known else OSError(f"cannot {task}: {failure or type(failure).__name__}")
        self.raise_together(error)
        return result

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if any has failed, so that no rank waits for one that is gone.

        Collective: one all-reduce of 8 bytes; after a failure also the messages.

        Raises:
            ValueError: At least one rank called this with an error.
        """
        failed = torch.tensor([int(error is not None)], dtype=torch.int64, device=self.device)
        if not self.all_reduce_(failed, "max").item():
            return
        messages: list[str | None] = [str(error)]
        if self.distributed:
            messages = [None] * self.world_size
            dist.all_gather_object(messages, None if error is None else str(error))
        raise ValueError(next(message for message in messages if message is not None)) from error


def require_stepped(site: Site, is_stepped: bool) -> None:
    """Refuse an optimizer that does not train the pairs."""
    if not is_stepped:
        raise ValueError(
            f"the optimizer does not hold the LoRA parameters of {site.name}: build it from all trainable ones"
        )


def deal_by_size(sizes: list[int], num_ranks: int) -> list[int]:
    """The rank that each item goes to: largest first, each to the rank with the least so far."""
    loads = [0] * num_ranks
    ranks = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        ranks[item] = rank
        loads[rank] += sizes[item]
    return ranks
