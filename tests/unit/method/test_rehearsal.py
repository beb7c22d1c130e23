"""What an optimizer keeps is tried when a run is bound: a run never fails at its first checkpoint."""

from __future__ import annotations

import warnings

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn

from srlora_dist import SRLoRACallback, SRLoRAConfig, Switcher
from srlora_dist.storage.optimizer_trial import try_state
from tests.ranks.engines import make_net
from tests.ranks.hf_trainer import make_arguments, make_model, samples
from tests.unit.method.test_switcher import take_steps
from tests.unit.training.test_optimization import wide_net

RATE = 1e-2


class FourBits(torch.Tensor):
    """A moment in a type of its own, as the 4-bit optimizers of other packages keep it."""


class FourBitAdamW(torch.optim.AdamW):
    """Its moments look like floating point of the shape of the weight."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[parameter]["exp_avg"] = torch.zeros_like(parameter).as_subclass(FourBits)


class ScheduleFree(torch.optim.Optimizer):
    """Steps an iterate z, and keeps the parameter between z and the average of all z (arXiv 2405.15682)."""

    def __init__(self, params, lr: float = RATE) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            z = state.setdefault("z", parameter.clone())
            state["k"] = state.get("k", 0) + 1
            z.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
            parameter.lerp_(z, 1 / state["k"])


def adafactor(parameters) -> torch.optim.Optimizer:
    return transformers.Adafactor(parameters, lr=RATE, beta1=0.9, relative_step=False, scale_parameter=False)


UNSAVED = {
    "AdamW8bit": (lambda p: bitsandbytes.optim.AdamW8bit(p, lr=RATE), "zero", "state1 .* is kept as torch.uint8"),
    "PagedAdamW8bit": (
        lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=RATE),
        "zero",
        "state1 .* is kept as torch.uint8",
    ),
    "Adafactor": (adafactor, "first_moment", "exp_avg_sq_row .* is kept as torch.float32 of shape"),
    "AdEMAMix": (
        lambda p: bitsandbytes.optim.AdEMAMix(p, lr=RATE),
        "keep",
        "state1 .* is kept as torch.float32 of shape",
    ),
    "FourBitAdamW": (lambda p: FourBitAdamW(p, lr=RATE), "zero", "exp_avg .* is kept.* in a FourBits"),
}


def bind(optimizer_of, reset: str, cache, will_save: bool, model: nn.Module | None = None) -> tuple:
    model = wide_net() if model is None else model
    switcher = Switcher(model, SRLoRAConfig(target_rank=8, optimizer_reset=reset, svd_cache=str(cache)), 8)
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    return switcher, switcher.bind(model, optimizer, will_save=will_save), optimizer


@pytest.mark.parametrize("name", UNSAVED)
def test_what_no_checkpoint_can_hold_is_said_when_a_run_is_bound(name: str, tmp_path) -> None:
    optimizer_of, reset, message = UNSAVED[name]
    model = wide_net()
    untouched = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"the {message}.*a checkpoint needs.*AdamW, or save none"):
        bind(optimizer_of, reset, tmp_path, True, model)
    assert all(torch.equal(tensor, untouched[key]) for key, tensor in model.state_dict().items())
    with pytest.warns(UserWarning, match=f"the {message}.*save_checkpoint.. will be refused"):
        switcher, report, optimizer = bind(optimizer_of, reset, tmp_path, False)
    assert report.switch == 0
    assert not optimizer.state


GOOD = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=RATE, amsgrad=True, weight_decay=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=1.0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=RATE),
    "AdamW32bit": lambda p: bitsandbytes.optim.AdamW32bit(p, lr=RATE),
    "PagedAdamW": lambda p: bitsandbytes.optim.PagedAdamW32bit(p, lr=RATE),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", GOOD)
def test_a_good_optimizer_is_taken_and_its_checkpoint_is_written(name: str, tmp_path) -> None:
    model = make_net()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*a checkpoint needs")
        switcher, _, optimizer = bind(GOOD[name], "keep" if name == "Rprop" else "zero", tmp_path, True, model)
    assert not optimizer.state
    take_steps(model, optimizer, switcher, 2)
    assert switcher.save_checkpoint(tmp_path / "checkpoints")


def test_the_8_bit_optimizer_of_small_pairs_saves_checkpoints(tmp_path) -> None:
    """bitsandbytes keeps what is below 4,096 elements in 32 bits."""
    model = make_net()
    switcher, _, optimizer = bind(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=RATE), "zero", tmp_path, True, model)
    take_steps(model, optimizer, switcher, 2)
    assert switcher.save_checkpoint(tmp_path / "checkpoints")


@pytest.mark.parametrize("reset", ["zero", "first_moment", "keep"])
@pytest.mark.parametrize("kind", [ScheduleFree, torch.optim.ASGD])
def test_an_iterate_is_never_kept(kind: type, reset: str, tmp_path) -> None:
    iterate = {"ScheduleFree": "z", "ASGD": "ax"}[kind.__name__]
    with pytest.raises(ValueError, match=f"{kind.__name__} is not supported: its {iterate} is a copy") as error:
        bind(lambda p: kind(p, lr=RATE), reset, tmp_path, False)
    assert "keep" not in str(error.value).replace("keeps", "")


def test_a_trial_leaves_the_optimizer_alone(tmp_path) -> None:
    parameter, other = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    parameter.grad = torch.ones(5, 3)
    optimizer = adafactor([{"params": [other], "beta1": None}, {"params": [parameter]}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)  # puts its own step on it
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    tried = try_state(optimizer, [parameter])
    assert [set(state) >= {"exp_avg", "exp_avg_sq_row"} for _, state in tried.kept] == [False, True]
    assert not optimizer.state
    assert not called
    assert torch.equal(parameter, torch.ones(5, 3))
    assert [group["params"][0] is p for group, p in zip(optimizer.param_groups, (other, parameter), strict=True)]
    optimizer.step()
    scheduler.step()
    assert optimizer.state[parameter]
    assert try_state(torch.optim.LBFGS([parameter]), [parameter]) is None  # which wants a closure


def test_a_trained_parameter_that_the_optimizer_lacks_is_named(tmp_path) -> None:
    model = make_net()

    def without_head(parameters):
        return torch.optim.AdamW([p for n, p in model.named_parameters() if p.requires_grad and "head" not in n])

    with pytest.raises(ValueError, match=r"head.modules_to_save.default.weight is trained, but the optimizer does not"):
        bind(without_head, "zero", tmp_path, False, model)


@pytest.mark.long
@pytest.mark.parametrize("saves", [True, False])
def test_the_callback_knows_whether_checkpoints_are_written(saves: bool, tmp_path) -> None:
    model = make_model()
    args = make_arguments(tmp_path, save_strategy="steps" if saves else "no")
    optimizer = adafactor([p for p in model.parameters() if p.requires_grad])
    config = SRLoRAConfig(target_rank=8, optimizer_reset="first_moment", svd_cache=str(tmp_path / "svd"))
    trainer = transformers.Trainer(
        model, args, train_dataset=samples(), callbacks=[SRLoRACallback(config)], optimizers=(optimizer, None)
    )
    if saves:
        with pytest.raises(ValueError, match="exp_avg_sq_row of Adafactor is kept.*a checkpoint needs"):
            trainer.train()
        assert trainer.state.global_step == 0
    else:
        with pytest.warns(UserWarning, match="exp_avg_sq_row of Adafactor is kept.*a checkpoint needs"):
            trainer.train()
