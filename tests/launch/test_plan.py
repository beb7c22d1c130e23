"""Which samples, rates and evaluations a run has, and the intervals that its figures show."""

from __future__ import annotations

import pytest

from srlora_dist.training.data_order import SampleOrder
from srlora_dist.training.figures import Interval, active_intervals
from srlora_dist.training.loop_state import due_checkpoints, due_evaluations
from srlora_dist.training.optimization import warm_up_and_decay


def test_each_epoch_is_another_permutation_without_its_rest() -> None:
    order = list(SampleOrder(num_samples=41, batch_size=8, num_steps=12, seed=3))
    assert len(order) == 96
    first, second, third = order[:40], order[40:80], order[80:]
    assert len(set(first)) == len(set(second)) == 40
    assert len(set(third)) == 16
    assert first != second
    assert order == list(SampleOrder(41, 8, 12, seed=3))
    assert order != list(SampleOrder(41, 8, 12, seed=4))


def test_a_longer_run_begins_with_the_same_samples() -> None:
    assert list(SampleOrder(41, 8, 20, 0))[:40] == list(SampleOrder(41, 8, 5, 0))


@pytest.mark.parametrize("num_done", [0, 1, 4, 5, 6, 11, 12])
def test_a_resumed_run_goes_on_with_the_next_sample(num_done: int) -> None:
    rest = SampleOrder(41, 8, 12, 3, num_done)
    assert list(rest) == list(SampleOrder(41, 8, 12, 3))[8 * num_done :]
    assert len(rest) == 96 - 8 * num_done


@pytest.mark.parametrize(
    ("every", "due"), [(None, {10, 20, 25}), (0, set()), (8, {8, 16, 24, 25}), (25, {25}), (99, {25})]
)
def test_checkpoints_come_with_evaluations_or_every_so_often(every: int | None, due: set[int]) -> None:
    assert due_checkpoints(25, every, {0, 10, 20, 25}) == due


def test_rate_rises_to_its_peak_and_never_is_zero() -> None:
    share = warm_up_and_decay(num_steps=100, warmup_ratio=0.1)
    shares = [share(step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1
    assert shares[99] == pytest.approx(1 / 90)
    assert sorted(shares[10:], reverse=True) == shares[10:]
    assert warm_up_and_decay(3, 0.0)(0) == 1


def test_after_the_warm_up_the_rate_falls_along_half_a_wave_or_stays() -> None:
    cosine, constant = (warm_up_and_decay(110, 10 / 110, schedule) for schedule in ("cosine", "constant"))
    assert [cosine(step) for step in (0, 9, 10)] == [constant(step) for step in (0, 9, 10)] == [0.1, 1, 1]
    assert [cosine(step) for step in (35, 60, 85)] == pytest.approx([(2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])
    assert cosine(110) == 0
    assert {constant(step) for step in range(10, 110)} == {1.0}


@pytest.mark.parametrize(
    ("num_steps", "every", "due"), [(5, None, {0, 1, 2, 3, 4, 5}), (25, 10, {0, 10, 20, 25}), (20, 10, {0, 10, 20})]
)
def test_the_start_and_the_last_step_are_always_evaluated(num_steps: int, every: int | None, due: set[int]) -> None:
    assert due_evaluations(num_steps, every) == due


def test_five_evaluations_a_run_after_the_start() -> None:
    assert due_evaluations(264, None) == {0, 53, 106, 159, 212, 264}


def test_intervals_begin_when_a_direction_is_taken_and_end_when_it_is_fused() -> None:
    switches = [
        {"step": 0, "switch": 0, "site": "x", "directions": [], "new_directions": [0, 1]},
        {"step": 4, "switch": 1, "site": "x", "directions": [1], "new_directions": [2]},
        {"step": 8, "switch": 2, "site": "x", "directions": [2], "new_directions": [3]},
    ]
    assert active_intervals(switches, num_steps=10) == {
        "x": [Interval(0, 0, 10, False), Interval(1, 0, 4, True), Interval(2, 4, 8, True), Interval(3, 8, 10, False)]
    }
