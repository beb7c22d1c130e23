"""What is sent, counted at the dispatcher, and what happens when ranks disagree or one of them fails."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.sites import find_sites
from srlora_dist.storage import find_storage
from tests.ranks.engines import RANKS, SHAPES, make_batch, make_odd_net, prepare
from tests.ranks.world import run_ranks

NUM_STEPS, TARGET = 9, 8  # r = 4, r' = 2: switches after steps 4 and 9, and the last falls on the end
PARTITIONED = {"stage3_param_persistence_threshold": 0}


class Traffic(TorchDispatchMode):
    """Notes each collective with the bytes of its tensors, as (name, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.sent.append((func.__name__.split(".")[0], sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))

    def take(self) -> list[tuple[str, int]]:
        sent, self.sent = self.sent, []
        return sent


def train(rank: int, world_size: int, engine_name: str, zero: dict, cache: str | None) -> dict:
    """Train, with a switcher if there is a cache, and list what each step and each switch sent."""
    model = make_odd_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=TARGET, svd_cache=cache), NUM_STEPS) if cache else None
    engine = prepare(engine_name, model, 1e-2, 0.5, **zero)
    seen = {"steps": [], "switches": []}
    with Traffic() as traffic:
        if switcher:
            switcher.bind(engine.model, engine.optimizer)
            seen["bind"] = traffic.take()
        for step in range(NUM_STEPS):
            x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
            engine.backward((engine.model(x) - y).square().mean())
            engine.step()
            seen["steps"].append(traffic.take())
            if switcher and switcher.step() is not None:
                seen["switches"].append(traffic.take())
            elif switcher:
                assert not traffic.take()
    seen["importance_bytes"] = switcher._importance.num_bytes if switcher else 0
    return seen


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("name", "zero"), [("ddp", {}), ("zero2", {}), ("zero3", PARTITIONED)])
def test_what_is_sent(name: str, zero: dict, tmp_path) -> None:
    """Invariant 7, by counting: nothing between switches, and at a switch exactly what the docstrings say."""
    plain = run_ranks(train, 2, name, zero, None)
    run_ranks(train, 2, name, zero, str(tmp_path))  # leaves the file of directions
    ours = run_ranks(train, 2, name, zero, str(tmp_path))
    assert any(plain[0]["steps"])  # the counter sees the engine's own traffic
    for rank in (0, 1):
        assert ours[rank]["steps"] == plain[rank]["steps"]
    num_sites, floats = len(SHAPES), 4 * sum(RANKS[site] * (m + n) for site, (m, n) in SHAPES.items())
    switch = [("allreduce_", 8 * sum(RANKS.values()))]
    switch += [("broadcast_", 4 + 4 * sum(max(1, RANKS[site] // 2) * (m + n + 1) for site, (m, n) in SHAPES.items()))]
    switch += [("allreduce_", floats)] * (name == "zero3")
    switch += [("allreduce_", 16 * num_sites), ("allreduce_", 8)]
    assert ours[0]["switches"] == [switch]
    # Binding with a warm file: freshness, fingerprint, found, ledger opened, then switch 0; no weight is sent.
    bind = [("allreduce_", 8), ("allreduce_", 16 * num_sites), ("broadcast_", 8), ("allreduce_", 8)]
    first = [("broadcast_", 4 + 4 * sum(RANKS[site] * (m + n + 1) for site, (m, n) in SHAPES.items()))]
    assert ours[0]["bind"] == bind + first + switch[2:]
    # Tracking is shared out: the ranks' parts add up to one mean and one deviation of every element.
    assert sum(seen["importance_bytes"] for seen in ours) == 2 * floats


def disagree(rank: int, world_size: int, cache: str) -> dict:
    model = make_odd_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=TARGET, svd_cache=cache), NUM_STEPS)
    engine = prepare("ddp", model, 1e-2, 0)
    switcher.bind(engine.model, engine.optimizer)
    message = ""
    for step in range(NUM_STEPS):
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        engine.backward((engine.model(x) - y).square().mean())
        engine.step()
        if rank == 1 and step == 2:
            with torch.no_grad():
                factor = switcher.sites[1].lora_a.view(-1)
                factor[5] = torch.nextafter(factor[5], torch.tensor(9.0))  # the last bit of one number
        try:
            switcher.step()
        except RuntimeError as error:
            message = str(error)
            break
    return {"message": message}


def test_a_difference_in_one_bit_stops_every_rank_and_names_the_site(tmp_path) -> None:
    for seen in run_ranks(disagree, 2, str(tmp_path)):
        assert "the ranks disagree" in seen["message"]
        assert "first at second" in seen["message"]


def fail_alone(rank: int, world_size: int, cache: str, damage: str) -> dict:
    model = make_odd_net()
    if damage == "nan":
        with torch.no_grad():
            model.base_model.model.second.base_layer.weight[0, 0] = float("nan")
    config = SRLoRAConfig(
        target_rank=TARGET, svd_cache=cache, ledger_dir=f"{cache}/file" if damage == "ledger" else None
    )
    switcher = Switcher(model, config, NUM_STEPS)
    engine = prepare("zero3" if damage == "nan" else "ddp", model, 1e-2, 0)
    try:
        switcher.bind(engine.model, engine.optimizer)
    except ValueError as error:
        return {"message": str(error)}
    return {"message": ""}


@pytest.mark.parametrize(("damage", "message"), [("nan", "second: the weight holds NaN"), ("ledger", "file")])
def test_a_failure_on_rank_0_is_an_error_on_every_rank(tmp_path, damage: str, message: str) -> None:
    (tmp_path / "file").touch()
    for seen in run_ranks(fail_alone, 2, str(tmp_path), damage):
        assert message in seen["message"]


def shares(rank: int, world_size: int) -> dict:
    model = make_odd_net()
    engine = prepare("ddp", model, 1e-2, 0)
    storage = find_storage(engine.model, engine.optimizer, find_sites(model))
    return {"tracked": sorted({run.site for run in storage.tracked}), "held": len(storage.held)}


def test_ddp_deals_sites_and_a_rank_may_get_none() -> None:
    ranks = run_ranks(shares, 4)
    assert sorted(seen["tracked"] for seen in ranks) == [[], [0], [1], [2]]
    assert all(seen["held"] == 2 * len(SHAPES) for seen in ranks)
