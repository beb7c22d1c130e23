"""A plan for 70 billion parameters on 1,024 ranks, against the real storages on the meta device.

The ranks are simulated: PyTorch's fake process group says that there are 1,024 and sends nothing. FSDP2 cuts the model
on it as it would cut real weights, and the storage maps it. Of 80 layers that takes 20 s a rank, for FSDP2 makes 1,024
views of each parameter, so it is done for one rank; the first and the last rank get 4 layers. ZeRO needs real weights:
of its plans the sum over all ranks is checked here, and the bytes of small ones in tests/ranks/test_plan_bytes.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from srlora_dist.commands.plan.blueprint import LLAMAS, build_model, draw_from
from srlora_dist.commands.plan.communication import start_up, switches
from srlora_dist.commands.plan.memory import Forecast
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.config.run import LoRAOptions, ModelOptions, RunConfig, TrainOptions
from srlora_dist.layers.discovery import find_sites
from srlora_dist.method.budget import clamp_target_ranks
from srlora_dist.method.importance import Importance
from srlora_dist.method.memory import count_extra_memory
from srlora_dist.storage.base import Storage
from srlora_dist.storage.collectives import cut_into_buckets
from srlora_dist.storage.find import find_storage
from tests.unit.layers.test_spans import tile

WORLD_SIZE = 1024
NUM_LAYERS = LLAMAS["llama-70b"][2]


def config_of(engine: str) -> RunConfig:
    return RunConfig(
        engine=engine,
        model=ModelOptions("llama-70b", dtype="bfloat16"),
        lora=LoRAOptions(rank=16, alpha=16),
        srlora=SRLoRAConfig(target_rank=64),
        train=TrainOptions(max_steps=1000),
    )


def forecast_of(engine: str, model: nn.Module) -> Forecast:
    return Forecast(draw_from(model, config_of(engine), WORLD_SIZE, 10 * LLAMAS["llama-70b"][0]))


@pytest.fixture
def start_rank() -> Iterator[callable]:
    def start(rank: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=WORLD_SIZE, store=FakeStore())

    yield start
    dist.destroy_process_group()


def bind(engine: str, model: nn.Module) -> Storage:
    """The real storage of this rank, with its residuals."""
    if engine == "fsdp2":
        mesh = dist.init_device_mesh("cpu", (WORLD_SIZE,))
        for layer in model.modules():
            if type(layer).__name__ == "LlamaDecoderLayer":
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    sites = find_sites(model)
    clamp_target_ranks(sites, 64)
    storage = find_storage(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), sites)
    storage.allocate_residuals("weight")
    return storage


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "rank", "num_layers"),
    [
        ("ddp", 0, 80),
        ("ddp", 1023, 80),
        ("fsdp2", 0, 4),
        ("fsdp2", 1023, 4),
        pytest.param("fsdp2", 511, 80, marks=pytest.mark.slow),
    ],
)
def test_a_storage_among_1024_ranks_holds_what_is_planned(
    engine: str, rank: int, num_layers: int, monkeypatch, start_rank
) -> None:
    shape = list(LLAMAS["llama-70b"])
    shape[2] = num_layers
    monkeypatch.setitem(LLAMAS, "llama-70b", tuple(shape))
    model = build_model(config_of(engine))
    forecast = forecast_of(engine, model)
    num_switches, planned = len(forecast.blueprint.due_steps), forecast.held(rank)
    start_rank(rank)
    storage = bind(engine, model)
    extra = count_extra_memory(
        *(storage, Importance(storage, 0.85, 0.85), None, num_switches, SRLoRAConfig()),
        list(cut_into_buckets([site.num_factor_elements for site in storage.sites])),
        samples=0,
    )
    assert (storage.name, storage.rank, storage.world_size) == (engine, rank, WORLD_SIZE)
    assert (extra.tracking, extra.residual) == (planned.moving_averages, planned.residual)
    assert (extra.second_adapter, extra.directions) == (planned.second_adapter, planned.during_switch)
    assert 2 * sum(run.of(run.owner).nbytes for run in storage.held) == planned.optimizer_state
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if engine == "fsdp2":
        held = [storage.largest_span(p) * p.element_size() for p in frozen]
        assert any(run.numel == 0 for run in storage.held) == (rank != 0)
    else:
        held = [p.nbytes for p in frozen]
    assert sum(held) == planned.base_weights


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_spans_of_all_ranks_cover_every_factor_and_weight_once(engine: str) -> None:
    """All 80 layers are alike, so the spans of the first and the last site of each shape stand for the others.

    ZeRO-1 cuts as ZeRO-2 does.
    """
    forecast = forecast_of(engine, build_model(config_of(engine)))
    sites, everyone = forecast.sites, range(WORLD_SIZE)
    assert len(sites) == 7 * NUM_LAYERS
    by_shape = {(site.shape, number // (len(sites) - 7)): site for number, site in enumerate(sites)}
    for site in by_shape.values():
        for factor in (site.lora_a, site.lora_b) if engine != "ddp" else ():
            tile((forecast.stepped_span(factor, rank) for rank in everyone), factor.numel())
        if engine in ("zero3", "fsdp2"):
            tile((forecast.model_span(site.weight.shape, rank) for rank in everyone), site.weight.numel())
    averages = sum(forecast._moving_averages(rank) for rank in (everyone if engine == "ddp" else ()))
    assert averages in (0, 2 * 4 * sum(site.rank * sum(site.shape) for site in sites))
    blueprint = forecast.blueprint
    assert start_up(blueprint, cold=True)
    assert len(switches(blueprint)) == 1 + len(blueprint.due_steps) == 6
    assert forecast.held(WORLD_SIZE - 1).device_total <= forecast.held(forecast.largest_rank()).device_total
