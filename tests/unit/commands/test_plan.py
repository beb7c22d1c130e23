"""The command ``srlora plan``: its options and errors, models of all kinds, and what it counts of quantised weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, DebertaV2Config, GPT2Config, LlamaConfig, ViTConfig, WhisperConfig

from srlora_dist.commands.cli import main
from srlora_dist.commands.plan.blueprint import pack
from srlora_dist.commands.plan.communication import Message
from srlora_dist.commands.plan.roofline import DEVICES, svd_seconds, wire_seconds
from srlora_dist.config.run import ModelOptions
from tests.ranks.engines import quantised
from tests.ranks.test_plan_bytes import held, scales_of

SMALL = {
    "llama": LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        architectures=["LlamaForCausalLM"],
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=50, architectures=["GPT2LMHeadModel"]),
    "bert": BertConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        architectures=["BertModel"],
    ),
    "deberta": DebertaV2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        pooler_hidden_size=64,
        architectures=["DebertaV2Model"],
    ),
    "vit": ViTConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        architectures=["ViTModel"],
    ),
}
# Of BERT with the pooler, which is pretrained; heads are left out.
NUM_SITES = {"llama": 14, "gpt2": 8, "bert": 13, "deberta": 12, "vit": 12}
WHOLE = {"bert": 2 * 65, "deberta": 2 * 65 + 64 * 65, "vit": 2 * 65}
"""Trained elements of the heads."""


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_configuration_alone_is_planned(kind: str, given: str, tmp_path, capsys) -> None:
    SMALL[kind].save_pretrained(tmp_path)
    model = tmp_path if given == "folder" else tmp_path / "config.json"
    assert main(["plan", f"--model={model}", "--engine", "zero2", "--world-size", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sites"] == NUM_SITES[kind]
    pairs = 8 * {"llama": 2 * (4 * 128 + 3 * 160), "gpt2": 2 * (256 + 128 + 2 * 320), "bert": 128}.get(kind, 0)
    pairs += 8 * 2 * (4 * 128 + 2 * 160) * (kind in WHOLE)
    assert plan["trained_parameters"] == pairs + WHOLE.get(kind, 0)
    held_by_0 = plan["held"]["rank 0"]
    assert held_by_0["base_weights"] == plan["model_bytes"] < held_by_0["device_total"]
    assert main(["plan", "--model", str(model), "--engine", "zero2", "--world_size", "4"]) == 0
    assert "estimate, not measured" in capsys.readouterr().out


WRONG = {
    "is 0: choose 1 to": ["--model", "llama-7b", "--world-size", "0"],
    "required: model": [],
    "lora.rank is 5000, but no matrix of the model": ["--model=llama-7b", "--rank=5000", "--target-rank=6000"],
    "int8, which FSDP2 cannot cut": ["--model=llama-7b", "--engine=fsdp2", "--quantization=int8"],
    "model 'no/such' has no configuration": ["--model", "no/such"],
    "srlora.target_rank 4 is below the LoRA rank": ["--model", "llama-7b", "--target-rank", "4"],
    "which engine plain is not for: choose ddp": ["--model", "llama-7b", "--engine", "plain"],
    "unrecognized arguments": ["--model", "llama-7b", "--sise", "3"],
}


@pytest.mark.long
@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_one_line_and_status_2(message: str, capsys) -> None:
    assert main(["plan", *WRONG[message]]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("srlora: error: ")
    assert message in printed


@pytest.mark.parametrize("precision", ["nf4", "nf4-double", "fp4", "int8"])
def test_a_quantised_weight_is_counted_as_bitsandbytes_stores_it(precision: str) -> None:
    layer = quantised(torch.nn.Linear(200, 300, bias=False), precision)
    kind, _, double = precision.partition("-")
    stored = pack((300, 200), ModelOptions(quantization=kind, double_quantization=bool(double)))
    assert layer.weight.numel() * layer.weight.element_size() == stored.numel * stored.element_size
    assert held(scales_of(layer), set()) == stored.beside


@pytest.mark.long
def test_a_model_of_another_kind_is_refused_without_a_list_of_all_kinds(tmp_path, capsys) -> None:
    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "cannot be built from its configuration" in message
    assert "BertConfig" not in message


@pytest.mark.long
def test_moments_are_those_of_the_optimizer(tmp_path, capsys) -> None:
    SMALL["bert"].save_pretrained(tmp_path)
    states = {}
    for optimizer in ("adamw", "sgd"):
        main(["plan", "--model", str(tmp_path), "--engine", "zero0", "--optimizer", optimizer, "--json"])
        states[optimizer] = json.loads(capsys.readouterr().out)["held"]["rank 0"]["optimizer_state"]
        main(["plan", "--model", str(tmp_path), "--engine", "zero0", "--optimizer", optimizer])
        assert f"| optimizer state ({optimizer}) |" in capsys.readouterr().out
    assert states["adamw"] * 2 == states["sgd"] * 3  # with a copy in float32 of what is trained in 16 bits


def test_estimates_grow_with_the_work() -> None:
    device = DEVICES["a100"]
    assert svd_seconds((4096, 4096), 32, device) < svd_seconds((4096, 4096), 64, device)
    assert svd_seconds((4096, 4096), 257, device) == svd_seconds((4096, 4096), 4096, device)
    message = Message("all-reduce", 2**30, "factors")
    assert 0 == wire_seconds([message], 1, device) < wire_seconds([message], 2, device)
    assert wire_seconds([message], 64, device) < 2 * 2**30 / device.network * 2
