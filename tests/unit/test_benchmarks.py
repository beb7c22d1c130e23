"""What a benchmark says of its own figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from run import short_table, table
from side_by_side import Row, alternate, ratios, verdict


def row(values: list[float], bound: str, target: float | None) -> Row:
    return Row("speed", "ours", "theirs", "a case", values, bound, target, reason="a reason")


@pytest.mark.parametrize(
    ("values", "bound", "target", "expected"),
    [
        ([1.0, 1.01, 1.02], "at most", 1.03, "met"),
        ([1.04, 1.05, 1.06], "at most", 1.03, "short"),
        ([8.1, 9.0, 9.1], "at least", 8.0, "met"),
        ([7.0, 7.1, 7.2], "at least", 8.0, "short"),
        ([0.9, 1.0, 1.2], "at most", 1.05, "met, within the spread"),
        ([0.9, 1.1, 1.2], "at most", 1.05, "short, within the spread"),
        ([0.0], "exactly", 0.0, "met"),
        ([0.0, 1.0, 1.0], "exactly", 0.0, "short"),
        ([3.0], "at most", None, ""),
    ],
)
def test_a_verdict_is_that_of_the_median_and_tells_of_the_spread(values, bound, target, expected) -> None:
    assert verdict(row(values, bound, target)) == expected


def test_the_short_table_shows_the_worst_case_first_and_why_it_is_short() -> None:
    for bound, worst, best in (("at least", 7.0, 9.0), ("at most", 9.0, 7.0)):
        (line,) = short_table([row([best], bound, 8.0), row([worst], bound, 8.0), row([5.0], bound, None)])[2:]
        assert f"| {worst:g} to {best:g} | {bound} 8 | 1 of 2; short at a case: a reason |" in line
    assert len(table([row([5.0], "at most", None)])) == 3


def test_contenders_take_turns_and_a_ratio_is_that_of_one_round() -> None:
    order = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=1)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [len(each) for each in seconds.values()] == [3, 3]
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
