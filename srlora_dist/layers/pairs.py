"""Does the algebra on spans: adds a sum of rank-1 pairs to a span of a matrix, and averages or fills a span by pair.

Every storage gives a rank one contiguous span of the row-major flattened matrix, so fusing, scoring and resetting are
written once, here, for a span; the whole matrix is the span that starts at 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from srlora_dist.layers.matmul import exact_matmul


@exact_matmul()
def add_pairs_(span: Tensor, start: int, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add ``scale * left @ right`` to a span of an (m, n) matrix: one GEMM for whole rows, one short product per end.

    Args:
        span: 1-D contiguous float32, the elements ``start`` to ``start + span.numel()`` of the flattened matrix, row by
            row.
        start: Offset of the span in the flattened matrix, in elements.
        left: Columns, (m, k).
        right: Rows, (k, n).
        scale: Factor of the product.
    """
    num_columns = right.shape[1]
    stop = start + span.numel()
    if right.shape[0] == 0 or span.numel() == 0:
        return
    first_whole, last_whole = -(-start // num_columns), stop // num_columns
    if first_whole > last_whole:  # the span lies inside one row
        row = start // num_columns
        part = right[:, start - row * num_columns : stop - row * num_columns]
        span.addmv_(part.T, left[row], alpha=scale)
        return
    num_head = first_whole * num_columns - start
    num_whole = (last_whole - first_whole) * num_columns
    if num_head:
        span[:num_head].addmv_(right[:, -num_head:].T, left[first_whole - 1], alpha=scale)
    if num_whole:
        rows = span[num_head : num_head + num_whole].view(-1, num_columns)
        rows.addmm_(left[first_whole:last_whole], right, alpha=scale)
    num_tail = span.numel() - num_head - num_whole
    if num_tail:
        span[num_head + num_whole :].addmv_(right[:, :num_tail].T, left[last_whole], alpha=scale)


SUM_CHUNK = {"cpu": 1 << 20, "other": 1 << 24}
"""Elements that are widened to float32 at a time: on a CPU few enough for its cache."""


def add_pairs_to_sum_(high: Tensor, low: Tensor, start: int, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add ``scale * left @ right`` to a span of an (m, n) matrix that is kept as the sum of two 16-bit terms.

    Afterwards ``high`` is the sum rounded to 16 bits, and ``low`` is what that rounding lost. Later additions start
    from the sum and not from its rounding, so the error does not grow with their number.

    Args:
        high: 1-D contiguous, the span as the model computes with it.
        low: 1-D contiguous, the part that rounding lost, of the same length; may lie in host memory.
        start: Offset of the span in the flattened matrix, in elements.
        left: Columns, (m, k).
        right: Rows, (k, n).
        scale: Factor of the product.
    """
    chunk = SUM_CHUNK.get(high.device.type, SUM_CHUNK["other"])
    for begin in range(0, high.numel(), chunk):
        high_part, low_part = (term[begin : begin + chunk] for term in (high, low))
        total = high_part.float() + low_part.to(high.device).float()
        add_pairs_(total, start + begin, left, right, scale)
        high_part.copy_(total)
        low_part.copy_(total.sub_(high_part))


def mean_by_pair(span: Tensor, start: int, shape: torch.Size, pair_dim: int) -> Tensor:
    """This span's part of the mean over each pair's elements (Eq. 7); the parts of all spans add up to the mean.

    Args:
        span: 1-D, a span of a factor of ``shape``.
        start: Offset of the span in the flattened factor.
        shape: Shape of the whole factor: (r, n) for A, (m, r) for B.
        pair_dim: The dimension that counts pairs: 0 for A, 1 for B.

    Returns:
        (r,) in float64, so that the way a factor is cut hardly matters.
    """
    whole = torch.zeros(shape.numel(), dtype=torch.float64, device=span.device)
    whole[start : start + span.numel()] = span
    return whole.view(shape).mean(1 - pair_dim)


def fill_pairs_(span: Tensor, start: int, pair_dim: int, slots: Tensor, whole: Tensor) -> None:
    """Copy the given pairs of a whole factor into a span of it; the other pairs are left alone.

    Args:
        span: 1-D, a span of the factor or of one of its optimizer moments.
        start: Offset of the span in the flattened factor.
        pair_dim: The dimension that counts pairs: 0 for A, 1 for B.
        slots: (k,) int64, the pairs to fill.
        whole: The factor to copy from, (r, n) for A, (m, r) for B; any device.
    """
    at = places_of_pairs(start, span.numel(), whole.shape, pair_dim, slots)
    source = whole.flatten()[(at + start).to(whole.device)]
    span.index_copy_(0, at.to(span.device), source.to(span.device, span.dtype))


def places_of_pairs(start: int, numel: int, shape: torch.Size, pair_dim: int, slots: Tensor) -> Tensor:
    """Offsets of the given pairs' elements in a span of a factor; found on the CPU, so that no device is waited for.

    Args:
        start: Offset of the span in the flattened factor.
        numel: Length of the span.
        shape: Shape of the whole factor: (r, n) for A, (m, r) for B.
        pair_dim: The dimension that counts pairs: 0 for A, 1 for B.
        slots: (k,) int64 on the CPU, the pairs.

    Returns:
        Offsets in the span, int64 on the CPU, each once.
    """
    others = torch.arange(shape[1 - pair_dim])
    rows, columns = (slots, others) if pair_dim == 0 else (others, slots)
    at = (rows[:, None] * shape[1] + (columns - start)).flatten()
    return at if numel == shape.numel() else at[(at >= 0) & (at < numel)]


def truncate_pairs(
    left: Tensor, right: Tensor, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, float]:
    """The best ``left @ right`` of a smaller rank, from QR factors and the SVD of their core, computed in float64.

    Args:
        left: Columns, (m, k).
        right: Rows, (k, n).
        rank: Pairs to keep.
        dtype: Type of the result.

    Returns:
        Columns (m, rank), rows (rank, n), and the relative error of their product. Where the product cannot have that
        rank the last pairs are 0.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = s[:rank].sqrt()
    missing = max(0, rank - len(root))
    pad = torch.nn.functional.pad
    new_left = pad(q_left @ (u[:, :rank] * root), (0, missing)).to(dtype)
    new_right = pad((root[:, None] * vt[:rank]) @ q_right.T, (0, 0, 0, missing)).to(dtype)
    lost = _norm_of_product(torch.cat([left, -new_left], 1), torch.cat([right, new_right], 0))
    size = float(s.norm())
    return new_left, new_right, lost / size if size else 0.0


def _norm_of_product(left: Tensor, right: Tensor) -> float:
    """Frobenius norm in float64, without forming the product."""
    r_left, r_right = (torch.linalg.qr(matrix.double(), mode="r").R for matrix in (left, right.T))
    return float((r_left @ r_right.T).norm())


def replay_pairs(entries: Iterable[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """What a second adapter of this rank holds after these (left, right) were appended one after the other."""
    held: tuple[Tensor, Tensor] | None = None
    for left, right in entries:
        if held is not None:
            left, right = torch.cat([held[0], left], 1), torch.cat([held[1], right], 0)
            if left.shape[1] > rank:
                left, right, _ = truncate_pairs(left, right, rank, left.dtype)
        held = left, right
    return held
