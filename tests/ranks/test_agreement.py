"""What is sent, counted at the dispatcher, and what happens when ranks disagree or one of them fails."""

from __future__ import annotations

import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import srlora_dist.method.directions
import srlora_dist.storage.base
from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.layers.digest import digest_span
from srlora_dist.layers.discovery import find_sites
from srlora_dist.method.budget import clamp_target_ranks
from srlora_dist.method.directions import Directions
from srlora_dist.method.switch import SwitchExecutor
from srlora_dist.storage.find import find_storage
from tests.ranks.engines import RANKS, SHAPES, Engine, make_batch, make_odd_net, prepare
from tests.ranks.world import run_ranks

NUM_STEPS, TARGET = 9, 4  # the second site, of rank 2: switches after steps 4 and 9, and the last falls on the end
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
    seen["importance_bytes"] = switcher.statistics.num_bytes if switcher else 0
    return seen


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("name", "zero"), [("ddp", {}), ("zero2", {}), ("zero3", PARTITIONED), ("fsdp2", {})])
def test_what_is_sent(name: str, zero: dict, tmp_path) -> None:
    """Invariant 7, by counting: nothing between switches, and at a switch exactly what the docstrings say."""
    plain = run_ranks(train, 2, name, zero, None)
    run_ranks(train, 2, name, zero, str(tmp_path))  # leaves the file of directions
    ours = run_ranks(train, 2, name, zero, str(tmp_path))
    assert any(plain[0]["steps"])  # the counter sees the engine's own traffic
    for rank in (0, 1):
        assert ours[rank]["steps"][1:] == plain[rank]["steps"][1:]
    # The check of the first batch: two looks at the sites, the verdict, and what two forward passes send.
    more = Counter(ours[0]["steps"][0]) - Counter(plain[0]["steps"][0])
    check = Counter({("allreduce_", 4 * (3 * len(SHAPES) + 1)): 2, ("allreduce_", 8): 1})
    if name in ("zero3", "fsdp2"):
        assert all("allgather" in kind or kind == "broadcast_" for kind, _ in more - check)
        more &= check
    assert more == check
    num_sites, floats = len(SHAPES), 4 * sum(RANKS[site] * (m + n) for site, (m, n) in SHAPES.items())
    switch = [("allreduce_", 8), ("allreduce_", 8 * sum(RANKS.values()))]
    switched = {"second": 1, "tiny": 1}  # the first site has as many directions as pairs
    gathers = name in ("zero3", "fsdp2")
    switch += [("allreduce_", 4 * sum(RANKS[site] * sum(SHAPES[site]) for site in switched))] * gathers
    switch += [("broadcast_", 4 + 4 * sum(k * (sum(SHAPES[site]) + 1) for site, k in switched.items()))]
    switch += [("allreduce_", 16 * len(switched)), ("allreduce_", 8)]
    assert ours[0]["switches"] == [switch]
    # Binding with a warm file: the same model, nothing to resume, optimizer and adapter usable, ledger, fingerprint,
    # the file looked for, found and judged; then switch 0.
    bind = [("allreduce_", 16), ("broadcast_", 8), *[("allreduce_", 8)] * 3, ("allreduce_", 16 * num_sites)]
    bind += [("allreduce_", 8), ("broadcast_", 8), ("allreduce_", 8)]
    first = [("allreduce_", floats)] * gathers
    first += [("broadcast_", 4 + 4 * sum(RANKS[site] * (m + n + 1) for site, (m, n) in SHAPES.items()))]
    first += [("allreduce_", 16 * num_sites), ("allreduce_", 8)]
    assert ours[0]["bind"] == bind + first
    # Tracking is shared out: the ranks' parts add up to one mean and one deviation of every element.
    assert sum(seen["importance_bytes"] for seen in ours) == 2 * floats


def gathers(rank: int, world_size: int, fusion: str, cache: str) -> dict:
    """What DTensors send by themselves is hidden from the mode above."""
    model = make_odd_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=TARGET, svd_cache=cache, fusion=fusion), NUM_STEPS)
    engine = prepare("fsdp2", model, 1e-2, 0.5)
    with CommDebugMode() as sent:
        switcher.bind(engine.model, engine.optimizer)
        switcher._switch([[], [0], []], [torch.ones(4)] * 3)
    return {str(name): count for name, count in sent.get_comm_counts().items()}


@pytest.mark.parametrize("fusion", ["in_place", "adapter"])
def test_a_switch_under_fsdp2_gathers_no_weight(fusion: str, tmp_path) -> None:
    run_ranks(gathers, 2, fusion, str(tmp_path))  # leaves the file of directions
    for seen in run_ranks(gathers, 2, fusion, str(tmp_path)):
        assert seen
        assert not [name for name in seen if "gather" in name or "scatter" in name], seen


def fuse_nan(rank: int, world_size: int, budget: int | None, cache: str) -> dict:
    """Factors that have become NaN: at a switch, and where rank 0 alone compresses the second adapter."""
    model = make_odd_net()
    options = SRLoRAConfig(target_rank=TARGET, svd_cache=cache, fusion="adapter", fused_rank=budget)
    switcher = Switcher(model, options, NUM_STEPS)
    engine = prepare("ddp", model, 1e-2, 0)
    switcher.bind(engine.model, engine.optimizer)
    try:
        if budget is not None:
            with torch.no_grad():
                switcher.sites[1].lora_a.fill_(float("nan"))
            for _ in range(2):  # the second one is over the budget
                switcher._switch([[], [0], []], [torch.ones(4)] * 3)
        for step in range(NUM_STEPS if budget is None else 0):
            x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
            engine.backward((engine.model(x) * float("nan") - y).square().mean())
            engine.step()
            switcher.step()
    except (ValueError, RuntimeError) as error:
        return {"message": str(error)}
    return {"message": ""}


@pytest.mark.parametrize(
    ("budget", "message"), [(None, "scores of step 4 are not finite"), (4, "cannot compress the second adapter")]
)
def test_nan_stops_every_rank(budget: int | None, message: str, tmp_path) -> None:
    for seen in run_ranks(fuse_nan, 2, budget, str(tmp_path), timeout=60):
        assert message in seen["message"]


def disagree(rank: int, world_size: int, cache: str, factor_name: str, element: int) -> dict:
    model = make_odd_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=TARGET, svd_cache=cache), NUM_STEPS)
    engine = prepare("ddp", model, 1e-2, 0)
    switcher.bind(engine.model, engine.optimizer)
    message = ""
    for step in range(NUM_STEPS):
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        engine.backward((engine.model(x) - y).square().mean())
        engine.step()
        if rank == 1 and step == 3:  # right before the first switch
            with torch.no_grad():
                factor = switcher.sites[1].factor(factor_name).view(-1)
                factor[element] = torch.nextafter(factor[element], torch.tensor(9.0))  # the last bit of one number
        try:
            switcher.step()
        except RuntimeError as error:
            message = str(error)
            break
    return {"message": message}


# Of each factor an element of either pair: one is fused by the switch, the other is not.
@pytest.mark.parametrize(("factor", "element"), [("A", 5), ("A", 25), ("B", 4), ("B", 5)])
def test_a_difference_in_one_bit_stops_every_rank_and_names_the_site(tmp_path, factor: str, element: int) -> None:
    for seen in run_ranks(disagree, 2, str(tmp_path), factor, element):
        assert "the ranks disagree" in seen["message"]
        assert "first at second" in seen["message"]


def refuse(*_: object) -> None:
    raise ValueError("the payload is not in its layout")


def fail_alone(rank: int, world_size: int, cache: str, damage: str) -> dict:
    """Something that only rank 0 does goes wrong."""
    model = make_odd_net("nf4" if damage == "layout" else "fp32")
    if damage == "nan":
        with torch.no_grad():
            model.base_model.model.second.base_layer.weight[0, 0] = float("nan")
    ledger_dir = {"ledger": f"{cache}/file", "vanished": f"{cache}/ledger"}.get(damage)
    cache = {"name": cache + "/x" * 3000, "unwritable": f"{cache}/file/below"}.get(damage, cache)
    switcher = Switcher(model, SRLoRAConfig(target_rank=TARGET, svd_cache=cache, ledger_dir=ledger_dir), NUM_STEPS)
    engine = prepare("zero3" if damage == "nan" else "ddp", model, 1e-2, 0)
    compare, dequantise = SwitchExecutor._compare, srlora_dist.storage.base.dequantise
    if damage == "layout" and rank == 0:
        srlora_dist.storage.base.dequantise = refuse
    if damage == "vanished":
        SwitchExecutor._compare = lambda *_: shutil.rmtree(ledger_dir) if rank == 0 else None
    try:
        switcher.bind(engine.model, engine.optimizer)
        switcher.export(f"{cache}/file")
    except ValueError as error:
        return {"message": str(error)}
    finally:
        SwitchExecutor._compare, srlora_dist.storage.base.dequantise = compare, dequantise
    return {"message": ""}


FAILURES = {
    "layout": "the payload is not in its layout",
    "nan": "cannot factor second: the weight holds NaN",
    "ledger": "file cannot be written",
    "vanished": "cannot append switch 0 to the ledger",
    "name": "cannot look for a file of directions",
    "unwritable": "file/below cannot be written",
    "export": "cannot write the adapter to",
}


@pytest.mark.parametrize("damage", FAILURES)
def test_a_failure_on_rank_0_is_an_error_on_every_rank(tmp_path, damage: str) -> None:
    (tmp_path / "file").touch()
    for seen in run_ranks(fail_alone, 2, str(tmp_path), damage, timeout=40):
        assert FAILURES[damage] in seen["message"]


def fingerprint(rank: int, world_size: int, engine_name: str, cache: str) -> dict:
    model = make_odd_net()
    engine = prepare(engine_name, model, 1e-2, 0, **(PARTITIONED if engine_name == "zero3" else {}))
    sites = find_sites(model)
    clamp_target_ranks(sites, TARGET)
    storage = find_storage(engine.model, engine.optimizer, sites)
    return {"key": Directions(storage, SRLoRAConfig(svd_cache=cache))._fingerprint()}


def test_the_fingerprint_is_that_of_the_weights_however_they_are_held(tmp_path) -> None:
    base = make_odd_net().base_model.model
    wanted = [
        [site, *shape, min(TARGET, *shape), digest_span(getattr(base, site).base_layer.weight)]
        for site, shape in SHAPES.items()
    ]
    for world_size, engine in ((1, "plain"), (2, "ddp"), (2, "zero2"), (3, "zero3"), (4, "fsdp2")):
        for seen in run_ranks(fingerprint, world_size, engine, str(tmp_path)):
            assert seen["key"][1:] == wanted


def make_directions(rank: int, world_size: int, engine_name: str, cache: str, shared: bool) -> dict:
    """Compute the directions, and tell how many matrices this rank factored, and what ended up in the file."""
    factored, compute = [], srlora_dist.method.directions.compute_directions

    def note(weight: torch.Tensor, count: int) -> tuple:
        factored.append(list(weight.shape))
        return compute(weight, count)

    model = make_odd_net()
    engine = prepare(engine_name, model, 1e-2, 0, **(PARTITIONED if engine_name == "zero3" else {}))
    sites = find_sites(model)
    clamp_target_ranks(sites, TARGET)
    storage = find_storage(engine.model, engine.optimizer, sites)
    directions = Directions(storage, SRLoRAConfig(svd_cache=cache, svd_distribute=shared))
    srlora_dist.method.directions.compute_directions = note
    try:
        directions.prepare()
    finally:
        srlora_dist.method.directions.compute_directions = compute
    return {"factored": factored, "file": load_file(directions.path) if rank == 0 else {}}


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("zero3", 2), ("fsdp2", 4)])
def test_ranks_share_the_decompositions_and_make_the_same_file(tmp_path, engine: str, world_size: int) -> None:
    alone, shared = (
        run_ranks(make_directions, world_size, engine, str(tmp_path / str(shared)), shared) for shared in (False, True)
    )
    assert [len(seen["factored"]) for seen in alone] == [3, *[0] * (world_size - 1)]
    assert sorted(shape for seen in shared for shape in seen["factored"]) == sorted(map(list, SHAPES.values()))
    assert [len(seen["factored"]) for seen in shared] == ([2, 1] if world_size == 2 else [1, 1, 1, 0])
    assert alone[0]["file"].keys() == shared[0]["file"].keys()
    assert all(torch.equal(shared[0]["file"][name], tensor) for name, tensor in alone[0]["file"].items())


def scores_with_window(rank: int, world_size: int, engine_name: str, window: int | str, cache: str) -> dict:
    """The scores behind every switch, with statistics that outlive a switch."""
    model = make_odd_net()
    options = {"importance_window": window, "score_reset": "restarted", "svd_cache": cache}
    switcher = Switcher(model, SRLoRAConfig(target_rank=7, **options), 12)
    zero = {"sub_group_size": 60, **PARTITIONED} if engine_name == "zero3" else {}
    engine = prepare(engine_name, model, 1e-2, 0.5, **zero)
    switcher.bind(engine.model, engine.optimizer)
    scores, calls = [], []
    observe = switcher.statistics.observe_
    switcher.statistics.observe_ = lambda owners: (calls.append(switcher.num_steps), observe(owners))
    for step in range(12):
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        engine.backward((engine.model(x) - y).square().mean())
        engine.step()
        report = switcher.step()
        scores += [score for part in report.sites for score in part.scores] if report else []
    return {"scores": torch.tensor(scores), "due": switcher.due_steps, "calls": calls}


@pytest.mark.timeout(200)
def test_a_window_is_opened_once_where_groups_are_stepped_one_after_the_other(tmp_path) -> None:
    """ZeRO-3 steps several sub-groups a step; the window must forget before the first of them alone."""
    (plain,) = run_ranks(scores_with_window, 1, "plain", 2, str(tmp_path))
    (everything,) = run_ranks(scores_with_window, 1, "plain", "all", str(tmp_path))
    for seen in run_ranks(scores_with_window, 2, "zero3", 2, str(tmp_path)):
        assert len(seen["calls"]) > len(set(seen["calls"]))  # several groups a step
        assert set(seen["calls"]) == {step for due in seen["due"] for step in (due - 2, due - 1)}
        torch.testing.assert_close(seen["scores"], plain["scores"], rtol=1e-3, atol=0)
    assert not torch.allclose(everything["scores"], plain["scores"], rtol=1e-2, atol=0)


def bind_elsewhere(rank: int, world_size: int, kind: str, cache: str) -> dict:
    """An engine, or a setting of one, that is not supported."""
    model, message = make_odd_net({"bf16-optimizer": "bf16", "fsdp2-int8": "int8"}.get(kind, "fp32")), ""
    switcher = Switcher(model, SRLoRAConfig(target_rank=TARGET, svd_cache=cache), NUM_STEPS)
    try:
        engine = REFUSED[kind][0](model)
        switcher.bind(engine.model, engine.optimizer)
    except ValueError as error:
        message = str(error)
    return {"message": message}


def with_optimizer(model: torch.nn.Module) -> Engine:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return Engine(model, optimizer, torch.Tensor.backward, optimizer.step)


def columns(model: torch.nn.Module) -> Engine:
    """FSDP2 that cuts B into columns."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in model.modules():
        if any(parameter.shape == (17, 4) for parameter in module.parameters(recurse=False)):
            fully_shard(module, mesh=mesh, shard_placement_fn=lambda _: Shard(1))
    fully_shard(model, mesh=mesh)
    return with_optimizer(model)


def replicas(model: torch.nn.Module) -> Engine:
    """HSDP: whole copies of what FSDP2 shards, here over one rank each."""
    from torch.distributed.fsdp import fully_shard

    names = {"mesh_dim_names": ("replicate", "shard")}
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(), 1), **names))
    return with_optimizer(model)


def fsdp1(model: torch.nn.Module) -> Engine:
    """The first FSDP, which keeps flat parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return with_optimizer(model)


def one_layer(model: torch.nn.Module) -> Engine:
    """FSDP2 on one site alone."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model.base_model.model.first, mesh=mesh)
    return with_optimizer(model)


def quantised_partitions(setting: str, model: torch.nn.Module) -> Engine:
    """ZeRO++; its kernels need a GPU, so the mark is set by hand."""
    engine = prepare("zero3", model, 1e-2, 0)
    setattr(engine.optimizer.parameter_offload, setting, True)
    return engine


def partial_offload(model: torch.nn.Module) -> Engine:
    """An optimizer that is only in part on the CPU; it needs a GPU for the other part, so the mark is set by hand."""
    engine = prepare("zero3", model, 1e-2, 0, offload_optimizer={"device": "cpu"})
    engine.optimizer.partial_offload = 0.5
    return engine


REFUSED = {
    "fsdp1": (fsdp1, "FSDP1 is not supported: set fsdp_version to 2"),
    "fsdp2-int8": (
        lambda model: prepare("fsdp2", model, 1e-2, 0),
        "first is int8, which bitsandbytes cannot use under FSDP2",
    ),
    "fsdp2-columns": (columns, "first is placed as (Shard(dim=1),)"),
    "fsdp2-hsdp": (replicas, "on a mesh of (2, 1), which is HSDP, and SRLoRA supports FSDP2 with rows cut over all 2"),
    "fsdp2-one-layer": (one_layer, "second is in part not sharded by FSDP2"),
    "bf16-optimizer": (
        lambda model: prepare(
            "zero1", model, 1e-2, 0, 1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        ),
        "BF16_Optimizer is not supported: use ZeRO stage",
    ),
    "partial-offload": (partial_offload, "offload_optimizer.ratio 0.5 is not supported"),
    "quantised-gathers": (partial(quantised_partitions, "zero_quantized_weights"), "zero_quantized_weights is not"),
    "quantised-partitions": (
        partial(quantised_partitions, "zero_quantized_nontrainable_weights"),
        "zero_quantized_nontrainable_weights is not supported",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_unsupported_engine_is_refused_on_every_rank(tmp_path, kind: str) -> None:
    for seen in run_ranks(bind_elsewhere, 2, kind, str(tmp_path)):
        assert REFUSED[kind][1] in seen["message"]


def shares(rank: int, world_size: int) -> dict:
    model = make_odd_net()
    engine = prepare("ddp", model, 1e-2, 0)
    storage = find_storage(engine.model, engine.optimizer, find_sites(model))
    return {"tracked": sorted({run.site for run in storage.tracked}), "held": len(storage.held)}


def test_ddp_deals_sites_and_a_rank_may_get_none() -> None:
    ranks = run_ranks(shares, 4)
    assert sorted(seen["tracked"] for seen in ranks) == [[], [0], [1], [2]]
    assert all(seen["held"] == 2 * len(SHAPES) for seen in ranks)
