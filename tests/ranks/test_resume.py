"""Saved and resumed is never stopped: bit for bit on the same ranks, and with the same choices on any others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.training_state import trained_parameters
from tests.ranks.engines import Engine, make_batch, make_odd_net, prepare
from tests.ranks.test_engines import ENGINES, MIXED, PARTITIONED, input_type
from tests.ranks.world import run_ranks

NUM_STEPS, RATE, CLIP = 12, 1e-2, 0.5
OPTIONS = {"target_rank": 7, "fusion_ratio": 0.5, "beta1": 0.8, "beta2": 0.6}  # switches after steps 2, 4, 7 and 9


def train(
    rank: int,
    world_size: int,
    engine_name: str,
    precision: str,
    zero: dict,
    folder: str,
    steps: tuple[int, int],
    resumes: bool,
    more: dict,
) -> dict:
    """Steps ``first`` to ``last`` of the run; saves after half of all steps and after the last one."""
    first, last = steps
    model, dtype = make_odd_net(precision), input_type(precision)
    switcher = Switcher(model, SRLoRAConfig(svd_cache=f"{folder}/svd", **OPTIONS, **more), NUM_STEPS)
    settings = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    engine = prepare(engine_name, model, RATE, CLIP, 1, settings, **zero)
    resume_from = f"{folder}/checkpoints/step-{first}" if resumes else None
    report = switcher.bind(engine.model, engine.optimizer, resume_from)
    assert (report is None) == resumes
    if rank == 0:
        shutil.rmtree(f"{folder}/svd")  # a cache may be emptied at any time
    assert switcher.storage.name == engine_name
    if resumes and engine_name == "ddp":
        warm_up(engine, dtype)
    losses, parts = [], []
    for step in range(first, last):
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        loss = (engine.model(x.to(dtype)).float() - y).square().mean()
        engine.backward(loss)
        engine.step()
        report = switcher.step()
        torch.distributed.all_reduce(loss.detach())
        losses.append(loss.detach() / world_size)
        if report is not None:
            parts.append([(part.site, part.slots, part.new_directions) for part in report.sites])
        if step + 1 in (NUM_STEPS // 2, last):
            switcher.save_checkpoint(f"{folder}/checkpoints", {"rate": RATE})
    switcher.close()  # another process goes on from here, and this one stays
    storage = switcher.storage
    storage.to_rest_layout_()
    whole = storage.gather_parameters(list(trained_parameters(engine.model).values()))
    return {
        "losses": losses,
        "parts": parts,
        "factors": [factor.detach().float().clone() for factor in whole],
        "weights": [storage.digest_weight(number) for number in range(len(storage.sites))],
        "held": [
            (site.state.held, site.state.born, site.state.num_taken, site.state.num_fused) for site in storage.sites
        ],
    }


def warm_up(engine: Engine, dtype: torch.dtype) -> None:
    """DDP adds gradients up in another order after its first backward pass, and a resumed run is past that."""
    x, _ = make_batch(0)
    for _ in range(2):
        engine.backward(engine.model(x.to(dtype)).sum())
        engine.model.zero_grad()


EXACT = [
    *(("plain", "fp32"), ("ddp, 4 ranks, more than sites", "fp32"), ("ddp, 2 ranks", "bf16"), ("ddp, 2 ranks", "nf4")),
    *(("zero0, 2 ranks", "bf16"), ("zero1, 2 ranks", "fp32")),
    *(("zero2, 3 ranks, uneven", "fp32"), ("zero2, 3 ranks, uneven", "bf16")),
    *(("zero2, 2 ranks, optimizer on the CPU", "fp32"), ("zero3, 2 ranks, optimizer on the CPU", "fp32")),
    *(("zero3, 2 ranks, parameters on the CPU", "fp32"), ("zero3, 3 ranks, uneven", "fp32"), ("zero3, 2 ranks", "nf4")),
    *(("zero3, 4 ranks, mixed", "fp32"), ("zero3, 4 ranks, mixed", "bf16"), ("fsdp2, 4 ranks, empty shards", "fp32")),
    ("fsdp2, 2 ranks", "nf4"),
]
MORE = {
    ("ddp, 2 ranks", "nf4"): {"fused_rank": 6},  # compressed on the way
    ("zero1, 2 ranks", "fp32"): {"switch_when": "settled", "num_switches": 3, "exhausted": "wrap"},
    ("zero2, 3 ranks, uneven", "fp32"): {"score": "change", "choose": "oldest", "optimizer_reset": "pair_steps"},
    ("zero3, 2 ranks", "nf4"): {"start": "zero_b"},
    ("zero3, 3 ranks, uneven", "fp32"): {"exhausted": "renew"},
    ("fsdp2, 2 ranks", "nf4"): {"exhausted": "renew"},
}


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("engine", "precision"), [pytest.param(*cell, id=" | ".join(cell)) for cell in EXACT])
def test_resumed_on_the_same_ranks_is_never_stopped(engine: str, precision: str, tmp_path: Path) -> None:
    name, world_size, zero, _ = ENGINES[engine]
    more = MORE.get((engine, precision), {})
    arguments = (name, precision, zero, str(tmp_path))
    undisturbed = run_ranks(train, world_size, *arguments, (0, NUM_STEPS), False, more)
    resumed = run_ranks(train, world_size, *arguments, (NUM_STEPS // 2, NUM_STEPS), True, more)
    for before, after in zip(undisturbed, resumed, strict=True):
        half = len(after["losses"])
        assert torch.equal(torch.stack(after["losses"]), torch.stack(before["losses"][half:]))
        assert after["parts"] == before["parts"][-len(after["parts"]) :]
        assert len(after["parts"]) == (1 if "num_switches" in more else 2)
        assert all(torch.equal(a, b) for a, b in zip(after["factors"], before["factors"], strict=True))
        assert after["weights"] == before["weights"]
        assert after["held"] == before["held"]


def lose_silently(rank: int, world_size: int, engine_name: str, zero: dict, folder: str) -> dict:
    """DeepSpeed's own checkpoint without frozen parameters, as the HF Trainer writes it, alone and with ours."""
    x, y = (t.chunk(world_size)[rank] for t in make_batch(50))
    seen = {}
    for run in ("before", "deepspeed alone", "with ours"):
        model = make_odd_net()
        switcher = Switcher(model, SRLoRAConfig(svd_cache=f"{folder}/svd", **OPTIONS), NUM_STEPS)
        engine = prepare(engine_name, model, RATE, CLIP, **zero)
        if run == "before":
            switcher.bind(engine.model, engine.optimizer)
            for step in range(5):
                part, target = (t.chunk(world_size)[rank] for t in make_batch(step))
                engine.backward((engine.model(part) - target).square().mean())
                engine.step()
                switcher.step()
            engine.model.save_checkpoint(f"{folder}/deepspeed", exclude_frozen_parameters=True)
            switcher.save_checkpoint(f"{folder}/checkpoints")
        else:
            engine.model.load_checkpoint(f"{folder}/deepspeed", load_module_strict=False)
        if run == "with ours":
            switcher.bind(engine.model, engine.optimizer, f"{folder}/checkpoints/step-5")
        with torch.no_grad():
            seen[run] = engine.model(x)
    engine.backward((engine.model(x) - y).square().mean())  # and it trains on
    engine.step()
    assert switcher.step() is None
    assert switcher.num_steps == 6
    return seen


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("engine", "zero"), [("zero2", {}), ("zero3", PARTITIONED), ("zero3", {})])
def test_what_deepspeed_leaves_out_of_its_checkpoint_comes_back(engine: str, zero: dict, tmp_path: Path) -> None:
    for seen in run_ranks(lose_silently, 2, engine, zero, str(tmp_path)):
        assert torch.equal(seen["with ours"], seen["before"])
        lost = (seen["deepspeed alone"] - seen["before"]).norm() / seen["before"].norm()
        assert lost > 0.1  # without an error: the edits of the base weights are gone


CHAIN = [("plain", 1, {}), ("ddp", 2, {}), ("zero3", 3, PARTITIONED), ("fsdp2", 2, {}), ("plain", 1, {})]
CHAIN_2 = [("zero2", 3, {}), ("plain", 1, {}), ("zero3", 4, MIXED), ("zero1", 2, {}), ("fsdp2", 4, {})]
STOPS = (0, 3, 5, 8, 10, NUM_STEPS)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("chain", "precision"), [(CHAIN, "fp32"), (CHAIN, "nf4"), (CHAIN_2, "fp32")])
def test_a_chain_of_engines_and_world_sizes_makes_the_same_choices(chain: list, precision: str, tmp_path: Path) -> None:
    (undisturbed,) = run_ranks(train, 1, "plain", precision, {}, str(tmp_path / "whole"), (0, NUM_STEPS), False, {})
    losses, parts = [], []
    for (name, world_size, zero), steps in zip(chain, zip(STOPS, STOPS[1:], strict=False), strict=True):
        ranks = run_ranks(train, world_size, name, precision, zero, str(tmp_path), steps, steps[0] > 0, {})
        losses += ranks[0]["losses"]
        parts += ranks[0]["parts"]
    assert parts == undisturbed["parts"]
    assert len(parts) == 4
    torch.testing.assert_close(torch.stack(losses), torch.stack(undisturbed["losses"]), rtol=0, atol=1e-5)
    assert ranks[0]["held"] == undisturbed["held"]
    for mine, theirs in zip(ranks[0]["factors"], undisturbed["factors"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
