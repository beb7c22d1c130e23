"""A 64-bit digest of numbers that does not depend on how a matrix is cut into runs.

Each element's bits are multiplied by an odd number made from its position and the products are added modulo 2^64. An
odd factor can be undone, so a change of any one element changes the digest; the digests of a matrix's runs add up to
the digest of the matrix. It finds damage and divergence; it is no protection against a forger.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = -7046029254386353130  # twice an odd number: position * _STEP + 1 is odd, and no two positions share it
_CHUNK = 1 << 22


def digest_run(run: Tensor, start: int = 0) -> int:
    """Digest of a run that starts at an element offset, in [0, 2^64).

    Args:
        run: Any dtype of 1, 2, 4 or 8 bytes an element; read in row-major order.
        start: Offset of its first element in the whole.
    """
    bits = run.detach().contiguous().flatten()
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = 0
    for begin in range(0, bits.numel(), _CHUNK):
        piece = bits[begin : begin + _CHUNK].long()
        odd = torch.arange(start + begin, start + begin + piece.numel(), device=piece.device).mul_(_STEP).add_(1)
        total += int(piece.mul_(odd).sum())
    return total % 2**64


def combine(*digests: int) -> int:
    """One digest of several, in order."""
    total = 0
    for digest in digests:
        total = (total * 6364136223846793005 + digest + 1442695040888963407) % 2**64
    return total


def to_int64(digest: int) -> int:
    """The same 64 bits as a signed number, for a tensor."""
    return digest - 2**64 if digest >= 2**63 else digest
