"""The block Krylov iteration against the full decomposition in float64, and when it gives up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import srlora_dist.method.directions
import srlora_dist.method.svd
from srlora_dist.method.svd import compute_directions, find_triplets, is_worth_it

COUNT = 12
SIZE = 400
INDEX = torch.arange(1, SIZE + 1, dtype=torch.float64)
SPECTRA = {
    "slow": INDEX**-0.3,
    "slower": INDEX**-0.1,
    "steep": INDEX**-2,
    "steepest": torch.exp(-INDEX / 3),
    "pairs": (INDEX / 2).ceil() ** -0.3,  # COUNT ends between two of them
    "close": torch.where(INDEX <= 8, 1 + 1e-4 * INDEX.flip(0), 0.8 * INDEX**-0.3),
}


def random_basis(size: int, count: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, count, dtype=torch.float64)).Q


def with_values(values: Tensor, shape: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    torch.manual_seed(1)
    return ((random_basis(shape[0], len(values)) * values) @ random_basis(shape[1], len(values)).T).float()


def assert_triplets(weight: Tensor, triplets: tuple[Tensor, Tensor, Tensor]) -> None:
    """Right values, orthonormal vectors, small residuals: what holds even where the subspace is not defined."""
    left, values, right = triplets
    expected = torch.linalg.svdvals(weight.double())
    count, largest = len(values), float(expected[0])
    torch.testing.assert_close(values.double(), expected[:count], rtol=1e-5, atol=1e-6 * largest)
    for vectors in (left.T, right):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(count), rtol=0, atol=1e-5)
    errors = (weight @ right.T - left * values, weight.T @ left - right.T * values)
    assert max(float(error.norm(dim=0).max()) for error in errors) <= 3e-3 * largest


def assert_subspaces(weight: Tensor, triplets: tuple[Tensor, Tensor, Tensor]) -> None:
    left, values, right = triplets
    expected = torch.linalg.svd(weight.double(), full_matrices=False)
    count = len(values)
    for found, true in ((left, expected[0][:, :count]), (right.T, expected[2][:count].T)):
        outside = found.double() - true @ (true.T @ found.double())
        assert torch.linalg.matrix_norm(outside, 2) < 1e-2


@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_agree_with_the_full_decomposition(name: str) -> None:
    weight = with_values(SPECTRA[name])
    triplets = find_triplets(weight, COUNT)
    assert_triplets(weight, triplets)
    assert_subspaces(weight, triplets)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("shape", [(600, 600), (700, 560), (560, 700)])
def test_gaussian_weights_of_any_shape_and_scale_agree(shape: tuple[int, int], scale: float) -> None:
    torch.manual_seed(2)
    weight = scale * torch.randn(shape)
    triplets = find_triplets(weight, 8)
    assert_triplets(weight, triplets)
    assert_subspaces(weight, triplets)


@pytest.mark.parametrize("rank", [0, 30])
def test_a_weight_of_lower_rank_is_no_special_case(rank: int) -> None:
    weight = with_values(SPECTRA["slow"][:rank])
    assert_triplets(weight, find_triplets(weight, 20))


TOO_STEEP = {
    "rank 5": SPECTRA["slow"][:5],
    "a decade every 6 values": 10 ** (-INDEX / 6),
    "an outlier": torch.cat([torch.tensor([3000.0]), INDEX[:-1] ** -0.5]).double(),
}


@pytest.mark.parametrize("name", TOO_STEEP)
def test_values_that_are_lost_in_squares_are_left_to_the_full_decomposition(name: str) -> None:
    assert find_triplets(with_values(TOO_STEEP[name]), 24) is None


def test_rows_and_columns_of_0_are_no_special_case() -> None:
    weight = with_values(SPECTRA["slow"])
    weight[100:300] = 0
    weight[:, :50] = 0
    triplets = find_triplets(weight, COUNT)
    assert_triplets(weight, triplets)
    assert_subspaces(weight, triplets)


@pytest.mark.parametrize("copies", [2, 8, 15])
def test_repeated_values_are_all_found(copies: int) -> None:
    values = torch.cat([torch.ones(copies), 0.9 * SPECTRA["slow"][copies:].float()]).double()
    weight = with_values(values)
    assert_triplets(weight, find_triplets(weight, 20))


@pytest.mark.parametrize("copies", [17, 24, 100])
def test_more_copies_than_a_block_holds_are_noticed(copies: int) -> None:
    values = torch.cat([torch.ones(copies), 0.5 * SPECTRA["slow"][copies:].float()]).double()
    assert find_triplets(with_values(values), 24) is None


@pytest.mark.parametrize("values", [torch.ones(SIZE).double(), 1 - 0.3 * INDEX / SIZE], ids=["orthogonal", "flat"])
def test_it_gives_up_and_the_full_decomposition_is_taken(monkeypatch, values: Tensor) -> None:
    monkeypatch.setattr(srlora_dist.method.svd, "LARGEST_SHARE", {SIZE: 1 / 16})
    weight = with_values(values)
    assert find_triplets(weight, COUNT) is None
    left, found, right = compute_directions(weight, COUNT)
    full = torch.linalg.svd(weight, full_matrices=False)
    assert torch.equal(found, full.S[:COUNT])
    torch.testing.assert_close(left * found @ right, full.U[:, :COUNT] * found @ full.Vh[:COUNT])


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 500), (500, SIZE)])
def test_directions_are_the_same_bits_with_the_signs_of_the_full_decomposition(monkeypatch, shape) -> None:
    weight = with_values(SPECTRA["slow"], shape)
    expected = compute_directions(weight, COUNT)
    monkeypatch.setattr(srlora_dist.method.svd, "LARGEST_SHARE", {SIZE: 1 / 16})
    monkeypatch.setattr(srlora_dist.method.svd, "_svd_in_float64", None)
    torch.manual_seed(3)
    first = compute_directions(weight, COUNT)
    torch.manual_seed(4)
    second = compute_directions(weight, COUNT)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(first[0], expected[0])  # it did take the other way
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=2e-3)
    assert bool((first[0].gather(0, first[0].abs().argmax(0, keepdim=True)) > 0).all())


def test_the_way_depends_on_shape_and_count() -> None:
    assert [is_worth_it(shape, 32) for shape in ((1024, 3000), (3000, 1024), (1000, 3000))] == [True, True, False]
    assert [is_worth_it(shape, 32) for shape in ((1024, 4096), (8192, 2048))] == [False, True]
    assert [is_worth_it((2048, 8192), count) for count in (64, 65)] == [True, False]
    assert [is_worth_it((4096, 2048), count) for count in (128, 129)] == [True, False]
    assert not is_worth_it((700, 9000), 1)
    assert find_triplets(torch.randn(40, 40), 10) is None  # no room for a block
    assert find_triplets(1e-20 * torch.randn(SIZE, SIZE), 4) is None  # its squares are no float32
