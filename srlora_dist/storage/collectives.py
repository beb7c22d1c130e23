"""How ranks talk to each other: the collectives that do not depend on how tensors are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from srlora_dist.layers.digest import to_int64
from srlora_dist.storage.unconnected import require_connected

T = TypeVar("T")

BUCKET_ELEMENTS = 16 << 20
"""Most elements of a bucket: large enough that few messages are sent, and small enough to fit into memory."""


def require_group() -> None:
    """Check that this process is not one of several that were started without a process group.

    Raises:
        ValueError: The environment shows that it is; see :func:`require_connected`.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        require_connected()


class Collectives:
    """The ranks of a run. Without a process group there is one rank, and nothing is sent.

    Args:
        device: Where tensors must be to be sent.
    """

    def __init__(self, device: torch.device) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.device = device

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

    def rank_0_says(self, answer: bool) -> bool:
        """Rank 0's answer on every rank. Collective: one broadcast of 8 bytes."""
        return bool(self.broadcast_(torch.tensor([int(answer)], dtype=torch.int64, device=self.device)).item())

    def broadcast_object(self, thing: T | None) -> T:
        """Rank 0's object, of numbers and texts, on every rank. Collective: two broadcasts."""
        things = [thing]
        if self.distributed:
            dist.broadcast_object_list(things, src=0, device=self.device)
        return things[0]

    def gather_objects(self, thing: T) -> list[T]:
        """The objects of all ranks, of numbers and texts, on every rank. Collective: two all-gathers."""
        things = [thing] * self.world_size
        if self.distributed:
            dist.all_gather_object(things, thing)
        return things

    def find_difference(self, digests: list[int]) -> int | None:
        """Index of the first digest that is not the same on every rank, or None.

        Collective: one all-reduce of 16 bytes per digest.
        """
        mine = torch.tensor([to_int64(digest) for digest in digests], dtype=torch.int64, device=self.device)
        # ~x falls as x rises, so the largest ~x belongs to the smallest x: both in one all-reduce.
        highest = self.all_reduce_(torch.stack([mine, ~mine]), "max")
        differs = (highest[0] != ~highest[1]).nonzero()
        return int(differs[0]) if len(differs) else None

    def gather_to_0(self, sizes: list[int], parts: list[tuple[int, int, Tensor]], is_cut: bool = True) -> list[Tensor]:
        """Whole flat tensors in float32 on the CPU of rank 0, put together from spans; [] on the other ranks.

        Args:
            sizes: Elements of each tensor, the same on every rank.
            parts: This rank's spans, each as (index of the tensor, offset, flat span). No element may be in the spans
                of two ranks.
            is_cut: False if rank 0 holds everything itself.

        Collective: if cut, one reduce to rank 0 per bucket, in all 4 bytes per element. The result is exact, even for
            -0.0 and NaN: bit patterns are added, and only one rank's are not 0.
        """
        wholes: list[Tensor] = []
        for bucket in cut_into_buckets(sizes):
            packed = torch.zeros(sum(sizes[j] for j in bucket), device=self.device)
            tensors = dict(zip(bucket, packed.split([sizes[j] for j in bucket]), strict=True))
            for index, start, span in parts:
                if index in tensors and (is_cut or self.rank == 0):
                    tensors[index][start : start + span.numel()] = span
            if is_cut and self.distributed:
                dist.reduce(packed.view(torch.int32), dst=0)
            if self.rank == 0:
                wholes += [tensor.cpu() for tensor in tensors.values()]
        return wholes

    def scatter_from_0(self, sizes: list[int], read: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The index of each tensor and the whole tensor, flat and in float32, on every rank.

        Args:
            sizes: Elements of each tensor, the same on every rank.
            read: Returns a tensor by its index; called on rank 0 only.

        Collective: one broadcast per bucket, 4 bytes per element, and see :meth:`raise_together`.

        Raises:
            ValueError: Rank 0 could not read a tensor, or it has another size.
        """
        for bucket in cut_into_buckets(sizes):
            packed = torch.zeros(sum(sizes[j] for j in bucket), device=self.device)
            tensors = dict(zip(bucket, packed.split([sizes[j] for j in bucket]), strict=True))

            def fill(tensors: dict[int, Tensor] = tensors) -> None:
                for index, tensor in tensors.items():
                    tensor.copy_(read(index).flatten())

            self.on_rank_0("read a tensor", fill)
            self.broadcast_(packed)
            yield from tensors.items()

    def on_rank_0(self, task: str, work: Callable[[], T]) -> T | None:
        """Do work on rank 0 only, such as writing files; None on the other ranks. If it fails, every rank raises.

        Collective: see :meth:`raise_together`.

        Raises:
            ValueError: Rank 0 could not do the task.
        """
        return self.run_on_ranks(task, work if self.rank == 0 else None)

    def run_on_ranks(self, task: str, work: Callable[[], T] | None) -> T | None:
        """Do work on some ranks only; None on the others. If it fails on one of them, every rank raises.

        Args:
            task: Names the work in the message of an error.
            work: The work of this rank, or None.

        Collective: see :meth:`raise_together`.

        Raises:
            ValueError: A rank could not do the task.
        """
        result, error = None, None
        if work is not None:
            try:
                result = work()
            except Exception as failure:  # the other ranks wait, whatever it is
                known = isinstance(failure, ValueError)
                error = failure if known else OSError(f"cannot {task}: {failure or type(failure).__name__}")
        self.raise_together(error)
        return result

    def raise_together(self, error: Exception | None, kind: type[Exception] = ValueError) -> None:
        """Raise on every rank if any has failed, so that no rank waits for one that has ended.

        Args:
            error: The error of this rank, or None. The message names the rank if it is not rank 0.
            kind: Type of the error that every rank raises.

        Collective: one all-reduce of 8 bytes; after a failure also the messages.

        Raises:
            ValueError: At least one rank called this with an error; another ``kind`` raises that type.
        """
        failed = torch.tensor([int(error is not None)], dtype=torch.int64, device=self.device)
        if not self.all_reduce_(failed, "max").item():
            return
        messages = self.gather_objects(None if error is None else str(error))
        rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
        raise kind(message + (f" (on rank {rank} of {self.world_size})" if rank else "")) from error


def cut_into_buckets(sizes: list[int]) -> Iterator[list[int]]:
    """Group things that are sent together: indices in order, in buckets of at most ``BUCKET_ELEMENTS`` or of one thing.

    Args:
        sizes: Elements of each thing.
    """
    bucket, total = [], 0
    for index, size in enumerate(sizes):
        if bucket and total + size > BUCKET_ELEMENTS:
            yield bucket
            bucket, total = [], 0
        bucket.append(index)
        total += size
    if bucket:
        yield bucket


def run_together(work: Callable[[], T]) -> T:
    """Do work on every rank, and raise on all of them if it failed on any, so that no rank waits in vain.

    For use before there is a :class:`~srlora_dist.storage.base.Storage`. ``work`` itself must not communicate.

    Collective: every rank must call it; see :meth:`Collectives.raise_together`.

    Raises:
        ValueError: ``work`` raised ValueError or OSError on a rank.
    """
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as failure:
        error = failure
    Collectives(PartialState().device).raise_together(error)
    return result
