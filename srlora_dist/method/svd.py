"""Computes the first singular triplets of a matrix by a block Krylov iteration that bounds its own error.

After Musco and Musco, "Randomized Block Krylov Methods" (arXiv 1504.05477), done as a Lanczos process on W'W with full
re-orthogonalisation. Power iterations (``torch.svd_lowrank``) use only their last block. They need many times as many
products where the singular values fall slowly, as those of weights do.
"""

from __future__ import annotations

import math

import scipy.linalg
import torch
from torch import Tensor

from srlora_dist.layers.matmul import exact_matmul

# Measured on the flattest weights, Gaussian ones: the fraction of the shorter side that may be asked for, by that side.
LARGEST_SHARE = {2048: 1 / 16, 1024: 1 / 32}
OBLONG = 3  # beyond that aspect a Gaussian weight is flatter still, and half as many may be asked for
LARGEST_BASIS = 0.45  # of the shorter side; beyond, the full decomposition is as fast
HOPELESS = 0.3  # of the shorter side: where so large a basis bounds nothing yet, the largest will not do
BLOCK = 16  # columns per step: fewer keep the basis small, but make the products slow
LEAK = 7e-3  # largest bound accepted on the sine; values are right to about its square
RESOLUTION = 1e-5  # of the largest value: float32 turns directions whose values lie closer
SMALLEST = 1e-7  # square of a value over that of the largest: below, the rounding of W'W reaches the vectors
GROWTH = 1.4  # of the basis between two checks, at most
MAX_PASSES = 8  # of re-orthogonalisation: one as a rule, up to four were seen where the space is exhausted


def is_worth_it(shape: tuple[int, int], count: int) -> bool:
    """Whether :func:`find_triplets` takes less time than the full decomposition, for all but contrived spectra."""
    if max(shape) > OBLONG * min(shape):
        count *= 2
    return any(min(shape) >= side and count <= min(shape) * share for side, share in LARGEST_SHARE.items())


@exact_matmul()
def find_triplets(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first ``count`` singular triplets: U (m, count), S (count,) falling, Vt (count, n); signs are arbitrary.

    The same weight gives the same bits. A value is right to 1e-5 relative, or to float32's rounding of the largest. The
    sine of the largest angle to the true subspaces is below 1e-2, except where the value after the last is so close
    that float32 does not define them: the triplets are then right, the choice among them is arbitrary.

    Args:
        weight: (m, n), float32, finite.
        count: Number of triplets.

    Returns:
        None where that takes too large a basis, as the values fall too slowly or one is repeated BLOCK times, and where
        they fall by so much that products with W'W lose the last ones.
    """
    if weight.shape[0] < weight.shape[1]:
        turned = find_triplets(weight.T, count)
        return turned and (turned[2].T, turned[1], turned[0].T)
    largest = float(weight.abs().max())
    if largest and not 1e-9 < largest < 1e9:
        return None  # squares would leave the range of float32
    weight = weight.contiguous()
    right = _iterate(weight, count)
    if right is None:
        return None
    # One more product each way: it takes out what rounding left of the far directions in steep spectra.
    left = torch.linalg.qr(weight @ right).Q
    right, upper = torch.linalg.qr(weight.T @ left)
    turn_right, values, turn_left = torch.linalg.svd(upper)
    return left @ turn_left.T, values, (right @ turn_right).T


def _iterate(weight: Tensor, count: int) -> Tensor | None:
    """Orthonormal (n, count) that spans the first right singular vectors, m >= n; None where it is not found."""
    side = weight.shape[1]
    basis = _Basis(weight, int(LARGEST_BASIS * side))
    due, before, precision = count + 4 * BLOCK, None, torch.float64
    while count + BLOCK <= basis.limit and basis.has_room():
        basis.grow_()
        if basis.size < due and basis.has_room():
            continue
        squares, vectors, residuals = basis.solve(precision)
        leak = _bound_leak(squares, residuals, count)
        is_hiding, is_repeated = _find_copies(squares, residuals, count)
        if is_repeated or leak > 1 and basis.size > HOPELESS * side:
            return None
        if leak <= LEAK and squares[count - 1] < SMALLEST * squares[0]:
            return None
        if leak <= LEAK and not is_hiding:
            return basis.right[:, : basis.size] @ vectors[:, :count].to(weight.dtype)
        due, before = _next_check(basis.size, leak, before), (basis.size, leak)
        # Squares need float64 where they span many orders of magnitude; elsewhere float32 takes half the time.
        precision = torch.float32 if squares[count - 1] > 0.01 * squares[0] else torch.float64
    return None


class _Basis:
    """Orthonormal V (n, p) of the Krylov space, with the lower half of T = V'W'W V (p, p); it grows block by block.

    T is block tridiagonal but for rounding, so only the last block of W V is kept.
    """

    def __init__(self, weight: Tensor, limit: int) -> None:
        self.weight, self.turned = weight, weight.T.contiguous()  # a product with the view takes twice as long
        self.limit, self.size = limit, 0
        self.right = weight.new_empty(weight.shape[1], limit)
        self.image = None  # of the last block
        self.core = torch.zeros(limit, limit, dtype=torch.float64, device=weight.device)
        start = torch.randn(weight.shape[1], BLOCK, generator=torch.Generator().manual_seed(0))  # same on every device
        self.next, self.factor = torch.linalg.qr(start.to(weight))

    def has_room(self) -> bool:
        return self.size + BLOCK <= self.limit

    def grow_(self) -> None:
        """Add the next block, and make the one after it."""
        old, new = self.size, self.size + BLOCK
        self.right[:, old:new] = self.next
        image = self.weight @ self.next
        self.core[old:new, old:new] = image.T @ image
        if old:
            self.core[old:new, old - BLOCK : old] = image.T @ self.image
        self.image, self.size = image, new
        # The last two blocks hold all that is not rounding, so one more pass over the whole basis does, unless the
        # space is exhausted: then what remains is rounding, itself to be cleaned until a pass takes little away.
        self.next, self.factor = torch.linalg.qr(self._remove(self.turned @ image, max(0, old - BLOCK)))
        for _ in range(MAX_PASSES):
            self.next, kept = torch.linalg.qr(self._remove(self.next))
            self.factor = kept @ self.factor
            if kept.diagonal().abs().min() > 0.5:
                break

    def solve(self, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Squared Ritz values (p,) falling, their vectors (p, p) in the basis, norms of W'W v - s^2 v (p,)."""
        squares, vectors = torch.linalg.eigh(self.core[: self.size, : self.size].to(precision))
        squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
        return squares, vectors, (self.factor.to(precision) @ vectors[-BLOCK:]).norm(dim=0)

    def _remove(self, block: Tensor, first: int = 0) -> Tensor:
        """Minus its part in the basis from column ``first`` on."""
        basis = self.right[:, first : self.size]
        return block - basis @ (basis.T @ block)


def _bound_leak(squares: Tensor, residuals: Tensor, count: int) -> float:
    """Bound, to first order, on the sine of the largest angle between the first Ritz vectors and the true ones.

    For a true vector v of W'W with value t and a Ritz vector x with value s and residual r: (s - t) v'x = v'r. As r is
    orthogonal to the basis, |v'r| <= |r| d where d is the distance of v from the basis. For those just after the asked
    ones it is about the residual of their own Ritz vector over its gap; for all further ones together d <= 1.
    """
    scale = squares[0].clamp_min(1e-30)
    squares, residuals = squares / scale, residuals / scale
    end = min(2 * count, len(squares) - 1)
    head, near, last = squares[:count, None], squares[count:end], squares[end]
    distance = (residuals[count:end] / (near - last).clamp_min(1e-30)).clamp_max(1)
    floor = RESOLUTION * head.sqrt().clamp_min(RESOLUTION)  # of the gaps that float32 resolves
    leaks = torch.cat([distance / (head - near).clamp_min(floor), 1 / (head - last).clamp_min(floor)], 1)
    is_defined = squares[:count] > RESOLUTION**2
    return float((residuals[:count, None] * leaks)[is_defined].norm())


def _find_copies(squares: Tensor, residuals: Tensor, count: int) -> tuple[bool, bool]:
    """Whether BLOCK values lie closer than their errors, and whether they are equal as far as float32 tells.

    A Krylov space holds BLOCK copies of a repeated value at most, and nothing but their number shows that it has more.
    """
    values = squares.sqrt() / squares[0].sqrt().clamp_min(1e-30)
    num_windows = min(count, len(values) - BLOCK + 1)
    errors = residuals[:num_windows] / (squares[:num_windows] * squares[0]).sqrt().clamp_min(1e-30)
    spread = values[:num_windows] - values[BLOCK - 1 :][:num_windows]
    is_defined = values[:num_windows] > RESOLUTION
    is_repeated = is_defined & (spread < RESOLUTION) & (errors < RESOLUTION)
    return bool((is_defined & (spread < 4 * errors)).any()), bool(is_repeated.any())


def _next_check(size: int, leak: float, before: tuple[int, float] | None) -> float:
    """Size of the basis at which the leak falls below LEAK if it goes on as since the last check."""
    if before is None or leak >= before[1]:
        return GROWTH * size
    per_column = math.log(before[1] / leak) / (size - before[0])
    return min(GROWTH * size, size + math.log(leak / LEAK) / per_column / 1.5)


Triplet = tuple[Tensor, Tensor, Tensor]
"""Singular values with their vectors: U (m, k), S (k,), Vt (k, n)."""


@exact_matmul()
def compute_directions(weight: Tensor, count: int) -> Triplet:
    """The first ``count`` singular triplets: U (m, count), S (count,) falling, Vt (count, n), of the weight's dtype.

    The largest entry of each column of U is positive, so that the signs do not depend on the driver. Where
    :func:`find_triplets` does not pay or gives up, the full decomposition is taken. Where its driver fails to converge,
    LAPACK's slower ``gesvd`` is taken, in float64.

    Raises:
        ArithmeticError: The weight holds NaN or inf, or both drivers failed.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ArithmeticError("the weight holds NaN or inf, check the model's files")
    triplets = None
    try:
        if weight.dtype == torch.float32 and is_worth_it(weight.shape, count):
            triplets = find_triplets(weight, count)
        if triplets is None:
            triplets = torch.linalg.svd(weight, full_matrices=False)
    except torch.linalg.LinAlgError:
        triplets = _svd_in_float64(weight)
    left, values, right = triplets
    left, values, right = left[:, :count], values[:count], right[:count]
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return (left * sign).contiguous(), values.contiguous(), (right * sign.T).contiguous()


def _svd_in_float64(weight: Tensor) -> Triplet:
    try:
        triplet = scipy.linalg.svd(weight.double().cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    except scipy.linalg.LinAlgError as error:
        raise ArithmeticError("the singular value decomposition converges neither with gesdd nor with gesvd") from error
    return tuple(torch.from_numpy(part).to(weight.device, weight.dtype) for part in triplet)
