"""When to switch and which pairs (Eq. 8, 13, 14)."""

from __future__ import annotations

import pytest
import torch

from srlora_dist.layers.spans import deal_by_size
from srlora_dist.method.budget import choose_slots, due_steps, num_fused, window_length
from tests import reference


@pytest.mark.parametrize(("steps", "r", "target", "gamma"), [(240, 8, 32, 0.5), (100, 4, 11, 0.5), (7, 8, 20, 0.25)])
def test_due_steps_equal_the_reference(steps: int, r: int, target: int, gamma: float) -> None:
    assert due_steps(steps, [(r, target)] * 3, gamma) == reference.due_steps(steps, r, target, gamma)


def test_the_paper_schedule_in_figures() -> None:
    # r' = 4, N_switch = (32 - 8) / 4 = 6, t_interval = 240 / 6 = 40; the sixth falls on the end and is skipped.
    assert num_fused(8, 0.5) == 4
    assert due_steps(240, [(8, 32)], 0.5) == [40, 80, 120, 160, 200]


def test_a_remainder_counts_as_a_switch_and_the_last_one_falls_on_the_end() -> None:
    assert due_steps(1000, [(4, 11)], 0.5) == [250, 500, 750]  # 7 directions in twos: 4 switches


def test_no_switch_where_the_target_is_the_rank() -> None:
    assert due_steps(100, [(8, 8), (4, 4)], 0.5) == []


def test_the_site_with_the_most_switches_sets_the_pace() -> None:
    assert due_steps(240, [(8, 32), (8, 10)], 0.5) == due_steps(240, [(8, 32)], 0.5)


def test_more_switches_than_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="6 switches in 5 steps.*lower target_rank"):
        due_steps(5, [(8, 32)], 0.5)


@pytest.mark.parametrize(
    ("steps", "until", "due"),
    [(5, 1.0, [1, 2, 3, 4]), (2, 1.0, [1]), (1, 1.0, []), (8, 0.5, [1, 2, 3, 4]), (4, 0.1, [])],
)
def test_a_short_run_has_as_many_switches_as_fit_where_nobody_asked_for_more(steps, until, due) -> None:
    message = f"asks for 6 switches in {round(until * steps)} steps, and as many as fit are made: {len(due)}"
    with pytest.warns(UserWarning, match=message):
        assert due_steps(steps, [(8, 32)], 0.5, until, may_be_fewer=True) == due
    with pytest.raises(ValueError, match="num_switches asks for 9 switches in"):
        due_steps(8, [(8, 32)], 0.5, num_switches=9, may_be_fewer=True)


def test_where_all_switches_fit_nothing_is_said(recwarn) -> None:
    assert due_steps(240, [(8, 32)], 0.5, may_be_fewer=True) == due_steps(240, [(8, 32)], 0.5)
    assert due_steps(6, [(8, 32)], 0.5, may_be_fewer=True) == [1, 2, 3, 4, 5]
    assert not recwarn.list


def test_the_window_is_as_long_as_a_gradient_weighs() -> None:
    """By the exact weights of one gradient in both averages, from the recursion itself."""
    assert window_length("all", 0.85, 0.85) is None
    assert window_length(7, 0.85, 0.85) == 7
    assert window_length("auto", 0, 0) == 1
    for b1, b2 in ((0.85, 0.85), (0.9, 0.5), (0.5, 0.9)):
        length = window_length("auto", b1, b2)
        mean, deviation, weights = 1.0, 1.0, []  # what all the past weighs, at most, after each further step
        for _ in range(length):
            mean = b1 * mean
            deviation = b2 * deviation + (1 - b2) * mean
            weights.append(max(mean, deviation))
        assert weights[-1] <= 1e-6
    assert weights[-1] > 1e-9  # and not much longer than it has to be
    assert 86 <= window_length("auto", 0.85, 0.85) <= 110


def test_ties_go_to_the_lower_slot() -> None:
    assert choose_slots(torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]), 2, [1] * 5) == [1, 3]
    assert choose_slots(torch.zeros(4), 0, [1] * 4) == []


def test_which_pairs_are_fused() -> None:
    scores, ages = torch.tensor([5.0, 1.0, 3.0, 4.0, 2.0]), [1, 1, 2, 3, 3]
    assert choose_slots(scores, 2, ages, "lowest") == [1, 4]
    assert choose_slots(scores, 2, ages, "highest") == [0, 3]
    assert choose_slots(scores, 3, ages, "oldest") == [2, 3, 4]
    assert choose_slots(scores, 1, ages, "oldest") == [4]  # of equal age the lower score
    assert choose_slots(scores, 2, ages, "lowest", grace=2) == [2, 4]
    assert choose_slots(scores, 4, ages, "lowest", grace=2) == [1, 2, 3, 4]  # too few have lived that long
    assert choose_slots(scores, 2, ages, "lowest", grace=9) == choose_slots(scores, 2, ages, "lowest")


def test_all_switches_can_happen_early() -> None:
    assert due_steps(240, [(8, 32)], 0.5, until=0.5) == [20, 40, 60, 80, 100, 120]  # the last one counts now
    with pytest.raises(ValueError, match="6 switches in 4 steps"):
        due_steps(40, [(8, 32)], 0.5, until=0.1)


def test_sites_are_dealt_evenly() -> None:
    sizes = [9, 7, 5, 5, 4, 1]
    ranks = deal_by_size(sizes, 3)
    loads = [sum(size for size, rank in zip(sizes, ranks, strict=True) if rank == r) for r in range(3)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= 2
    assert deal_by_size([3], 4) == [0]
