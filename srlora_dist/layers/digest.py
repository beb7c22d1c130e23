"""Computes a 64-bit digest of numbers that does not depend on how a matrix is cut into spans.

Each element's bits are multiplied by an odd number made from its position and the products are added modulo 2^64. An
odd factor can be undone, so a change of any one element of up to 4 bytes changes the digest; the digests of a matrix's
spans add up to the digest of the matrix. It finds damage and divergence; it is no protection against a forger.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_STEP = -7046029254386353130  # twice an odd number: position * _STEP + 1 is odd, and no two positions share it
_CHUNK = 1 << 20
_ROW = 1 << 10  # sums over so many products of 32-bit numbers with positions in the row are exact in float64


def digest_span(span: Tensor, start: int = 0) -> int:
    """Digest of a span that starts at an element offset, in [0, 2^64).

    Args:
        span: Tensor of 1, 2, 4 or 8 bytes per element, read in row-major order; 8 bytes are read as two halves.
        start: Offset of its first element in the whole.
    """
    bits = span.detach().contiguous().flatten()
    start *= max(1, bits.element_size() // 4)
    bits = bits.view({1: torch.int8, 2: torch.int16}.get(bits.element_size(), torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for begin in range(0, bits.numel(), _CHUNK):
        piece = bits[begin : begin + _CHUNK]
        cut = piece.numel() - piece.numel() % _ROW
        for rows, first in ((piece[:cut].view(-1, _ROW), 0), (piece[cut:].view(1, -1), cut)):
            if rows.numel():
                total += _digest_rows(rows, start + begin + first)
    return int(total) % 2**64


def _digest_rows(rows: Tensor, start: int) -> Tensor:
    """Digest of a matrix (h, w) of integers, w up to ``_ROW``: one GEMM gives both sums of a row, in float64."""
    height, width = rows.shape
    weighted, plain = (rows.double() @ _weights(rows.device)[:width]).long().unbind(1)
    offsets = torch.arange(start, start + height * width, width, device=rows.device)
    return ((offsets * plain + weighted) * _STEP + plain).sum()


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """For each position in a row the position itself and 1, shape (``_ROW``, 2)."""
    positions = torch.arange(_ROW, dtype=torch.float64, device=device)
    return torch.stack([positions, torch.ones_like(positions)], 1)


def combine(*digests: int) -> int:
    """One digest of several, in order."""
    total = 0
    for digest in digests:
        total = (total * 6364136223846793005 + digest + 1442695040888963407) % 2**64
    return total


def to_int64(digest: int) -> int:
    """Read the 64 bits of a digest as a signed number, which a tensor can hold."""
    return digest - 2**64 if digest >= 2**63 else digest
