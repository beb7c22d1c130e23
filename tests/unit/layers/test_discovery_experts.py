"""Mixtures of experts, whose experts PEFT adapts as whole tensors: plain LoRA there, SRLoRA at the rest."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from srlora_dist import SRLoRAConfig, Switcher
from tests.sweep.harness import make, run
from tests.sweep.test_architectures import CASES


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_experts_stay_plain_lora_and_are_exported(kind: str, tmp_path) -> None:
    outcome = run(CASES[kind], tmp_path)
    assert outcome.kind == "reduced", outcome
    assert outcome.message.count("SRLoRA leaves out") == 1
    assert "mlp.experts, " in outcome.message
    assert "base_layer" not in outcome.message
    assert "a layer that PEFT adapts as a bare tensor" in outcome.message
    assert 0 < outcome.num_sites < outcome.num_adapted


def test_experts_are_trained_at_their_own_rank_and_scale(tmp_path) -> None:
    case = CASES["mixtral"]
    model = get_peft_model(make(case), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    before = {
        name: p.detach().clone() for name, p in model.named_parameters() if "experts" in name and "lora_B" in name
    }
    with pytest.warns(UserWarning, match="SRLoRA leaves out"):
        switcher = Switcher(model, SRLoRAConfig(target_rank=12, svd_cache=str(tmp_path / "svd")), 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    switcher.bind(model, optimizer)
    model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    optimizer.step()
    switcher.step()
    after = dict(model.named_parameters())
    assert before
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_experts_that_the_user_has_named_do_not_stop_the_rest(tmp_path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "w1", "w2", "w3"])
    with pytest.warns(UserWarning, match="SRLoRA leaves out model.layers.0.mlp.experts, "):
        switcher = Switcher(get_peft_model(make(CASES["mixtral"]), lora), SRLoRAConfig(target_rank=8), 10)
    assert [site.name.split(".")[-1] for site in switcher.sites] == ["q_proj", "q_proj"]


def test_experts_alone_are_refused() -> None:
    model = get_peft_model(make(CASES["mixtral"]), LoraConfig(r=4, target_modules=["w1", "w2", "w3"]))
    with pytest.raises(ValueError, match="PEFT adapts as a bare tensor.*mlp.experts, .*leave it out of target_modules"):
        Switcher(model, SRLoRAConfig(target_rank=8), 10)
