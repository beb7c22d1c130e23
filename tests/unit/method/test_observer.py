"""What a step without a switch costs, counted at the dispatcher and not timed: waits, memory, operators."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.method import importance

WIDTH, RANK, NUM_STEPS = 16, 4, 40
# They make a host wait for a device, or copy to it.
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
PAIRS_LOOKED_AT = ["cat", "sub", "abs_", "add_", "cat"]  # before the step and after it, for all sites together
OPERATORS_A_GROUP = 8  # product, flatten, abs, two lerps, difference, abs, and one to spare


class Operators(TorchDispatchMode):
    """Notes what is called; the waits and the bytes of results that lie in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        made = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(result)}
        fresh = [size for storage, size in made.items() if storage not in known]
        views = func.is_view or name in ("detach", "_unsafe_view")
        if not views:
            self.names.append(name)
        self.num_bytes += sum(fresh)
        copies_to_cpu = name in ("_to_copy", "copy_") and str((kwargs or {}).get("device")) == "cpu"
        if name in WAITS or copies_to_cpu:
            self.waits.append(name)
        return result


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Training:
    """A stack of sites in training, whose hook and ``step()`` are watched on each step."""

    def __init__(self, num_sites: int, folder, **options) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_sites)))
        names = [str(number) for number in range(num_sites)]
        self.model = get_peft_model(net, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
        config = SRLoRAConfig(target_rank=8, fusion_ratio=0.5, svd_cache=str(folder), **options)
        self.switcher = Switcher(self.model, config, NUM_STEPS)  # a switch after step 20
        factors = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(factors, lr=1e-3)
        self.switcher.bind(self.model, self.optimizer)
        self.model(torch.randn(3, WIDTH))
        self.switcher._bound.judge_first_batch()  # once a run
        self.num_elements = sum(factor.numel() for factor in factors)
        (self.hook,) = self.optimizer._optimizer_step_pre_hooks.values()

    def step(self) -> Operators:
        """One step; what SRLoRA itself called in it."""
        self.optimizer.zero_grad()
        self.model(torch.randn(3, WIDTH)).square().mean().backward()
        with Operators() as seen:
            self.hook(self.optimizer, (), {})
        with torch.no_grad():  # as the optimizer would
            for group in self.optimizer.param_groups:
                for factor in group["params"]:
                    factor.sub_(1e-3 * factor.grad)
        with seen:
            assert self.switcher.step() is None
        return seen

    @property
    def num_groups(self) -> int:
        return math.ceil(self.num_elements / importance.GROUP_ELEMENTS["cpu"])


@pytest.mark.parametrize("num_sites", [4, 12])
def test_a_step_waits_for_nothing_and_needs_little_memory(num_sites: int, tmp_path) -> None:
    training = Training(num_sites, tmp_path)
    steps = [training.step() for _ in range(12)]
    for seen in steps:
        assert seen.names  # the counter sees the averages being updated
        assert not seen.waits
        looked_at = 3 * 4 * 16 * 2 * num_sites  # 16 elements per factor, which here has 64
        assert 0 < seen.num_bytes <= 2 * 4 * training.num_elements + looked_at
    assert len({seen.num_bytes for seen in steps}) == 1
    assert len({tuple(seen.names) for seen in steps}) == 1


@pytest.mark.parametrize("elements_a_group", [1 << 16, 512, 128])
def test_operators_are_counted_by_elements_and_not_by_tensors(elements_a_group: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(importance.GROUP_ELEMENTS, "cpu", elements_a_group)  # a factor has 64
    few, many = Training(4, tmp_path), Training(12, tmp_path)
    for training in (few, many):
        num_operators = len(training.step().names) - len(PAIRS_LOOKED_AT)
        assert 0 < num_operators <= OPERATORS_A_GROUP * (training.num_groups + 1)
    if elements_a_group == 1 << 16:  # all in one group
        assert len(few.step().names) == len(many.step().names)


def test_outside_the_window_a_few_elements_are_looked_at(tmp_path) -> None:
    training = Training(4, tmp_path, importance_window=5)
    steps = [training.step() for _ in range(19)]
    assert [seen.names == PAIRS_LOOKED_AT for seen in steps] == [True] * 15 + [False] * 4
    assert not any(seen.waits for seen in steps)
