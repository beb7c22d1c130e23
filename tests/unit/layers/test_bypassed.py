"""Layers that a model does not use as PEFT expects: found by their structure, or when the first batch comes."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.export import export_checkpoint
from srlora_dist.checkpoint.format import find_checkpoint

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


class Reads(nn.Module):
    """Reads the weight of one layer instead of calling it, always or in one mode, as Swin, WavLM and Mamba do."""

    def __init__(self, modes: tuple[bool, ...] = (True, False)) -> None:
        super().__init__()
        self.modes = modes
        self.f, self.q, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        x = functional.linear(x, self.q.weight, self.q.bias) if self.training in self.modes else self.q(x)
        return self.last(torch.tanh(x))


class SideOutput(Reads):
    """Only its second output tensor depends on the layer."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.f(x)
        return {"logits": self.last(x), "masks": [functional.linear(x, self.q.weight)]}


class KeepsInList(Reads):
    """Calls the layer that it had put into a list before PEFT came, as MaskFormer does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.q]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.kept[0](self.f(x))))


BYPASSES = {
    "read": Reads,
    "read in evaluation mode": lambda: Reads((False,)),
    "read in training mode": lambda: Reads((True,)),
    "a second output": SideOutput,
    "kept in a list": KeepsInList,
}


def step(model: nn.Module, optimizer, switcher, seed: int = 3):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))
    output = model(x)
    tensors = [output] if torch.is_tensor(output) else [output["logits"], *output["masks"]]
    optimizer.zero_grad()
    sum(tensor.square().mean() for tensor in tensors).backward()
    optimizer.step()
    return switcher.step()


def all_outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        found = [mode(model)(INPUTS.clone()) for mode in (nn.Module.eval, nn.Module.train)]
    return [t for out in found for t in ([out] if torch.is_tensor(out) else [out["logits"], *out["masks"]])]


def largest_change(now: list[Tensor], before: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(now, before, strict=True))


@pytest.mark.parametrize("fusion", ["in_place", "adapter"])
@pytest.mark.parametrize("kind", BYPASSES)
def test_a_layer_that_the_first_batch_bypasses_is_left_out(kind: str, fusion: str, tmp_path) -> None:
    torch.manual_seed(0)
    base = BYPASSES[kind]()
    untouched = copy.deepcopy(base)
    model = adapt(base)
    before, weight = all_outputs(model), base.q.weight.clone()
    optimizer, switcher = bind(model, tmp_path / "svd", fusion=fusion)
    left_out = fusion == "in_place"  # a weight that is never written does no harm
    with (
        contextlib.nullcontext()
        if not left_out
        else pytest.warns(UserWarning, match=r"leaves out q \(a layer that the")
    ):
        model.train()(INPUTS.clone())
    assert largest_change(all_outputs(model), before) < 4e-6
    torch.testing.assert_close(base.q.weight, weight, rtol=0, atol=1e-6)
    reports = [step(model, optimizer, switcher, seed) for seed in range(8)]
    switched = [part.site for report in reports if report for part in report.sites]
    assert sum(report is not None for report in reports) >= 3
    assert set(switched) == ({"f", "last"} if left_out else {"f", "q", "last"})
    switcher.export(tmp_path / "adapter")
    switcher.save_checkpoint(tmp_path / "checkpoints")
    exported = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "adapter")
    assert largest_change(all_outputs(exported), all_outputs(model)) < 4e-6
    export_checkpoint(find_checkpoint(tmp_path / "checkpoints"), tmp_path / "again")
    exported = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "again")
    assert largest_change(all_outputs(exported), all_outputs(model)) < 4e-6
    resumed = adapt(untouched)
    config = SRLoRAConfig(target_rank=12, svd_cache=str(tmp_path / "svd"), fusion=fusion)
    again = Switcher(resumed, config, 8)
    again.bind(
        resumed, torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad]), tmp_path / "checkpoints"
    )
    assert [site.state.left_out for site in again.sites] == [False, left_out, False]
    assert largest_change(all_outputs(resumed), all_outputs(model)) < 4e-6


@pytest.mark.parametrize("start", ["pissa", "zero_b"])
def test_a_layer_that_the_first_batch_bypasses_is_refused_where_it_was_named(start: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = adapt(Reads(), ["q", "last"])
    before = all_outputs(model)
    optimizer, switcher = bind(model, tmp_path, start=start)
    with pytest.raises(ValueError, match="the model never calls, for it reads the weight: q; leave it out"):
        step(model, optimizer, switcher)
    assert largest_change(all_outputs(model), before) < 4e-6


class Twice(Reads):
    """Calls a layer and reads its weight too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        return self.last(torch.tanh(self.q(x) + functional.linear(x, self.q.weight)))


class Remembers(Reads):
    """Holds on to a weight, so that nobody sees it read."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.q.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(functional.linear(self.f(x), self.weights[0])))


@pytest.mark.parametrize("base", [Twice, Remembers])
def test_a_weight_that_is_used_in_another_way_stops_the_run_before_its_first_step(base, tmp_path) -> None:
    torch.manual_seed(0)
    model = adapt(base())
    before, factors = all_outputs(model), [p.clone() for p in model.parameters() if p.requires_grad]
    optimizer, switcher = bind(model, tmp_path)
    with pytest.raises(ValueError, match=r"switch 0 changed the output on the first batch by .* was undone.*\bq\b"):
        step(model, optimizer, switcher)
    assert largest_change(all_outputs(model), before) < 4e-6
    assert len(factors) == 6


def fuse_kernels(model: nn.Module) -> None:
    """Compute a layer as fused LoRA kernels do, from the first active adapter alone."""
    layer = model.base_model.model.q

    def forward(x: Tensor) -> Tensor:
        name = layer.active_adapters[0]
        pairs = layer.lora_B[name].weight @ layer.lora_A[name].weight
        return functional.linear(x, layer.base_layer.weight + layer.scaling[name] * pairs, layer.base_layer.bias)

    layer.forward = forward


def test_a_kernel_that_knows_one_adapter_is_refused_beside_a_second(tmp_path) -> None:
    for fusion in ("adapter", "in_place"):
        model = adapt(Reads(()))
        fuse_kernels(model)
        optimizer, switcher = bind(model, tmp_path, fusion=fusion)
        if fusion == "in_place":
            step(model, optimizer, switcher)
            continue
        with pytest.raises(ValueError, match="switch fused LoRA kernels off"):
            step(model, optimizer, switcher)


class Unrouted(nn.Module):
    """Of two experts a batch takes one, of which the type of the weight is read; dropout, and averages that move."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return self.drop(self.norm(self.experts[0](x.to(self.experts[0].weight.dtype))))


@pytest.mark.parametrize("check_switch", [False, True])
def test_a_site_that_is_not_routed_to_stays_and_the_check_leaves_no_trace(check_switch: bool, tmp_path) -> None:
    torch.manual_seed(0)
    base = Unrouted()
    model = adapt(base)
    _, switcher = bind(model, tmp_path, check_switch=check_switch)
    torch.manual_seed(5)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_pre_hooks.clear()
    wanted, random = plain.train()(INPUTS.clone()), torch.rand(3)
    weights = [layer.base_layer.weight.clone() for layer in base.experts]
    torch.manual_seed(5)
    base.num_calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model.train()(INPUTS.clone())
    assert base.num_calls == (4 if check_switch else 3)
    assert torch.equal(got, wanted)
    assert torch.equal(torch.rand(3), random)
    assert torch.equal(base.norm.running_mean, plain.base_model.model.norm.running_mean)
    assert all(map(torch.equal, weights, [layer.base_layer.weight for layer in base.experts]))
    got.sum().backward()
    switcher.storage.optimizer.step()
    assert not any(site.state.left_out for site in switcher.sites)
    base.num_calls = 0
    model(INPUTS.clone())
    assert base.num_calls == 1


@pytest.mark.long
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_checked_as_it_was_written_and_compiles_without_a_break(in_place: bool, tmp_path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapt(Reads())
    config = SRLoRAConfig(target_rank=12, svd_cache=str(tmp_path))
    switcher = Switcher(model, config, 8)
    compiled = model if in_place else torch.compile(model, backend="eager", fullgraph=True)
    if in_place:
        model.compile(backend="eager", fullgraph=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    switcher.bind(compiled, optimizer)
    with pytest.warns(UserWarning, match="leaves out q"):
        step(compiled, optimizer, switcher)
    step(compiled, optimizer, switcher)
    assert [site.state.left_out for site in switcher.sites] == [False, True, False]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_autocast_is_no_reason_to_refuse_what_only_rounds(tmp_path) -> None:
    model = adapt(Reads(()))
    optimizer, switcher = bind(model, tmp_path, fusion="adapter")
    with torch.autocast("cpu", torch.bfloat16):
        change = model(INPUTS.clone())
    assert change.dtype == torch.bfloat16
    assert switcher.first_batch_change > 1e-4  # more than float32 would round
    step(model, optimizer, switcher)
    assert not any(site.state.left_out for site in switcher.sites)


def test_a_model_that_trains_in_evaluation_mode_is_checked(tmp_path) -> None:
    model = adapt(Reads(), ["q", "last"]).eval()
    optimizer, switcher = bind(model, tmp_path)
    with pytest.raises(ValueError, match="the model never calls, for it reads the weight: q"):
        step(model, optimizer, switcher)


class Counts(Reads):
    """Gives something else at each call, in both modes."""

    num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return self.last(self.q(self.f(x.to(self.q.weight.dtype)))) * self.num_calls


class Averages(Reads):
    """Puts another tensor into the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return self.last(self.q(self.f(x.sub_(self.mean))))


class Penalised(Reads):
    """Takes a gradient while it computes, which needs that gradients are on, and its labels out of what it gets."""

    def forward(self, batch: dict) -> Tensor:
        x = batch.pop("x").requires_grad_()
        y = self.last(torch.tanh(self.q(self.f(x))))
        return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum()


class Modal(Reads):
    """Asks a layer that this batch does not need for its type."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.f(x.to(self.q.weight.dtype))))


@pytest.mark.parametrize("base", [Counts, Averages, Penalised, Modal])
@pytest.mark.parametrize("names", ["all-linear", ["f", "q", "last"]])
def test_a_healthy_model_trains_as_without_the_check(base, names, tmp_path, caplog) -> None:
    outputs = []
    for checks in (False, True):
        torch.manual_seed(0)
        model = adapt(base(), names)
        optimizer, switcher = bind(model, tmp_path)
        if not checks:
            switcher._bound.first_batch.close()
        x = INPUTS.clone()
        output = model({"x": x} if base is Penalised else x)
        output.square().mean().backward()
        optimizer.step()
        switcher.step()
        outputs.append(output.detach())
        assert not any(site.state.left_out for site in switcher.sites)
    assert base is Counts or torch.equal(*outputs)
    assert ("not checked" in caplog.text) == (base in (Counts, Penalised))


def test_a_model_is_saved_whole_between_bind_and_the_first_step(tmp_path) -> None:
    model = adapt(Reads(()))
    optimizer, switcher = bind(model, tmp_path)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(INPUTS.clone()), model(INPUTS.clone()))
    step(model, optimizer, switcher)
