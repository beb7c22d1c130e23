"""On every engine: a layer that the first batch bypasses is left out on all ranks alike, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional

from srlora_dist import SRLoRAConfig, Switcher
from tests.ranks.engines import Engine, OddNet, make_batch, prepare
from tests.ranks.test_engines import MIXED, PARTITIONED
from tests.ranks.world import run_ranks

NUM_STEPS = 8


class Reading(OddNet):
    """Reads the weight of its second layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x + self.shift))
        return self.tiny(self.head(torch.tanh(functional.linear(x, self.second.weight, self.second.bias))))


def start(engine: str, zero: dict, cache: str, fusion: str) -> tuple[Engine, Switcher]:
    torch.manual_seed(0)
    model = get_peft_model(Reading(), LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    switcher = Switcher(model, SRLoRAConfig(target_rank=6, svd_cache=cache, fusion=fusion), NUM_STEPS)
    if engine == "fsdp2":  # a layer cannot read the weight of another group, with or without SRLoRA
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    prepared = prepare("plain" if engine in ("ddp", "fsdp2") else engine, model, 1e-2, 0.0, 1, {}, **zero)
    if engine == "ddp":  # nothing reaches the pairs of a layer that is not called
        prepared.model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    switcher.bind(prepared.model, prepared.optimizer)
    return prepared, switcher


def train(rank: int, world_size: int, engine: str, zero: dict, folder: str, fusion: str) -> dict:
    import warnings

    prepared, switcher = start(engine, zero, f"{folder}/svd", fusion)
    losses, slots = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(NUM_STEPS):
            x, y = (t.chunk(world_size)[rank] for t in make_batch(number))
            loss = (prepared.model(x) - y).square().mean()
            prepared.backward(loss)
            prepared.step()
            report = switcher.step()
            losses.append(loss.detach())
            slots += [(part.site, part.slots) for part in report.sites] if report else []
    switcher.export(f"{folder}/adapter")
    x = make_batch(99)[0]
    with torch.no_grad():
        prepared.model.eval()
        output = prepared.model(x)
    return {
        "storage": switcher.storage.name,
        "losses": torch.stack(losses),
        "slots": slots,
        "left_out": [site.name for site in switcher.sites if site.state.left_out],
        "warned": [str(w.message) for w in caught if "leaves out second" in str(w.message)],
        "output": output,
    }


@pytest.mark.parametrize(
    ("engine", "world_size", "zero", "fusion"),
    [
        ("ddp", 2, {}, "in_place"),
        ("zero2", 2, {}, "adapter"),
        ("zero3", 3, PARTITIONED, "in_place"),
        ("zero3", 2, MIXED, "adapter"),
        ("fsdp2", 2, {}, "in_place"),
    ],
)
def test_what_the_first_batch_shows_is_the_same_on_every_engine(
    engine: str, world_size: int, zero: dict, fusion: str, tmp_path: Path
) -> None:
    (alone,) = run_ranks(train, 1, "plain", {}, str(tmp_path / "alone"), fusion)
    ranks = run_ranks(train, world_size, engine, zero, str(tmp_path / "ranks"), fusion)
    assert ranks[0]["storage"] == engine
    bypassed = ["second"] if fusion == "in_place" else []  # a weight that is never written does no harm
    assert alone["left_out"] == bypassed
    assert {site for site, _ in alone["slots"]} == {"first", "second", "head", "tiny"} - set(bypassed)
    for rank in ranks:
        assert rank["left_out"] == bypassed
        assert len(rank["warned"]) == len(bypassed)
        assert rank["slots"] == alone["slots"]
        torch.testing.assert_close(rank["output"], alone["output"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack([r["losses"] for r in ranks]).mean(0), alone["losses"], rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    exported = PeftModel.from_pretrained(Reading(), tmp_path / "ranks" / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(make_batch(99)[0]), alone["output"], rtol=1e-5, atol=1e-5)


def bind_deepcompiled(rank: int, world_size: int, folder: str) -> dict:
    torch.manual_seed(0)
    model = get_peft_model(OddNet(), LoraConfig(r=2, target_modules="all-linear"))
    switcher = Switcher(model, SRLoRAConfig(target_rank=6, svd_cache=folder), NUM_STEPS)
    prepared = prepare("zero3", model, 1e-2, 0.0, 1, {"compile": {"deepcompile": True}}, **PARTITIONED)
    with pytest.raises(ValueError, match="set compile.deepcompile to false"):
        switcher.bind(prepared.model, prepared.optimizer)
    return {"storage": switcher.storage}


def test_deepcompile_under_zero3_is_refused(tmp_path: Path) -> None:
    assert [rank["storage"] for rank in run_ranks(bind_deepcompiled, 2, str(tmp_path))] == [None, None]
