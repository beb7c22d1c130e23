"""The algebra on spans: add a sum of rank-1 pairs to a run of a matrix, sum and fill a run by pair.

Every storage gives a rank one contiguous run of the row-major flattened matrix, so fusing, scoring and resetting are
written once, here, for a run; the whole matrix is the run that starts at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Multiply float32 in float32, whatever faster precision the training allows itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@exact_matmul()
def add_pairs_(run: Tensor, start: int, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add ``scale * left @ right`` to a run of an (m, n) matrix: one GEMM for its whole rows, one short product an end.

    Args:
        run: 1-D contiguous, the elements ``start`` to ``start + run.numel()`` of the row-major flattened matrix.
        start: Offset of the run in the flattened matrix, in elements.
        left: Columns, (m, k).
        right: Rows, (k, n).
        scale: Factor of the product.
    """
    num_columns = right.shape[1]
    stop = start + run.numel()
    if right.shape[0] == 0 or run.numel() == 0:
        return
    first_whole, last_whole = -(-start // num_columns), stop // num_columns
    if first_whole > last_whole:  # the run lies inside one row
        row = start // num_columns
        part = right[:, start - row * num_columns : stop - row * num_columns]
        run.addmv_(part.T, left[row], alpha=scale)
        return
    num_head = first_whole * num_columns - start
    num_whole = (last_whole - first_whole) * num_columns
    if num_head:
        run[:num_head].addmv_(right[:, -num_head:].T, left[first_whole - 1], alpha=scale)
    if num_whole:
        rows = run[num_head : num_head + num_whole].view(-1, num_columns)
        rows.addmm_(left[first_whole:last_whole], right, alpha=scale)
    num_tail = run.numel() - num_head - num_whole
    if num_tail:
        run[num_head + num_whole :].addmv_(right[:, :num_tail].T, left[last_whole], alpha=scale)


def mean_by_pair(run: Tensor, start: int, shape: torch.Size, pair_dim: int) -> Tensor:
    """This run's part of the mean over each pair's elements (Eq. 7); the parts of all runs add up to the mean.

    Args:
        run: 1-D, a run of a factor of ``shape``.
        start: Offset of the run in the flattened factor.
        shape: Of the whole factor: (r, n) for A, (m, r) for B.
        pair_dim: The dimension that counts pairs: 0 for A, 1 for B.

    Returns:
        (r,) in float64, so that the way a factor is cut hardly matters.
    """
    whole = torch.zeros(shape.numel(), dtype=torch.float64, device=run.device)
    whole[start : start + run.numel()] = run
    return whole.view(shape).mean(1 - pair_dim)


def fill_pairs_(run: Tensor, start: int, pair_dim: int, slots: Tensor, whole: Tensor) -> None:
    """Copy the given pairs of a whole factor into a run of it; the other pairs are left alone.

    Args:
        run: 1-D, a run of the factor (or of an optimizer moment of it).
        start: Offset of the run in the flattened factor.
        pair_dim: The dimension that counts pairs: 0 for A, 1 for B.
        slots: (k,) int64, the pairs to fill.
        whole: The factor to copy from, (r, n) for A, (m, r) for B; any device.
    """
    chosen = torch.zeros(whole.shape[pair_dim], dtype=torch.bool)
    chosen[slots] = True
    mask = chosen.unsqueeze(1 - pair_dim).expand(whole.shape).flatten()[start : start + run.numel()].to(run.device)
    source = whole.flatten()[start : start + run.numel()]
    run[mask] = source.to(run.device, run.dtype)[mask]
