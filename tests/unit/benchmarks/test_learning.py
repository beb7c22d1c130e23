"""What the study of learning reads off its lines."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks" / "learning"


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import measures

    return measures


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["x"])
    import studies

    return studies


def line_of(losses: list[float]) -> dict:
    """A point every 10 steps."""
    return {"curve": [[10 * (k + 1), loss] for k, loss in enumerate(losses)]}


def test_a_mean_has_the_interval_of_student(measures: ModuleType) -> None:
    mean = measures.mean_of([1.0, 2.0, 3.0])
    assert mean.value == 2
    assert mean.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom, deviation 1
    assert str(mean) == "2.000 ± 2.484"
    assert str(measures.mean_of([0.5])) == "0.500"


def test_steps_to_a_loss_are_of_the_smoothed_curve(measures: ModuleType) -> None:
    falling = line_of([1.0 - 0.05 * k for k in range(20)])  # two points are averaged
    assert measures.final_loss(falling) == pytest.approx((0.1 + 0.05) / 2)
    assert measures.share_to_reach(falling, measures.final_loss(falling) + 1e-9) == 1
    assert measures.share_to_reach(falling, 0.525 + 1e-9) == 0.55  # (0.55 + 0.5) / 2, after the 11th of 20 points
    assert measures.share_to_reach(falling, 0.05) is None


def test_worse_is_worse_by_more_than_the_interval(measures: ModuleType) -> None:
    down, unclear = measures.Mean(-0.03, 0.02, 3), measures.Mean(-0.01, 0.02, 3)
    assert measures.is_worse(down, "accuracy")
    assert not measures.is_worse(unclear, "accuracy")
    assert not measures.is_worse(down, "loss")
    assert measures.is_worse(measures.Mean(0.03, 0.02, 3), "loss")
    assert measures.main_metric({"final": {"loss": 1.0, "f1": 0.5, "accuracy": 0.4}}) == "accuracy"


def switch(number: int, slots: list[int], site: str = "a") -> dict:
    return {"switch": number, "site": site, "slots": slots}


def test_lifetimes_and_recycled_pairs(studies: ModuleType) -> None:
    lines = [switch(0, [0, 1, 2, 3]), switch(1, [0, 1]), switch(2, [0, 2]), switch(3, [0, 1])]
    found = studies.summarise_switches(lines)
    assert found["recycled"] == [0.5, 0.5]  # 0 of (0, 2); 0 of (0, 1)
    assert found["by_chance"] == [0.5, 0.5]  # two of four pairs were new
    assert found["lifetimes"] == [4, 2]  # 0, 1, 0, 0 after one interval; 2 after two, 1 after two


def test_variants_are_options_of_the_method(studies: ModuleType) -> None:
    from srlora_dist.config.method import SRLoRAConfig

    for question in studies.QUESTIONS.values():
        for variant in question.variants.values():
            assert SRLoRAConfig(**variant) != SRLoRAConfig()
    for name, options in studies.METHODS.items():
        run = studies.make_run("mnist", name, options, 1e-3, 7)
        assert (run.cell.method, run.cell.seed, run.rate) == (options["method"], 7, 1e-3)
        assert run.cell.config.lora.alpha == run.cell.config.lora.rank  # a scale of 1 for all
