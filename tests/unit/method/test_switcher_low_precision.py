"""16-bit weights that are edited in place, and the second adapter, over many switches."""

from __future__ import annotations

import logging

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.method.directions import OriginalWeights
from tests.ranks.engines import dequantised, quantised


def net(dtype: torch.dtype, shape: tuple[int, int] = (530, 510), rank: int = 2, precision: str = "") -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Tanh(), nn.Linear(shape[0], 3)).to(dtype)
    if precision:
        layers[0] = quantised(layers[0], precision)
    return get_peft_model(layers, LoraConfig(r=rank, lora_alpha=3, target_modules=["0"]))


def run(model: nn.Module, dtype: torch.dtype, cache, target: int, **options) -> tuple[Switcher, list[float]]:
    """One switch a step; gives the relative change of the output at each."""
    num_switches = max(0, target - 2)
    config = SRLoRAConfig(target_rank=target, svd_cache=str(cache), **options)
    switcher = Switcher(model, config, num_switches + 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    generator = torch.Generator().manual_seed(2)
    width = switcher.sites[0].shape[1]
    x, y = torch.randn(4, width, generator=generator).to(dtype), torch.randn(4, 3, generator=generator)
    changes = []
    with torch.no_grad():
        before = model(x).float()
    switcher.bind(model, optimizer)
    for _ in range(num_switches + 1):
        with torch.no_grad():
            changes.append(float((model(x).float() - before).norm() / before.norm()))
        optimizer.zero_grad()
        (model(x).float() - y).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            before = model(x).float()
        switcher.step()
    return switcher, changes


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
def test_a_16_bit_weight_is_one_rounding_off_the_ledger(dtype: torch.dtype, most: float, tmp_path) -> None:
    model = net(dtype, (40, 72))
    weight = model.base_model.model[0].base_layer.weight
    start = weight.detach().double()
    switcher, changes = run(model, dtype, tmp_path, 38)
    assert switcher.num_switches == 36
    assert max(changes) < 4 * most
    left, right = switcher.ledger.factors(["0"])["0"]
    exact = start + switcher.sites[0].scale * left.double() @ right.double()
    high, low = weight.detach().double(), switcher.storage.residuals[0].double().view_as(weight)
    assert (high + low - exact).norm() < 1e-4 * exact.norm()  # the sum itself does not drift
    assert (high - exact).norm() < most * exact.norm()  # and what the model computes with is its rounding


@pytest.mark.parametrize("rows", [64, 72])  # bitsandbytes repacks multiples of 32, and fails at others
def test_an_evaluation_between_steps_leaves_a_4_bit_weight_alone(rows: int, tmp_path) -> None:
    model, x = net(torch.float32, (rows, 64), precision="nf4"), torch.randn(4, 64)
    payload = model.base_model.model[0].base_layer.weight.detach().clone()
    switcher = Switcher(model, SRLoRAConfig(target_rank=6, svd_cache=str(tmp_path)), 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    switcher.bind(model, optimizer)
    for _ in range(8):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        switcher.step()
        trained = model(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), trained)
        model.train()
    assert torch.equal(model.base_model.model[0].base_layer.weight, payload)


def test_a_quantised_head_is_refused() -> None:
    # As transformers leaves a head that the checkpoint lacks: of the class of 4-bit layers, with a weight that is not.
    layers = nn.Sequential(nn.Linear(72, 40), bitsandbytes.nn.Linear4bit(40, 3))
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    with pytest.raises(ValueError, match="train a quantised layer: 1; load.*llm_int8_skip_modules="):
        Switcher(model, SRLoRAConfig(target_rank=8), 10)


def test_a_payload_that_an_engine_has_cast_is_refused() -> None:
    model = net(torch.float32, (40, 72), precision="nf4")
    weight = model.base_model.model[0].base_layer.weight
    weight.data = weight.data.to(torch.float16)  # what DeepSpeed does to a payload of another float type
    with pytest.raises(ValueError, match="payload of 0 was stored as torch.uint8 and is torch.float16 now"):
        Switcher(model, SRLoRAConfig(target_rank=8), 10)


@pytest.mark.parametrize("precision", ["nf4", "nf4-double", "fp4", "int8"])
def test_a_quantised_weight_is_never_written_and_nothing_is_lost(precision: str, tmp_path) -> None:
    model = net(torch.float32, (40, 72), precision=precision)
    layer = model.base_model.model[0].base_layer
    payload, start = layer.weight.detach().clone(), dequantised(layer, precision).double()
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    switcher, changes = run(model, torch.float32, tmp_path, 38)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == num_trainable
    assert switcher.num_switches == 36
    assert max(changes) < 1e-5
    assert torch.equal(layer.weight, payload)
    site = switcher.sites[0]
    assert site.fused_rank == 2 * 38 - 2
    assert site.state.num_fused == 2 * 37 - 2  # the last switch would fall on the end
    left, right = switcher.ledger.factors(["0"])["0"]
    stands_for = start + site.scale * site.fused_b.double() @ site.fused_a.double()
    assert (start + site.scale * left.double() @ right.double() - stands_for).norm() < 1e-6 * start.norm()


def test_fused_pairs_are_exact_copies_of_what_was_trained(tmp_path) -> None:
    model = net(torch.bfloat16, (40, 72), rank=1).bfloat16()
    switcher, _ = run(model, torch.bfloat16, tmp_path, 2, fusion="adapter")
    site = switcher.sites[0]
    assert site.fused_a.dtype == site.lora_a.dtype == torch.bfloat16
    assert switcher.storage.residuals == {}
    trained = site.lora_a.detach().clone(), site.lora_b.detach().clone()
    switcher._switch([[0]], [torch.ones(1)])
    assert torch.equal(site.fused_a[1], trained[0][0])  # in full, and what it was started with was taken out of W
    assert torch.equal(site.fused_b[:, 1], trained[1][:, 0])
    assert torch.equal(site.fused_a[2], site.lora_a[0])
    assert torch.equal(site.fused_b[:, 2], -site.lora_b[:, 0])


@pytest.mark.parametrize("budget", [6, 20])
def test_a_second_adapter_over_its_budget_is_compressed_and_says_by_how_much(budget: int, tmp_path, caplog) -> None:
    model = net(torch.float32, (40, 72))
    with caplog.at_level(logging.WARNING):
        switcher, changes = run(model, torch.float32, tmp_path, 20, fusion="adapter", fused_rank=budget)
    site = switcher.sites[0]
    assert site.fused_a.shape[0] == site.state.num_fused == budget
    assert "second adapters were compressed to srlora.fused_rank, largest relative error" in caplog.text
    switcher.export(tmp_path / "adapter")  # what the model holds, not what it would hold without the budget
    x = torch.randn(5, 72)
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(72, 40), nn.Tanh(), nn.Linear(40, 3))
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "adapter")(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_budget_below_the_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="fused_rank 3 is below the LoRA rank of 0 .r=4."):
        Switcher(net(torch.float32, (40, 72), 4), SRLoRAConfig(target_rank=8, fusion="adapter", fused_rank=3), 10)


@pytest.mark.filterwarnings("ignore:srlora.target_rank")
def test_a_matrix_with_fewer_directions_than_pairs_keeps_its_function_beside_a_second_adapter(tmp_path) -> None:
    model, x = net(torch.float32, (3, 20), rank=5), torch.randn(4, 20)
    before = model(x)
    switcher = Switcher(model, SRLoRAConfig(target_rank=5, svd_cache=str(tmp_path), fusion="adapter"), 10)
    switcher.bind(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert switcher.sites[0].fused_rank == switcher.sites[0].state.num_fused == 3
    torch.testing.assert_close(model(x), before)


def test_an_edit_in_place_of_a_quantised_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="fusion is in_place, but 0 is quantised .nf4."):
        Switcher(net(torch.float32, (40, 72), precision="nf4"), SRLoRAConfig(target_rank=8, fusion="in_place"), 10)


def test_a_second_adapter_that_is_switched_off_is_noticed(tmp_path) -> None:
    model = net(torch.float32, (40, 72))
    switcher, _ = run(model, torch.float32, tmp_path, 6, fusion="adapter")
    model.set_adapter("default")
    switcher._bound.observer.stepped.add(0)  # an optimizer step
    for call in (switcher.step, lambda: switcher.export(tmp_path / "adapter")):
        with pytest.raises(RuntimeError, match="'srlora_fused' of 0, which holds what was fused, is not active"):
            call()


def test_a_reference_pass_without_adapters_leaves_the_second_one_frozen(tmp_path) -> None:
    model = net(torch.float32, (40, 72))
    switcher, _ = run(model, torch.float32, tmp_path, 6, fusion="adapter")
    with model.disable_adapter():
        model(torch.randn(2, 72))
    model(torch.randn(2, 72)).sum().backward()
    site = switcher.sites[0]
    assert site.lora_a.requires_grad
    assert (site.fused_a.grad, site.fused_b.grad) == (None, None)
    switcher.export(tmp_path / "adapter")
    assert not [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "fused" in name]


def test_a_merge_in_the_middle_is_noticed(tmp_path) -> None:
    model = net(torch.float32, (40, 72))
    switcher, _ = run(model, torch.float32, tmp_path, 6)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="adapter of 0 has been merged"):
        switcher.export(tmp_path / "adapter")


def test_settings_without_effect_are_named(tmp_path, caplog) -> None:
    with pytest.warns(UserWarning, match="fused_rank 9 is without effect"):
        run(net(torch.float32, (40, 72)), torch.float32, tmp_path, 6, fused_rank=9, residual_device="cpu")
    assert "residual_device cpu is without effect" in caplog.text


def test_a_weight_is_told_from_one_with_the_same_payload_and_other_scales(tmp_path) -> None:
    digests = []
    for scale in (1.0, 2.0):
        torch.manual_seed(1)
        linear = nn.Linear(72, 40)
        linear.weight.data *= scale
        layers = nn.Sequential(quantised(linear, "nf4"), nn.Linear(40, 3))
        model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0"]))
        switcher, _ = run(model, torch.float32, tmp_path, 2)
        digests.append(switcher.storage.digest_weight(0))
    assert digests[0] != digests[1]


def test_directions_are_those_of_the_weight_that_the_forward_pass_uses(tmp_path) -> None:
    torch.manual_seed(1)
    layer = quantised(nn.Linear(72, 40).bfloat16(), "nf4")  # it remembers bfloat16
    layer.bias.data = layer.bias.data.float()
    model = get_peft_model(nn.Sequential(layer, nn.Linear(40, 3)), LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(5, 72)
    used = layer(x) - layer.bias
    switcher, _ = run(model, torch.float32, tmp_path, 2)
    torch.testing.assert_close(x @ switcher.storage.gather_weight(0).T, used, rtol=1e-5, atol=1e-6)


def test_a_second_switcher_on_the_same_adapters_is_refused() -> None:
    model = net(torch.float32, (40, 72))
    for message in ("", "0 has an adapter 'srlora_fused' already"):
        if not message:
            Switcher(model, SRLoRAConfig(target_rank=8, fusion="adapter"), 10)
            continue
        with pytest.raises(ValueError, match=message):
            Switcher(model, SRLoRAConfig(target_rank=8, fusion="adapter"), 10)


def test_directions_come_from_the_original_checkpoint_where_it_is_given(tmp_path) -> None:
    torch.manual_seed(1)
    original = nn.Linear(72, 40).weight.detach()
    save_file({"0.weight": original}, tmp_path / "model.safetensors")
    firsts = {}
    for folder in (None, str(tmp_path)):
        model = net(torch.float32, (40, 72), precision="nf4")
        switcher, changes = run(model, torch.float32, tmp_path / "svd", 4, directions_from=folder)
        assert max(changes) < 1e-5
        firsts[folder] = switcher.sites[0].fused_a[0].detach()
    for folder, weight in (
        (str(tmp_path), original),
        (None, dequantised(net(torch.float32, (40, 72), precision="nf4").base_model.model[0].base_layer, "nf4")),
    ):
        direction = torch.linalg.svd(weight).Vh[0]
        row = firsts[folder] / firsts[folder].norm()
        assert abs(float(row @ direction)) > 1 - 1e-6
    with pytest.raises(ValueError, match="has no safetensors files"):
        run(net(torch.float32, (40, 72)), torch.float32, tmp_path, 4, directions_from=str(tmp_path / "svd" / "none"))
    save_file({"0.weight": original.T.contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has 0.weight as \(72, 40\), but the model \(40, 72\)"):
        run(net(torch.float32, (40, 72)), torch.float32, tmp_path, 4, directions_from=str(tmp_path))
    save_file({"0.weight": original, "aux.0.weight": 2 * original}, tmp_path / "model.safetensors")
    assert torch.equal(OriginalWeights(tmp_path).read(switcher.sites[0]), original)  # the exact name wins
    save_file({"a.0.weight": original, "b.0.weight": original.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has several for 0.weight: a.0.weight, b.0.weight"):
        OriginalWeights(tmp_path).read(switcher.sites[0])
    save_file({"1.weight": original}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"directions_from has no weight 0.weight"):
        run(net(torch.float32, (40, 72)), torch.float32, tmp_path, 4, directions_from=str(tmp_path))
