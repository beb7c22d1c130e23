"""Layers that a model does not use as PEFT expects: found by their structure, or when the first batch comes."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from srlora_dist import SRLoRAConfig, Switcher

INPUTS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Of which PyTorch reads the weight of out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.attn = nn.Linear(16, 16), nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        return self.attn(x, x, x)[0]


class Stack(nn.Module):
    """Of which PyTorch reads linear1 and linear2 in evaluation mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.f(x))


class Two(nn.Module):
    """A plain layer and one that a test changes."""

    def __init__(self, change=lambda layer: layer) -> None:
        super().__init__()
        self.f, self.odd, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.odd = change(self.odd)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.odd(torch.tanh(self.f(x)))))


class Shared(Two):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = self.odd.weight


class FakeQuantised(nn.Linear):
    """Rounds its weight in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, (self.weight * 16).round() / 16, self.bias)


class Spelled(nn.Linear):
    """Its forward pass is its own, and the same."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def as_kind(kind: type[nn.Linear]):
    def change(layer: nn.Linear) -> nn.Linear:
        layer.__class__ = kind
        return layer

    return change


def halved(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, args, output: output / 2)
    return layer


def patched(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: functional.linear(x, layer.weight.sign(), layer.bias)
    return layer


class Wrapped(torch.Tensor):
    """As torchao and quanto keep a weight."""


def wrapped(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped), requires_grad=False)
    return layer


STRUCTURES = {
    "nn.MultiheadAttention": (Attention, ["attn.out_proj"], "nn.MultiheadAttention never calls"),
    "nn.TransformerEncoder": (
        Stack,
        ["encoder.layers.0.linear1", "encoder.layers.0.linear2", "encoder.layers.0.self_attn.out_proj"],
        "nn.TransformerEncoderLayer never calls",
    ),
    "weight_norm": (lambda: Two(weight_norm), ["odd"], "computes its weight from other tensors"),
    "weight norm, parametrised": (lambda: Two(parametrizations.weight_norm), ["odd"], "from other tensors"),
    "spectral_norm": (lambda: Two(spectral_norm), ["odd"], "computes its weight from other tensors"),
    "prune": (lambda: Two(lambda f: prune.l1_unstructured(f, "weight", 0.5)), ["odd"], "from other tensors"),
    "a fake-quantising layer": (lambda: Two(as_kind(FakeQuantised)), ["odd"], "something else than x W"),
    "a hook": (lambda: Two(halved), ["odd"], "something else than x W"),
    "a forward of its own": (lambda: Two(patched), ["odd"], "something else than x W"),
    "a tensor subclass": (lambda: Two(wrapped), ["odd"], "keeps its weight as a .*Wrapped"),
    "a shared weight": (Shared, ["odd", "last"], "shares its weight with others"),
    "no inputs": (lambda: Two(lambda f: nn.Linear(0, 16)), ["odd"], "has no inputs or no outputs"),
}


def adapt(base: nn.Module, names: object = "all-linear", **options) -> nn.Module:
    torch.manual_seed(2)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=names, **options))


def bind(model: nn.Module, cache, **options):
    config = SRLoRAConfig(target_rank=12, svd_cache=str(cache), **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    switcher = Switcher(model, config, num_training_steps=8)
    switcher.bind(model, optimizer)
    return optimizer, switcher


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [mode(model)(INPUTS.clone()) for mode in (nn.Module.eval, nn.Module.train)]


def change(model: nn.Module, before: list[Tensor]) -> float:
    pairs = zip(outputs(model), before, strict=True)
    return max(float((now - then).norm() / then.norm()) for now, then in pairs)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_layer_that_is_not_used_as_one_is_left_out_of_all_linear(kind: str, tmp_path) -> None:
    make, names, what = STRUCTURES[kind]
    torch.manual_seed(0)
    model = adapt(make())
    before = [outputs(model) for _ in range(50)][-1] if kind != "no inputs" else None  # spectral_norm converges
    with pytest.warns(UserWarning, match=f"SRLoRA leaves out .*{names[0]}[^;]*{what}") as caught:
        _, switcher = bind(model, tmp_path)
    assert sum("leaves out" in str(warning.message) for warning in caught) == 1
    found = {site.name for site in switcher.sites}
    assert "f" in found
    assert not found & set(names)
    assert before is None or change(model, before) < 4e-6


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_layer_that_is_not_used_as_one_is_refused_where_it_was_named(kind: str) -> None:
    make, names, what = STRUCTURES[kind]
    model = adapt(make(), ["f", names[0].rpartition(".")[2]])
    with pytest.raises(ValueError, match=f"{what}.*{names[0]}"):
        Switcher(model, SRLoRAConfig(target_rank=12), 8)


def test_a_forward_pass_of_its_own_that_computes_the_same_is_no_fault(tmp_path) -> None:
    model = adapt(Two(as_kind(Spelled)))
    before = outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, switcher = bind(model, tmp_path)
    assert [site.name for site in switcher.sites] == ["f", "odd", "last"]
    assert change(model, before) < 4e-6
