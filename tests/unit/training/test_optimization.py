"""Which moments a switch resets under which optimizer, and when it refuses to."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.config.run import RunConfig, TaskOptions, TrainOptions
from srlora_dist.training.optimization import build_optimizer
from tests.ranks.engines import make_batch, make_net


def train(optimizer_of, cache, net: nn.Module | None = None, steps: int = 8, **options) -> tuple:
    """Train to the first switch; gives the switcher, its report and the optimizer."""
    model = make_net() if net is None else net
    config = SRLoRAConfig(target_rank=8, svd_cache=str(cache), **options)
    switcher = Switcher(model, config, steps)
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    switcher.bind(model, optimizer)
    width = switcher.sites[0].shape[1]
    for step in range(switcher.due_steps[0]):
        x, y = make_batch(step)
        x = x.repeat(1, -(-width // x.shape[1]))[:, :width]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        state = {k: v.clone() for k, v in optimizer.state[switcher.sites[0].lora_a].items() if torch.is_tensor(v)}
        report = switcher.step()
    return switcher, report, optimizer, state


ELEMENTWISE = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True), ("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq")),
    "SGD": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), ("momentum_buffer",), ()),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=1e-2), ("exp_avg",), ("exp_avg_sq",)),
    "transformers Adafactor": (
        lambda p: transformers.Adafactor(p, lr=1e-2, beta1=0.9, relative_step=False, scale_parameter=False),
        ("exp_avg",),
        None,  # factored
    ),
}


@pytest.mark.parametrize("reset", ["zero", "first_moment", "keep"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_switch_resets_the_moments_of_restarted_pairs(name: str, reset: str, tmp_path) -> None:
    optimizer_of, first, second = ELEMENTWISE[name]
    if second is None and reset == "zero":
        with pytest.raises(ValueError, match="optimizer_reset 'zero' is not supported with Adafactor.*pairs share"):
            train(optimizer_of, tmp_path)
        return
    switcher, report, optimizer, before = train(optimizer_of, tmp_path, optimizer_reset=reset)
    restarted = report.sites[0].slots
    others = [slot for slot in range(4) if slot not in restarted]
    for key in (*first, *(second or ())):
        now = optimizer.state[switcher.sites[0].lora_a][key]
        cleared = reset == "zero" or (reset == "first_moment" and key in first)
        assert before[key][restarted].any()
        assert torch.equal(now[restarted], before[key][restarted] * (not cleared))
        assert torch.equal(now[others], before[key][others])


def wide_net() -> nn.Module:
    """A factor A of 4 x 1100 elements, which bitsandbytes keeps in 8 bits (it starts at 4,096)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1100, 30), nn.Tanh(), nn.Linear(30, 3))
    return get_peft_model(net, LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))


@pytest.mark.parametrize(("reset", "keys"), [("zero", ("state1", "state2")), ("first_moment", ("state1",))])
def test_8_bit_moments_are_reset_to_the_code_of_zero(reset: str, keys: tuple, tmp_path) -> None:
    kind = bitsandbytes.optim.AdamW8bit
    switcher, report, optimizer, before = train(lambda p: kind(p, lr=1e-2), tmp_path, wide_net(), optimizer_reset=reset)
    state = optimizer.state[switcher.sites[0].lora_a]
    restarted = report.sites[0].slots
    others = [slot for slot in range(4) if slot not in restarted]
    for key, table in (("state1", "qmap1"), ("state2", "qmap2")):
        assert state[key].dtype == torch.uint8
        values = state[table][state[key].long()]
        assert bool(values[restarted].any()) is (key not in keys)
        assert torch.equal(state[key][others], before[key][others])
        assert (state[table][before[key][restarted].long()] != 0).any()
    assert not optimizer.state[switcher.sites[0].lora_b]["state1"][:, restarted].any()  # of 32 bits, for it is small


@pytest.mark.parametrize(
    ("optimizer_of", "message"),
    [
        (lambda p: torch.optim.Adafactor(p), "'zero' is not supported with Adafactor: it keeps its second moment"),
        (lambda p: torch.optim.Rprop(p), "'zero' is not supported with Rprop: the layout of its state is not known"),
    ],
)
def test_a_layout_that_does_not_permit_a_reset_is_refused_with_the_reason(optimizer_of, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        train(optimizer_of, tmp_path)
    train(optimizer_of, tmp_path, optimizer_reset="keep")


def test_a_gradient_scaler_shows_unscaled_gradients_and_skips_overflows(tmp_path) -> None:
    """fp16 mixed precision in a loop of one's own: torch's GradScaler around the optimizer."""
    seen = {}
    for scale in (None, 2.0**12):
        model = make_net()
        switcher = Switcher(model, SRLoRAConfig(target_rank=8, svd_cache=str(tmp_path)), 8)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        switcher.bind(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=1000, enabled=scale is not None)
        for step in range(switcher.due_steps[0] - 1):
            for overflows in (False, True) if scale else (False,):
                x, y = make_batch(step)
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                scaler.scale(loss * float("inf") if overflows else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                assert switcher.step() is None
        assert switcher.num_steps == switcher.due_steps[0] - 1
        seen[scale] = switcher.statistics.pair_scores()
    for with_scale, without in zip(seen[2.0**12], seen[None], strict=True):
        torch.testing.assert_close(with_scale, without, rtol=1e-4, atol=0)


def test_a_run_chooses_its_optimizer() -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    sgd = build_optimizer(parameters, TrainOptions(optimizer="sgd", momentum=0.8, learning_rate=0.1, weight_decay=0.2))
    assert type(sgd) is torch.optim.SGD
    assert [sgd.defaults[key] for key in ("momentum", "lr", "weight_decay")] == [0.8, 0.1, 0.2]
    assert type(build_optimizer(parameters, TrainOptions())) is torch.optim.AdamW
    with pytest.raises(ValueError, match="train.momentum is 1.0"):
        TrainOptions(optimizer="sgd", momentum=1.0)


def test_options_that_do_nothing_are_named() -> None:
    unused = RunConfig(train=TrainOptions(momentum=0.5), task=TaskOptions(packing=True)).without_effect()
    assert unused == ["task.packing (task.name is demo)", "train.momentum (train.optimizer is adamw)"]
    used = RunConfig(train=TrainOptions(optimizer="sgd", momentum=0.5), task=TaskOptions("lm", packing=True))
    assert used.without_effect() == []
