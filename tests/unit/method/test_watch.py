"""What changes a model behind the Switcher's back is noticed, and nothing wrong is written; what is harmless is not."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.method.second_adapter import _same_gradients
from tests.ranks.engines import make_batch, make_net
from tests.unit.method.test_switcher import bound, take_steps

NUM_STEPS = 20  # with a target of 10 directions there are switches after steps 6 and 13


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_pairs(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and "fused" not in name:
            parameter.data.copy_(best[name])


def shift(model: nn.Module, best: dict[str, torch.Tensor], through_data: bool = False) -> None:
    weight = model.base_model.model.second.base_layer.weight
    with torch.no_grad():
        (weight.data if through_data else weight)[1, 2] += 0.5


def load_by_accelerate(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    import tempfile

    accelerator = Accelerator(cpu=True)
    other = copy.deepcopy(model)
    other.load_state_dict(best)
    accelerator.prepare(other)
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator._models = [model]
        accelerator.load_state(folder)
    accelerator.free_memory()


def load_pairs(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    other = copy.deepcopy(model)
    other.load_state_dict(best)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def replace_pairs(model: nn.Module, best: dict[str, torch.Tensor]) -> None:
    layer = model.base_model.model.first.lora_A["default"]
    layer.weight = nn.Parameter(layer.weight.detach().clone())


BEHIND = {
    "load_state_dict": (lambda model, best: model.load_state_dict(best), "was changed by something else.*load_state"),
    "assign": (lambda model, best: model.load_state_dict(best, assign=True), "are others than those that bind"),
    "accelerator.load_state": (load_by_accelerate, "was changed by something else"),
    "set_peft_model_state_dict": (load_pairs, "changed by something else"),
    "pairs alone": (write_pairs, "pairs were changed by something else"),
    "one element": (shift, "the weight of second was changed"),
    "one element of .data": (lambda model, best: shift(model, best, True), "the weight of second was changed"),
    "scale": (lambda model, best: model.base_model.model.first.scale_layer(2), "of first is active with scale 1.5 no"),
    "new parameters": (replace_pairs, "the parameters of first are others"),
}


@pytest.mark.long
@pytest.mark.parametrize("fusion", ["in_place", "adapter"])
@pytest.mark.parametrize("how", BEHIND)
def test_a_change_is_noticed_before_anything_is_written(how: str, fusion: str, tmp_path) -> None:
    change, message = BEHIND[how]
    model, optimizer, switcher = bound(tmp_path, steps=NUM_STEPS, target_rank=10, fusion=fusion)
    take_steps(model, optimizer, switcher, 3)
    best = state_of(model)
    take_steps(model, optimizer, switcher, 3)  # with a switch between them
    change(model, best)
    for write in (switcher.export, switcher.save_checkpoint):
        with pytest.raises(RuntimeError, match=message):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if how != "assign":  # the optimizer steps what the model does not use
        with pytest.raises(RuntimeError, match=message):
            take_steps(model, optimizer, switcher, 8)  # to the next switch at the latest
        assert switcher.num_switches == 2


@pytest.mark.long
def test_what_does_no_harm_is_not_refused(tmp_path) -> None:
    model, optimizer, switcher = bound(tmp_path, steps=NUM_STEPS, target_rank=10)
    for number in range(NUM_STEPS):
        take_steps(model, optimizer, switcher, 1)
        if number < NUM_STEPS // 2:
            model.load_state_dict(state_of(model))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        kept = state_of(model)
        with torch.no_grad():  # an average of the pairs, for an evaluation
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(0.5)
            model.eval()(make_batch(0)[0])
            write_pairs(model, kept)
        if number >= NUM_STEPS // 2:
            model.train().merge_adapter()
            model.unmerge_adapter()
        switcher.save_checkpoint(tmp_path / "checkpoints")
    switcher.export(tmp_path / "adapter")
    assert switcher.num_switches == 3


def test_an_optimizer_that_was_made_anew_is_noticed(tmp_path) -> None:
    model, _, switcher = bound(tmp_path, steps=NUM_STEPS, target_rank=10)
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(RuntimeError, match="another optimizer, which bind.. has to get"):
        take_steps(model, other, switcher, 12)
    with pytest.raises(RuntimeError, match="another optimizer, which bind.. has to get"):
        switcher.export(tmp_path / "adapter")


def test_micro_batches_and_overflows_are_no_other_optimizer(tmp_path) -> None:
    model, optimizer, switcher = bound(tmp_path, steps=NUM_STEPS, target_rank=10)
    for number in range(64):
        (model(make_batch(number)[0])).square().mean().backward()
        assert switcher.step() is None
    take_steps(model, optimizer, switcher, 4)
    assert switcher.num_steps == 4


def test_a_plan_after_bind_and_a_second_bind_are_refused(tmp_path) -> None:
    model, optimizer, switcher = bound(tmp_path, steps=NUM_STEPS, target_rank=10)
    with pytest.raises(RuntimeError, match="set_num_steps.. before switcher.bind"):
        switcher.set_num_steps(100)
    with pytest.raises(RuntimeError, match="bind.. was called before"):
        switcher.bind(model, optimizer)


@pytest.mark.parametrize("start", ["pissa", "zero_b"])
def test_the_edited_weight_is_refused_as_a_reference(start: str, tmp_path) -> None:
    x = make_batch(0)[0]
    for fusion in ("in_place", "adapter"):
        model = make_net()
        pretrained = model.base_model.model(x).detach()
        _, optimizer, switcher = bound(tmp_path, model, NUM_STEPS, target_rank=10, fusion=fusion, start=start)
        take_steps(model, optimizer, switcher, 2)
        model.base_model.model.head.modules_to_save["default"].requires_grad_(True)
        for num_steps in (2, 6):
            take_steps(model, optimizer, switcher, num_steps - switcher.num_steps)
            is_edited = fusion == "in_place" and (start == "pissa" or num_steps == 6)
            copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # as a reference model is made
            torch.testing.assert_close(copied(x), model(x))
            with model.disable_adapter():
                if is_edited:
                    with pytest.raises(RuntimeError, match="disable_adapter.*fusion: adapter"):
                        model(x)
                else:
                    torch.testing.assert_close(model(x), pretrained)


def test_switches_that_did_not_happen_are_named_by_the_export(tmp_path) -> None:
    model, optimizer, switcher = bound(tmp_path, steps=NUM_STEPS, target_rank=10)
    take_steps(model, optimizer, switcher, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switcher.export(tmp_path / "midway", is_last=False)
    with pytest.warns(UserWarning, match="1 of 2 switches have not happened.*20 optimizer steps and there were 12"):
        switcher.export(tmp_path / "adapter")
    take_steps(model, optimizer, switcher, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switcher.export(tmp_path / "adapter")


@pytest.mark.parametrize("until", [1.0, 0.8])
def test_switches_beyond_the_directions_are_left_out_with_a_warning(until: float, tmp_path) -> None:
    options = {"target_rank": 8, "num_switches": 7, "switch_until": until, "ledger_dir": str(tmp_path / "ledger")}
    with pytest.warns(
        UserWarning, match="num_switches is 7, but the directions of srlora.target_rank 8 are used up by 2"
    ):
        model, optimizer, switcher = bound(tmp_path, steps=NUM_STEPS, **options)
    reports = take_steps(model, optimizer, switcher, NUM_STEPS)
    assert len(reports) == len(switcher.due_steps) == 2
    assert all(part.slots for report in reports for part in report.sites)
    assert len(list((tmp_path / "ledger").iterdir())) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Switcher(make_net(), SRLoRAConfig(target_rank=8, num_switches=7, exhausted="wrap"), NUM_STEPS)


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    on_modules = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return on_modules + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize("fusion", ["in_place", "adapter"])
def test_close_removes_every_hook(fusion: str, tmp_path) -> None:
    model = make_net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = hooks_of(model, optimizer)
    options = {"fusion": fusion, "target_rank": 10, "check_switch": True}
    _, _, switcher = bound(tmp_path, model, NUM_STEPS, optimizer, **options)
    take_steps(model, optimizer, switcher, 6)
    assert hooks_of(model, optimizer) > before
    switcher.close()
    assert hooks_of(model, optimizer) == before
    switcher.export(tmp_path / "adapter", is_last=False)
    switcher.close()
    with pytest.raises(RuntimeError, match="step.. came after switcher.close"):
        switcher.step()


def test_gradients_are_put_back_after_an_error(tmp_path) -> None:
    layer = make_net().base_model.model.first
    with pytest.raises(AttributeError), _same_gradients(layer):
        layer.requires_grad_(True).no_such_method()
    assert not layer.base_layer.weight.requires_grad
