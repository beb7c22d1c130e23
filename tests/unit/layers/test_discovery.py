"""Which layers are worked on, which are left alone, which are refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.method.directions import OriginalWeights

TOKENS = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(3))


def gpt2() -> nn.Module:
    """Conv1D layers, a fused QKV among them, and an embedding that is tied to the head."""
    torch.manual_seed(0)
    sizes = {"n_embd": 12, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=True))


def train(model: nn.Module, cache, steps: int = 8, **options) -> Switcher:
    """A few steps with switches on the tokens; the function is kept at each."""
    switcher = Switcher(model, SRLoRAConfig(target_rank=8, svd_cache=str(cache / "svd"), **options), steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model(TOKENS).logits.detach()
    switcher.bind(model, optimizer)
    for _ in range(steps):
        after = model(TOKENS).logits.detach()
        assert (after - before).norm() <= 1e-5 * before.norm()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = model(TOKENS).logits.detach()
        switcher.step()
    assert switcher.num_switches > 1
    return switcher


@pytest.mark.long
@pytest.mark.parametrize("fusion", ["in_place", "adapter"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_decoder_keeps_its_function_and_exports(make, fusion: str, tmp_path) -> None:
    base = make()
    embedding = base.get_input_embeddings().weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    switcher = train(model, tmp_path, fusion=fusion)
    assert not any("head" in site.name for site in switcher.sites)
    assert torch.equal(base.get_input_embeddings().weight, embedding)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    if make is gpt2:
        shapes = {site.name.split(".")[-1]: site.shape for site in switcher.sites}
        assert shapes["c_attn"] == (36, 12)
        assert all(site.transposed for site in switcher.sites)
    switcher.export(tmp_path / "adapter")
    exported = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    torch.testing.assert_close(exported(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert "weights in **float32**" in (tmp_path / "adapter" / "README.md").read_text()


def test_directions_of_a_transposed_layer_come_from_the_original_checkpoint(tmp_path) -> None:
    gpt2().save_pretrained(tmp_path / "original")
    model = get_peft_model(gpt2(), LoraConfig(r=4, target_modules="all-linear"))
    switcher = train(model, tmp_path, directions_from=str(tmp_path / "original"))
    original = dict(gpt2().named_parameters())["transformer.h.0.attn.c_attn.weight"].T
    read = OriginalWeights(tmp_path / "original").read(switcher.sites[0])
    assert switcher.sites[0].name.endswith("c_attn")
    assert torch.equal(read, original)


@pytest.mark.long
def test_only_the_named_adapter_is_touched(tmp_path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".other." in name}
    switcher = train(model, tmp_path, fusion="adapter")
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(after[name].requires_grad for name in before)
    switcher.export(tmp_path / "adapter")
    exported = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    exported.load_adapter(_save_other(model, tmp_path), "other")
    exported.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(exported(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def _save_other(model: PeftModel, folder) -> str:
    model.save_pretrained(folder / "saved", selected_adapters=["other"])
    return str(folder / "saved" / "other")


class Experts(nn.Module):
    """The weights of several experts in one tensor, as mixture-of-experts models hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eij,...j->...i", self.experts, x)


REFUSED = {
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 8)), {"target_modules": ["0"]}),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), {"target_modules": ["0"]}),
    "experts": (
        lambda: nn.ModuleDict({"0": Experts()}),
        {"target_modules": [], "target_parameters": ["0.experts"], "lora_dropout": 0},
    ),
    "a parameter of a linear layer": (
        lambda: nn.Sequential(nn.Linear(8, 8)),
        {"target_modules": [], "target_parameters": ["0.weight"]},
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_layers_are_refused_by_name(kind: str) -> None:
    make, options = REFUSED[kind]
    model = get_peft_model(make(), LoraConfig(r=2, **options))
    with pytest.raises(ValueError, match="layer that (is not a linear layer|PEFT adapts as a bare tensor.*): 0"):
        Switcher(model, SRLoRAConfig(target_rank=4), 10)
