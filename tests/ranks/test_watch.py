"""A change on one rank alone stops every rank, before anything is written; so do models that are not the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from srlora_dist import SRLoRAConfig, Switcher
from tests.ranks.engines import Engine, make_batch, make_net, make_odd_net, prepare
from tests.ranks.world import run_ranks

NUM_STEPS, TARGET = 9, 4  # switches after step 4 and on the end
PARTITIONED, PERSISTENT = ({"stage3_param_persistence_threshold": size} for size in (0, 10**6))
ENGINES = {
    "ddp": ("ddp", {}),
    "zero0": ("zero0", {}),
    "zero2": ("zero2", {}),
    "zero3-partitioned": ("zero3", PARTITIONED),
    "zero3-persistent": ("zero3", PERSISTENT),
    "fsdp2": ("fsdp2", {}),
}
COPIES = ("ddp", "zero0", "zero2", "zero3-persistent")


def start(name: str, cache: str, **options: object) -> tuple[Engine, Switcher]:
    kind, zero = ENGINES[name]
    model = make_odd_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=TARGET, svd_cache=cache, **options), NUM_STEPS)
    engine = prepare(kind, model, 1e-2, 0.5, **zero)
    switcher.bind(engine.model, engine.optimizer)
    return engine, switcher


def take_steps(engine: Engine, switcher: Switcher, rank: int, world_size: int, count: int) -> None:
    for step in range(count):
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        engine.backward((engine.model(x) - y).square().mean())
        engine.step()
        switcher.step()


def message_of(call: Callable, *args: object, **kwargs: object) -> str:
    try:
        call(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def tamper(rank: int, world_size: int, name: str, cache: str) -> dict:
    """Shift what rank 1 holds of a weight, then of the pairs."""
    seen = {}
    for what in ("weight", "pairs"):
        engine, switcher = start(name, cache)
        take_steps(engine, switcher, rank, world_size, 2)
        if rank == 1:
            (m, n), storage = switcher.sites[1].shape, switcher.storage
            with torch.no_grad():
                if what == "weight":
                    storage.edit_weight_(1, torch.full((m, 1), 0.5), torch.ones(1, n))
                else:
                    storage.local_span(switcher.sites[1].lora_a)[0].add_(0.5)
        folder = f"{cache}/{name}-{what}"
        seen[f"{what}, export"] = message_of(switcher.export, folder, is_last=False)
        seen[f"{what}, save"] = message_of(switcher.save_checkpoint, folder)
        seen[f"{what}, switch"] = message_of(take_steps, engine, switcher, rank, world_size, 2)
        seen["written"] = Path(folder).exists()
    return seen


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ENGINES)
def test_a_change_on_one_rank_stops_every_rank(name: str, tmp_path) -> None:
    for seen in run_ranks(tamper, 2, name, str(tmp_path)):
        assert not seen.pop("written")
        for where, message in seen.items():
            what = "the weight of second was changed" if "weight" in where else "the pairs were changed"
            assert message.startswith(f"RuntimeError: {what} by something else"), (where, message)


def drift(rank: int, world_size: int, name: str, cache: str) -> dict:
    """Shift a weight, and then its low part, on rank 1 alone, with comparisons at each step."""
    seen = {}
    for precision in ("fp32", "bf16"):
        kind, zero = ENGINES[name]
        model = make_odd_net(precision)
        options = SRLoRAConfig(target_rank=TARGET, svd_cache=cache, agreement_every=1)
        switcher = Switcher(model, options, NUM_STEPS)
        more = {"settings": {"bf16": {"enabled": True}}} if precision == "bf16" and name.startswith("zero") else {}
        engine = prepare(kind, model.bfloat16() if more else model, 1e-2, 0.5, **more, **zero)
        switcher.bind(engine.model, engine.optimizer)
        switcher.require_agreement()
        if rank == 1 and precision == "fp32":
            switcher.storage.weight_to_edit(1)[0].add_(0.5)
        elif rank == 1:
            switcher.storage.residuals[1].add_(0.5)
        seen[precision] = message_of(switcher.require_agreement)
    return seen


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", COPIES)
def test_a_weight_that_differs_between_ranks_is_named(name: str, tmp_path) -> None:
    for seen in run_ranks(drift, 2, name, str(tmp_path)):
        for message in seen.values():
            assert message.startswith("RunStoppedError: after step 0 the ranks hold different values of the weight of")
            assert "of second" in message


def bind_other_models(rank: int, world_size: int, name: str, cache: str) -> dict:
    """Each rank binds something else than the others."""
    seen = {}
    for kind in ("layers", "weights", "steps", "options"):
        model = make_net(seed=rank if kind == "weights" else 0)
        if kind == "layers" and rank == 1:  # as the stages of a pipeline
            model.base_model.model.first = model.base_model.model.first.base_layer
        target = 6 + (kind == "options") * rank
        num_steps = NUM_STEPS + (kind == "steps") * rank
        switcher = Switcher(model, SRLoRAConfig(target_rank=target, svd_cache=cache), num_steps)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        seen[kind] = message_of(switcher.bind, model, optimizer)
    return seen


def test_ranks_with_other_models_are_refused_on_every_rank(tmp_path) -> None:
    for seen in run_ranks(bind_other_models, 2, "ddp", str(tmp_path), timeout=60):
        start = "ValueError: the ranks hold different models: rank 0"
        assert seen["layers"].startswith(f"{start} adapts first (17, 13) with rank 4, and rank 1 adapts second")
        assert seen["weights"].startswith(f"{start} holds first with digest")
        assert seen["steps"].startswith(f"{start} has num_training_steps 9, and rank 1 has num_training_steps 10")
        assert seen["options"].startswith(f"{start} has srlora.target_rank 6, and rank 1")


def bind_with_an_ignored_parameter(rank: int, world_size: int, cache: str) -> dict:
    from torch.distributed.fsdp import fully_shard

    model = make_net()
    head = model.base_model.model.head.modules_to_save["default"]
    switcher = Switcher(model, SRLoRAConfig(target_rank=6, svd_cache=cache), NUM_STEPS)
    fully_shard(model, ignored_params=set(head.parameters()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ignored = message_of(switcher.bind, model, optimizer)
    return {"ignored": ignored, "lacking": lacking(rank, cache)}


def lacking(rank: int, cache: str) -> str:
    """The optimizer of one rank lacks the head."""
    model: nn.Module = make_net()
    switcher = Switcher(model, SRLoRAConfig(target_rank=6, svd_cache=cache), NUM_STEPS)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for name, p in named if rank == 0 or "head" not in name])
    return message_of(switcher.bind, model, optimizer)


def test_a_parameter_that_no_rank_answers_for_is_refused_on_every_rank(tmp_path) -> None:
    for seen in run_ranks(bind_with_an_ignored_parameter, 2, str(tmp_path), timeout=60):
        name = "ValueError: base_model.model.head.modules_to_save.default.weight is trained, but"
        assert seen["ignored"].startswith(f"{name} FSDP2 does not cut it into rows")
        assert seen["lacking"].startswith(f"{name} the optimizer does not hold")
