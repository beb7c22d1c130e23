"""Each failure sign: a case that has it, and a healthy one that has not."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.ledger import SiteSwitch, SwitchReport
from srlora_dist.layers.discovery import find_sites
from srlora_dist.layers.site import Site
from srlora_dist.method.budget import choose_slots
from srlora_dist.method.diagnostics import (
    EVEN,
    NOISE,
    LossWatch,
    directions_exhausted,
    even_scores,
    evenness,
    no_gradient,
    noise_edge,
    noise_level_directions,
    worse_than_start,
)
from tests.ranks.engines import dequantised, quantised


class Tower(nn.Module):
    """Three wide layers with spectra that fall, as pretrained ones do, and one that the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(n, m) for m, n in ((40, 24), (32, 40), (24, 32)))
        self.unseen = nn.Linear(24, 40)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(structured(*layer.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(torch.tanh(second(torch.tanh(first(x) + 0 * self.unseen(x)))))


def structured(m: int, n: int, power: float = 0.5) -> Tensor:
    """A weight whose k-th singular value is (k + 1)^-power."""
    left, _, right = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    return left * torch.arange(1, min(m, n) + 1).pow(-power) @ right


def train_tower(tmp_path, targets: list[str], rank: int = 8, target_rank: int = 24, steps: int = 60) -> tuple:
    """A real run; gives the reports of its switches, what was found exhausted, and the losses of its steps."""
    model = get_peft_model(Tower(), LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    switcher = Switcher(model, SRLoRAConfig(target_rank=target_rank, svd_cache=str(tmp_path)), steps)
    reports, losses = [switcher.bind(model, optimizer)], []
    exhausted = [directions_exhausted(reports[0], switcher.sites)]
    generator, teacher = torch.Generator().manual_seed(1), torch.randn(24, 24) / 5
    for _ in range(steps):
        x = torch.randn(32, 24, generator=generator)
        loss = (model(x) - torch.sin(x @ teacher)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        report = switcher.step()
        if report is not None:
            reports.append(report)
            exhausted.append(directions_exhausted(report, switcher.sites))
    return reports, exhausted, losses


LAYERS = ["layers.0", "layers.1", "layers.2"]


def switch_of(scores: list[list[float]], count: int) -> SwitchReport:
    sites = [
        SiteSwitch(f"layer{i}", choose_slots(torch.tensor(row), count, [1] * len(row)), [], [], row)
        for i, row in enumerate(scores)
    ]
    return SwitchReport(40, 2, sites)


@pytest.mark.parametrize(
    ("rank", "count", "noise"), [(4, 2, 0.25), (8, 4, 0.25), (64, 32, 0.2), (8, 1, 0.15), (8, 7, 0.15)]
)
def test_scores_of_noise_alone_are_even(rank: int, count: int, noise: float) -> None:
    draw = random.Random(0)
    even = [[1e-12 * math.exp(draw.gauss(0, noise)) for _ in range(rank)] for _ in range(40)]
    finding = even_scores(switch_of(even, count))
    assert finding.kind == "even_scores"
    assert finding.step == 40
    assert 20 < finding.figures["num_even"] <= finding.figures["num_sites"] == 40
    assert EVEN < finding.figures["median"] < finding.figures["worst"] <= 1
    assert "srlora.beta1" in finding.message
    spread = [[1e-12 * math.exp(draw.gauss(0, 0.9)) for _ in range(rank)] for _ in range(40)]
    assert even_scores(switch_of(spread, count)) is None


def test_scores_of_a_real_run_are_not_even(tmp_path) -> None:
    reports, _, _ = train_tower(tmp_path, LAYERS)
    assert len(reports) == 4
    assert all(even_scores(report) is None and no_gradient(report) is None for report in reports)
    for site in reports[-1].sites:
        site.scores = [1 + 0.1 * score / max(site.scores) for score in site.scores]
    assert even_scores(reports[-1]).figures["num_even"] == 3


def test_one_pair_that_stands_out_does_not_hide_that_the_others_are_even() -> None:
    assert evenness(SiteSwitch("x", [0, 1, 2, 3], [], [], [1.0] * 7 + [100.0])) == 1
    assert evenness(SiteSwitch("x", [0, 1], [], [], [1.0, 1.0] + [100.0] * 6)) == 0.01
    assert evenness(SiteSwitch("x", [0, 1, 2, 3], [], [], [1.0] * 3 + [90.0] + [100.0] * 4)) == 0.01
    assert evenness(SiteSwitch("x", [0, 1], [], [], [0.0] * 6 + [1.0] * 2)) == 1


def test_a_site_without_a_choice_does_not_count() -> None:
    even = [SiteSwitch("all", [0, 1], [], [], [1.0, 1.0]), SiteSwitch("one", [0], [], [], [1.0])]
    first = SiteSwitch("first", [0, 1], [], [], [])
    assert even_scores(SwitchReport(9, 1, [*even, first])) is None


def test_a_layer_that_the_loss_does_not_see_has_no_gradient(tmp_path) -> None:
    reports, _, _ = train_tower(tmp_path, [*LAYERS, "unseen"])
    assert no_gradient(reports[0]) is None
    for report in reports[1:]:
        finding = no_gradient(report)
        assert finding.figures == {"num_dead": 1, "num_sites": 4}
        assert "(unseen)" in finding.message
        assert even_scores(report) is None


def test_exhausted_directions_are_told_once(tmp_path) -> None:
    with pytest.warns(UserWarning, match="layers.2 .*: 24"):
        _, exhausted, _ = train_tower(tmp_path, LAYERS, rank=4, target_rank=28)
    found = [finding for finding in exhausted if finding is not None]
    assert len(exhausted) == 12  # switch 12, on the last step, is left out
    assert [finding.step for finding in found] == [50]
    assert found[0].figures == {"num_exhausted": 2, "num_sites": 3}
    assert "layers.0, layers.2 took the last directions" in found[0].message


@pytest.mark.parametrize("target_rank", [8, 4])
def test_a_planned_run_exhausts_nothing(tmp_path, target_rank: int) -> None:
    _, exhausted, _ = train_tower(tmp_path, LAYERS, rank=4, target_rank=target_rank)
    assert not any(exhausted)


def site_of(weight: Tensor, stored_as: str) -> tuple[Site, Tensor]:
    """A site that holds the weight so, and its singular values."""
    net = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    net[0].weight.data = weight.clone()
    if hasattr(torch, stored_as) and stored_as != "int8":
        net[0].to(getattr(torch, stored_as))
        held = net[0].weight.data.float()
    else:
        net[0] = quantised(net[0], stored_as)
        setattr(net, f"is_loaded_in_{'8' if stored_as == 'int8' else '4'}bit", True)
        held = dequantised(net[0], stored_as)
    (site,) = find_sites(get_peft_model(net, LoraConfig(r=4, target_modules=["0"])))
    site.state.target_rank = 32
    return site, torch.linalg.svdvals(held)


@pytest.mark.parametrize("stored_as", [*NOISE, "nf4-double"])
def test_what_a_low_rank_weight_has_beyond_its_rank_is_rounding(stored_as: str) -> None:
    torch.manual_seed(0)
    site, values = site_of(torch.randn(256, 6) @ torch.randn(6, 192) / 16, stored_as)
    known = {"0": values[:32].tolist()}
    finding = noise_level_directions(0, [site], known)
    # The rounding of a product of six vectors has a few directions of its own above the edge.
    assert 6 <= finding.figures["lowest"] <= 8
    assert finding.figures["num_directions"] == 32 - finding.figures["lowest"]
    assert f"srlora.target_rank to {finding.figures['lowest']} or less" in finding.message
    assert noise_level_directions(0, [site], {"0": known["0"][:6]}) is None
    site.state.num_taken = 30
    assert noise_level_directions(90, [site], known).figures["num_directions"] == 2
    assert noise_level_directions(90, [site], {"0": known["0"][:30]}) is None  # starts nothing


@pytest.mark.parametrize("stored_as", [*NOISE, "nf4-double"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_what_stands_above_the_rounding_is_left_alone(stored_as: str, power: float) -> None:
    torch.manual_seed(0)
    site, values = site_of(structured(256, 192, power), stored_as)
    assert noise_level_directions(0, [site], {"0": values[:32].tolist()}) is None


def test_the_type_of_the_original_counts_where_directions_come_from_it() -> None:
    torch.manual_seed(0)
    weight = torch.cat([structured(256, 192)[:, :96]] * 2, 1)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    values[8:] = 1e-2 * values[7] * values[8:] / values[8]
    site, _ = site_of(left * values @ right, "nf4")
    known = {"0": values[:32].tolist()}
    assert noise_level_directions(0, [site], known).figures["lowest"] == 8
    assert noise_level_directions(0, [site], known, stored_as="bfloat16") is None


def test_a_weight_of_zeros_is_all_noise() -> None:
    site, values = site_of(torch.zeros(20, 10), "float32")
    assert noise_level_directions(0, [site], {"0": values.tolist()}).figures["lowest"] == 0


@pytest.mark.parametrize("shape", [(256, 192), (192, 192), (16, 300)])
def test_the_bound_on_the_norm_moves_the_edge_by_little(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for power in (0.0, 0.5, 2.0):
        weight = structured(*shape, power)
        values = torch.linalg.svdvals(weight)[:12].tolist()
        bound, exact = noise_edge(values, shape, NOISE["fp4"]), noise_edge(values, shape, NOISE["fp4"], weight.norm())
        assert exact * 0.9999 <= bound
        assert bound**2 <= exact**2 + 0.135 * values[-1] ** 2


@pytest.mark.parametrize("stored_as", NOISE)
def test_the_rounding_errors_are_as_written(stored_as: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512, dtype=torch.float64)
    if stored_as in ("nf4", "fp4", "int8"):
        linear = nn.Linear(512, 512, bias=False)
        linear.weight.data = weight.float()
        held = dequantised(quantised(linear, stored_as), stored_as)
    else:
        held = weight.to(getattr(torch, stored_as))
    error = (held.double() - weight).norm() / weight.norm()
    assert error == pytest.approx(NOISE[stored_as], rel=0.15 if stored_as == "int8" else 0.02)


def watch(losses: list[float], switches: list[int], every: int = 10, watched: LossWatch | None = None) -> list:
    watched, found = watched or LossWatch(), []
    for k, loss in enumerate(losses, 1):
        for switch in switches:
            if (k - 1) * every < switch <= k * every:
                watched.switched(switch)
        found.append(watched.update(k * every, loss))
    return [finding for finding in found if finding is not None]


STEADY = [0.52, 0.47, 0.50, 0.55, 0.49, 0.51, 0.46, 0.50]


@pytest.mark.parametrize("after", [[0.9, 0.8, 0.7], [0.55, 0.9, 0.8]])
def test_a_jump_at_a_switch_is_told_once(after: list[float]) -> None:
    (finding,) = watch([*STEADY, *after], [83])
    assert finding.kind == "loss_jump"
    assert finding.figures["before"] == 0.5
    assert finding.figures["after"] == 0.9
    assert finding.figures["switch_step"] == 83
    assert "train.learning_rate" in finding.message


def test_a_window_that_ends_with_the_switch_has_not_seen_it() -> None:
    assert watch([*STEADY, 0.9, 0.5, 0.5], [90]) == []
    assert watch([*STEADY, 0.5, 0.9, 0.5], [90])[0].step == 100


def test_each_switch_with_a_jump_is_told() -> None:
    assert [f.step for f in watch([*STEADY, 0.9, *STEADY, 0.9, *STEADY], [83, 173])] == [90, 180]


@pytest.mark.parametrize(
    "losses",
    [
        [*STEADY, 0.53, 0.48, 0.51],
        [*STEADY, 0.5, 0.5, 0.9],  # too late to be the switch's
        [4.9, 5.2, 5.6, 5.4, 4.4, 5.8, 4.9, 5.5, 5.8, 4.9],  # SmolLM2, step by step: scatter, no jump
        [0.2, *[0.001 * k for k in (5, 9, 2, 6, 3, 8, 4)], 0.009, 0.004],  # nearly learnt by heart
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.54, 0.54],  # above a scatter of zero, by less than matters
        [*STEADY, math.nan, math.inf, 0.5],
    ],
)
def test_no_jump_is_no_finding(losses: list[float]) -> None:
    assert watch(losses, [83]) == []


def test_too_few_losses_before_a_switch_say_nothing() -> None:
    assert watch([*STEADY[:4], 0.9, 0.9], [43]) == []
    assert len(watch([*STEADY[:5], 0.9, 0.9], [53])) == 1


def test_a_loss_without_a_switch_may_rise() -> None:
    assert watch([*STEADY, 0.9, 1.5, 3.0], []) == []


@pytest.mark.parametrize("every", [1, 3])
def test_a_real_run_does_not_jump(tmp_path, every: int) -> None:
    reports, _, losses = train_tower(tmp_path, LAYERS)
    windows = [sum(losses[k : k + every]) / every for k in range(0, len(losses), every)]
    switches = [report.step for report in reports[1:]]
    assert len(switches) == 3
    assert watch(windows, switches, every) == []
    last = switches[-1] // every
    assert len(watch([*windows[:last], *(2 * loss for loss in windows[last:])], switches, every)) == 1


def test_a_resumed_watch_goes_on_as_if_never_stopped() -> None:
    losses = [*STEADY, 0.52, 0.9, 0.8]
    for stop in range(len(losses)):
        first, second = LossWatch(), LossWatch()
        found = watch(losses[:stop], [83], watched=first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for k, loss in enumerate(losses[stop:], stop + 1):
            if k == 9:
                second.switched(83)
            found.append(second.update(10 * k, loss))
        assert [finding.step for finding in found if finding is not None] == [100]


def test_a_rise_of_the_validation_loss_is_told() -> None:
    start = {"loss": 0.69, "accuracy": 0.51}
    finding = worse_than_start(40, start, {"loss": 0.75, "accuracy": 0.62})
    assert finding.figures == {"start": 0.69, "now": 0.75}
    assert "accuracy 0.51, now 0.62" in finding.message
    for loss in (0.35, 0.69, 0.695):
        assert worse_than_start(40, start, {"loss": loss, "accuracy": 0.5}) is None
    assert worse_than_start(40, start, {"loss": math.nan}) is not None
    assert worse_than_start(40, {"loss": math.nan}, start) is None
