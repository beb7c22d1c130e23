"""What is said of a model whose adapter cannot be worked on: what is so, and the way out."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from srlora_dist import SRLoRAConfig, Switcher

TOKENS = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(3))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50))


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])


def with_add_adapter() -> nn.Module:
    model = llama()
    model.add_adapter(lora())
    return model


WITHOUT_PEFT_MODEL = {
    "add_adapter": with_add_adapter,
    "inject_adapter_in_model": lambda: inject_adapter_in_model(lora(), llama()),
    "mixed": lambda: get_peft_model(llama(), lora(), mixed=True),
    "the inside of a PeftModel": lambda: get_peft_model(llama(), lora()).base_model,
}


@pytest.mark.parametrize("kind", WITHOUT_PEFT_MODEL)
def test_layers_without_a_peft_model_are_called_that(kind: str) -> None:
    with pytest.raises(ValueError, match="no PeftModel around them.*add_adapter.*without adapters.*get_peft_model"):
        Switcher(WITHOUT_PEFT_MODEL[kind](), SRLoRAConfig(target_rank=8), 10)


OTHER_KINDS = {
    "ADALORA": AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["q_proj"]),
    "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_an_adapter_of_another_kind_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=f"'default' is {kind}, and SRLoRA works on LoRA alone.*LoraConfig"):
        Switcher(get_peft_model(llama(), OTHER_KINDS[kind]), SRLoRAConfig(target_rank=8), 10)


def test_a_variant_is_not_called_dora_alone() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="another LoRA variant.*leave out the option of that variant"):
        Switcher(get_peft_model(llama(), config), SRLoRAConfig(target_rank=8), 10)


def start(model: nn.Module, tmp_path, target_rank: int) -> Switcher:
    switcher = Switcher(model, SRLoRAConfig(target_rank=target_rank, svd_cache=str(tmp_path / "svd")), 4)
    switcher.bind(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    return switcher


@pytest.mark.parametrize(("trains", "target_rank"), [(True, 4), (True, 16), (False, 4), (False, 16)])
def test_going_on_from_an_exported_adapter_is_answered_once(trains: bool, target_rank: int, tmp_path) -> None:
    start(get_peft_model(llama(), lora()), tmp_path, 12).export(tmp_path / "adapter")  # of rank 8
    model = PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=trains)
    with pytest.raises(ValueError, match=r"q_proj.*is not freshly initialised.*merge_and_unload\(\).*get_peft_model"):
        start(model, tmp_path, target_rank)

    merged = model.merge_and_unload()
    before = merged(TOKENS).logits.detach()
    again = get_peft_model(merged, lora())
    start(again, tmp_path, 8)
    torch.testing.assert_close(again(TOKENS).logits, before, rtol=1e-4, atol=1e-5)


class Packed(torch.Tensor):
    """As torchao keeps a weight: it says float32, and refuses most operations."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return "Packed()"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"Packed does not implement {function}")


def with_layer(change) -> nn.Module:
    """Two layers, the second of which is changed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), change(nn.Linear(16, 16)))


def packed(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)
    return layer


ODD = {
    "torchao": (packed, "keeps its weight as a .*Packed"),
    "no outputs": (lambda layer: nn.Linear(16, 0), "has no inputs or no outputs"),
    "no inputs": (lambda layer: nn.Linear(0, 16), "has no inputs or no outputs"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("kind", ODD)
def test_a_layer_without_a_matrix_to_factor_is_named(kind: str, tmp_path) -> None:
    change, what = ODD[kind]
    model = get_peft_model(with_layer(change), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.warns(UserWarning, match=rf"leaves out 1 \(a layer that {what}"):
        switcher = start(model, tmp_path, 8)
    assert [site.name for site in switcher.sites] == ["0"]
    model = get_peft_model(with_layer(change), LoraConfig(r=4, target_modules=["1"]))
    with pytest.raises(ValueError, match=f"{what}: 1; .*leave it out of target_modules"):
        start(model, tmp_path, 8)
