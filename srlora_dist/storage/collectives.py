"""How ranks talk to each other: every collective that does not depend on how tensors are held."""

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
    """Stop where several processes were started and this one is in no group with others.

    Raises:
        ValueError: The environment says so; see :func:`require_connected`.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        require_connected()


class Collectives:
    """The ranks of a run, or the one process of a run without a process group.

    Args:
        device: Where what is sent has to be.
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
        """Rank 0's numbers and texts on every rank. Collective: two broadcasts."""
        things = [thing]
        if self.distributed:
            dist.broadcast_object_list(things, src=0, device=self.device)
        return things[0]

    def gather_objects(self, thing: T) -> list[T]:
        """Every rank's numbers and texts on every rank. Collective: two all-gathers."""
        things = [thing] * self.world_size
        if self.distributed:
            dist.all_gather_object(things, thing)
        return things

    def find_difference(self, digests: list[int]) -> int | None:
        """The number of the first digest that is not the same on every rank, or None.

        Collective: one all-reduce of 16 bytes a digest.
        """
        mine = torch.tensor([to_int64(digest) for digest in digests], dtype=torch.int64, device=self.device)
        # ~x falls as x rises, so the largest ~x belongs to the smallest x: both in one all-reduce.
        highest = self.all_reduce_(torch.stack([mine, ~mine]), "max")
        differs = (highest[0] != ~highest[1]).nonzero()
        return int(differs[0]) if len(differs) else None

    def gather_to_0(self, sizes: list[int], parts: list[tuple[int, int, Tensor]], is_cut: bool = True) -> list[Tensor]:
        """Whole flat tensors in float32 on the CPU of rank 0, put together from what the ranks hold; [] elsewhere.

        Args:
            sizes: Elements of each tensor, the same on every rank.
            parts: (tensor, first element, flat span) that this rank holds; over all ranks each element at most once.
            is_cut: False where rank 0 holds everything itself.

        Collective: if cut, reduces to rank 0 of 4 bytes an element in all. They are exact, -0.0 and NaN too, because
            bits are added, of which one rank's alone are not 0.
        """
        wholes: list[Tensor] = []
        for bucket in cut_into_buckets(sizes):
            packed = torch.zeros(sum(sizes[j] for j in bucket), device=self.device)
            pieces = dict(zip(bucket, packed.split([sizes[j] for j in bucket]), strict=True))
            for number, start, span in parts:
                if number in pieces and (is_cut or self.rank == 0):
                    pieces[number][start : start + span.numel()] = span
            if is_cut and self.distributed:
                dist.reduce(packed.view(torch.int32), dst=0)
            if self.rank == 0:
                wholes += [piece.cpu() for piece in pieces.values()]
        return wholes

    def scatter_from_0(self, sizes: list[int], read: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Each tensor's number and the whole of it, flat and in float32, on every rank.

        Args:
            sizes: Elements of each tensor, the same on every rank.
            read: Gives a tensor by its number; called on rank 0 alone.

        Collective: for each bucket a broadcast of 4 bytes an element, and see :meth:`raise_together`.

        Raises:
            ValueError: Rank 0 could not read a tensor, or it has another size.
        """
        for bucket in cut_into_buckets(sizes):
            packed = torch.zeros(sum(sizes[j] for j in bucket), device=self.device)
            pieces = dict(zip(bucket, packed.split([sizes[j] for j in bucket]), strict=True))

            def fill(pieces: dict[int, Tensor] = pieces) -> None:
                for number, piece in pieces.items():
                    piece.copy_(read(number).flatten())

            self.on_rank_0("read a tensor", fill)
            self.broadcast_(packed)
            yield from pieces.items()

    def on_rank_0(self, task: str, work: Callable[[], T]) -> T | None:
        """Do what rank 0 alone does, files above all; None elsewhere. If it fails, every rank raises.

        Collective: see :meth:`raise_together`.

        Raises:
            ValueError: Rank 0 could not do the task.
        """
        return self.run_on_ranks(task, work if self.rank == 0 else None)

    def run_on_ranks(self, task: str, work: Callable[[], T] | None) -> T | None:
        """Do what only some ranks do; None on the others. If it fails on one, every rank raises.

        Collective: see :meth:`raise_together`.

        Raises:
            ValueError: A rank could not do the task.
        """
        result, error = None, None
        if work is not None:
            try:
                result = work()
            except Exception as failure:  # whatever it is, the other ranks wait
                known = isinstance(failure, ValueError)
                error = failure if known else OSError(f"cannot {task}: {failure or type(failure).__name__}")
        self.raise_together(error)
        return result

    def raise_together(self, error: Exception | None, kind: type[Exception] = ValueError) -> None:
        """Raise on every rank if any has failed, so that no rank waits for one that is gone.

        Args:
            error: What went wrong on this rank, or None. The message names the rank if it is not rank 0.
            kind: What is raised, the same on every rank.

        Collective: one all-reduce of 8 bytes; after a failure also the messages.

        Raises:
            ValueError: At least one rank called this with an error; or an error of ``kind``.
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
    """Do something on every rank, and raise on all of them if it failed on any: none waits for one that is gone.

    For what happens before a :class:`~srlora_dist.storage.base.Storage` is there. ``work`` itself must not communicate.

    Collective: every rank calls it; see :meth:`Collectives.raise_together`.

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
