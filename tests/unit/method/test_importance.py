"""The moving averages against the formulas, however tensors are grouped, joined and cut, and with gaps between runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.method import importance
from srlora_dist.method.importance import MOST_GROUPINGS, Importance
from srlora_dist.storage.factor_spans import FactorSpan
from tests.ranks.engines import make_batch, make_net

B1, B2 = 0.7, 0.4
# A and B of three sites, flat: (owner, offset, elements). The first owner has neighbours out of order and a gap, as
# under ZeRO; the second is of 16 bits; the third is held
# whole, as under DDP, and the fourth goes on where that ends.
PLACES = [(0, 30, 20), (0, 10, 20), (0, 60, 25), (1, 0, 9), (2, 0, 40), (3, 40, 12)]
OWNERS = [(100, torch.float32), (9, torch.bfloat16), (40, torch.float32), (60, torch.float32)]


def make_owners() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size).to(dtype).requires_grad_() for size, dtype in OWNERS]


def make_runs(owners: list[Tensor]) -> list[FactorSpan]:
    return [
        FactorSpan(owners[o], at, 0, size, number // 2, "AB"[number % 2]) for number, (o, at, size) in enumerate(PLACES)
    ]


@pytest.mark.parametrize("elements_a_group", [1 << 16, 50, 7])
@pytest.mark.parametrize("missing", [None, 0, 2])
def test_the_averages_equal_the_formulas(elements_a_group: int, missing: int | None, monkeypatch) -> None:
    """Eq. 3-5 run by run; in the second step one owner has no gradient and is left alone."""
    monkeypatch.setitem(importance.GROUP_ELEMENTS, "cpu", elements_a_group)
    owners = make_owners()
    runs = make_runs(owners)
    tracked = Importance(SimpleNamespace(tracked=runs, sites=[None] * 3), B1, B2)
    means, deviations = ([torch.zeros(run.numel) for run in runs] for _ in range(2))
    for step in range(4):
        for number, owner in enumerate(owners):
            owner.grad = None if step == 1 and number == missing else torch.randn(owner.shape).to(owner.dtype)
        for j, run in enumerate(runs):
            if run.owner.grad is not None:
                part = slice(run.offset, run.offset + run.numel)
                sensitivity = (run.owner.detach()[part].float() * run.owner.grad[part].float()).abs()
                means[j] = B1 * means[j] + (1 - B1) * sensitivity
                deviations[j] = B2 * deviations[j] + (1 - B2) * (sensitivity - means[j]).abs()
        tracked.observe_(owners[:2])  # ZeRO-3 steps one sub-group after the other
        tracked.observe_(owners[2:])
    for j, run in enumerate(runs):
        found = tracked.of_site(run.site)[2 * (j % 2) : 2 * (j % 2) + 2]
        torch.testing.assert_close(found, [means[j], deviations[j]])


def test_both_averages_are_forgotten() -> None:
    owners = make_owners()
    tracked = Importance(SimpleNamespace(tracked=make_runs(owners), sites=[None] * 3), B1, B2)
    for owner in owners:
        owner.grad = torch.ones_like(owner)
    tracked.observe_(owners)
    assert all(bool(average.all()) for number in range(3) for average in tracked.of_site(number))
    tracked.reset_(1, torch.tensor([0]))
    assert not any(bool(average.any()) for average in tracked.of_site(1))
    assert all(bool(average.all()) for number in (0, 2) for average in tracked.of_site(number))
    tracked.clear_()
    assert not any(bool(average.any()) for number in range(3) for average in tracked.of_site(number))


def test_few_groupings_are_kept_where_the_tensors_change_at_random() -> None:
    owners = [torch.randn(3).requires_grad_() for _ in range(6)]
    runs = [FactorSpan(owner, 0, 0, 3, 0, "A") for owner in owners]
    tracked = Importance(SimpleNamespace(tracked=runs, sites=[None]), B1, B2)
    for step in range(1, 64):
        for number, owner in enumerate(owners):
            owner.grad = torch.ones(3) if step >> number & 1 else None
        tracked.observe_(owners)
        assert len(tracked._groups) <= MOST_GROUPINGS


@pytest.mark.parametrize("score", ["sensitivity", "relative"])
def test_small_gradients_choose_as_large_ones_do(score: str, tmp_path) -> None:
    """Averages of 1e-20 are float32 numbers, but their product is not."""
    chosen, scores = {}, {}
    for scale in (1.0, 1e-20):
        model = make_net()
        switcher = Switcher(model, SRLoRAConfig(target_rank=8, score=score, svd_cache=str(tmp_path)), 8)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        switcher.bind(model, optimizer)
        for step in range(switcher.due_steps[0]):
            x, y = make_batch(step)
            optimizer.zero_grad()
            ((model(x) - y).square().mean() * scale).backward()
            optimizer.step()
            report = switcher.step()
        chosen[scale] = [site.slots for site in report.sites]
        scores[scale] = torch.tensor([site.scores for site in report.sites], dtype=torch.float64)
    assert chosen[1e-20] == chosen[1.0]
    torch.testing.assert_close(scores[1e-20] * 1e40, scores[1.0], rtol=1e-4, atol=0)
