"""What a storage must offer, and the collectives: the seam between the method and the way tensors are held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from srlora_dist.pairs import add_pairs_, fill_pairs_
from srlora_dist.sites import PAIR_DIM, Site

T = TypeVar("T")
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


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
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class Storage(ABC):
    """How the ranks hold the weights, factors, gradients and moments of the sites.

    Attributes:
        name: ``plain``, ``ddp``, ``zero1``, ``zero2`` or ``zero3``.
        optimizer: The innermost torch optimizer, the one place that sees the gradients that are applied.
        held: The runs of factors that this rank's optimizer steps.
        tracked: Those of them that this rank keeps statistics of; over all ranks each element is tracked once.
    """

    name: str

    def __init__(self, optimizer: Optimizer, sites: list[Site]) -> None:
        self.optimizer = optimizer
        self.sites = sites
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.device = sites[0].lora_a.device
        self.held: list[Run] = []
        self.tracked: list[Run] = []

    # How weights are held: each kind answers these.

    @abstractmethod
    def weight_run(self, number: int) -> tuple[Tensor, int]:
        """The run of W of a site that this rank answers for, and its offset: over all ranks each element once."""

    @abstractmethod
    def gather_weight(self, number: int) -> Tensor | None:
        """W of a site, (m, n), on rank 0 and None elsewhere.

        Collective: every rank must call it; what is sent depends on the storage.
        """

    @abstractmethod
    def gather_parameters(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Whole trainable parameters on every rank; a result may be the live tensor, so it is not to be written.

        Collective: every rank must call it with the same parameters; what is sent depends on the storage.
        """

    def edit_weight_(self, number: int, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``, (m, k) times (k, n), to what this rank holds of a site's W; nothing is sent."""
        add_pairs_(self.sites[number].weight.detach().view(-1), 0, left, right)

    def write_copies_(self, number: int, factor: str, slots: Tensor, whole: Tensor) -> None:  # noqa: B027 (a default)
        """Write pairs of a factor to the copies beside the one that the optimizer steps; here there are none."""

    def model_run(self, run: Run) -> Tensor:
        """The same span in the copy that the model computes with, a view."""
        return self.sites[run.site].factor(run.factor).detach().view(-1)[run.start : run.start + run.numel]

    # The same for every kind, in terms of the runs.

    def find_misplaced(self) -> Run | None:
        """A run whose owner does not hold what the model computes with: then the map of this rank is wrong."""
        return next((run for run in self.held if not torch.equal(run.of(run.owner), self.model_run(run))), None)

    def write_pairs_(self, number: int, factor: str, slots: Tensor, whole: Tensor, optimizer_reset: str) -> None:
        """Write the given slots of a whole factor to all copies this rank holds and reset their optimizer moments."""
        for run in self.held:
            if run.site != number or run.factor != factor:
                continue
            fill_pairs_(run.of(run.owner), run.start, PAIR_DIM[factor], slots, whole)
            if optimizer_reset == "keep":
                continue
            for key, moment in self.optimizer.state.get(run.owner, {}).items():
                is_moment = torch.is_tensor(moment) and moment.shape == run.owner.shape
                if is_moment and (optimizer_reset == "zero" or key in FIRST_MOMENTS):
                    fill_pairs_(run.of(moment), run.start, PAIR_DIM[factor], slots, torch.zeros_like(whole))
        self.write_copies_(number, factor, slots, whole)

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
