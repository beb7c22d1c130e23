"""The span algebra against dense matrices, for every cut of odd shapes."""

from __future__ import annotations

import itertools

import pytest
import torch

import srlora_dist.layers.pairs
from srlora_dist.layers.pairs import add_pairs_, add_pairs_to_sum_, fill_pairs_, mean_by_pair


@pytest.mark.parametrize("shape", [(5, 3), (1, 7), (7, 1), (4, 4)])
def test_an_edit_of_every_run_equals_the_edit_of_the_whole(shape: tuple[int, int]) -> None:
    m, n = shape
    weight, left, right = torch.randn(m, n).double(), torch.randn(m, 2).double(), torch.randn(2, n).double()
    expected = (weight - 0.5 * left @ right).flatten()
    for start, stop in itertools.combinations_with_replacement(range(m * n + 1), 2):
        run = weight.flatten()[start:stop].clone()
        add_pairs_(run, start, left, right, scale=-0.5)
        torch.testing.assert_close(run, expected[start:stop])


def test_an_edit_of_no_pairs_changes_nothing() -> None:
    run = torch.randn(6)
    before = run.clone()
    add_pairs_(run, 0, torch.empty(2, 0), torch.empty(0, 3))
    assert torch.equal(run, before)


@pytest.mark.parametrize("pair_dim", [0, 1])
def test_the_parts_of_the_runs_add_up_to_the_mean(pair_dim: int) -> None:
    factor = torch.randn(5, 7)
    expected = factor.double().mean(1 - pair_dim)
    for first, second in itertools.combinations_with_replacement(range(36), 2):
        cuts = ((0, first), (first, second), (second, 35))
        parts = [mean_by_pair(factor.flatten()[a:b], a, factor.shape, pair_dim) for a, b in cuts]
        torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize("pair_dim", [0, 1])
def test_filling_touches_the_chosen_slots_only(pair_dim: int) -> None:
    factor, new, slots = torch.randn(5, 5), torch.randn(5, 5), torch.tensor([1, 4])
    expected = factor.index_copy(pair_dim, slots, new.index_select(pair_dim, slots)).flatten()
    for start, stop in itertools.combinations_with_replacement(range(26), 2):
        run = factor.flatten()[start:stop].clone()
        fill_pairs_(run, start, pair_dim, slots, new)
        assert torch.equal(run, expected[start:stop])


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
def test_500_edits_of_two_16_bit_terms_are_one_rounding_off(dtype: torch.dtype, most: float, monkeypatch) -> None:
    monkeypatch.setattr(srlora_dist.layers.pairs, "SUM_CHUNK", {"other": 1000})  # cuts rows
    torch.manual_seed(0)
    high = (torch.randn(60, 70) / 8).to(dtype)
    low, exact, naive = torch.zeros_like(high), high.double(), high.clone()
    for _ in range(500):
        left, right = torch.randn(60, 4), torch.randn(4, 70)
        size = float(0.01 * exact.norm() / (left @ right).norm())  # a switch changes W by about this much
        add_pairs_to_sum_(high.view(-1), low.view(-1), 0, left, right, size)
        exact += size * (left.double() @ right.double())
        naive += (size * (left @ right)).to(dtype)
    assert (high.double() + low.double() - exact).norm() < 0.2 * most * exact.norm()
    assert (high.double() - exact).norm() < most * exact.norm()
    assert (naive.double() - exact).norm() > 3 * most * exact.norm()  # what adding in place would do
