"""Every engine in every precision against tests/reference.py, around each switch and at the end, and rank against rank.

Each test is a cell of the matrix in docs/support.md, which benchmarks/support_matrix.py writes from their results.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel

import srlora_dist.storage.collectives
from srlora_dist import SRLoRAConfig, Switcher
from tests.ranks.dense import reference_run
from tests.ranks.engines import BATCH, SHAPES, make_batch, make_odd_base, make_odd_net, prepare
from tests.ranks.world import run_ranks
from tests.reference import due_steps

NUM_STEPS, RATE, CLIP, TARGET, RATIO, BETAS = 12, 1e-2, 0.5, 7, 0.5, (0.8, 0.6)
# Of rank 2 the second site needs the most switches and sets the pace: they fall after steps 2, 4, 7, 9 and 12, the last
# is left out, and the first site has used its 7 directions after two of them, the second of which takes a remainder.
DUE = due_steps(NUM_STEPS, 2, TARGET, RATIO)
SITES = tuple(SHAPES)
PROBE = torch.randn(BATCH, 13, generator=torch.Generator().manual_seed(5))


@dataclass
class Tolerance:
    """How far a run may be from the reference, and an output from itself, all relative."""

    output: float  # of the model around a switch
    weight: float  # norm of the difference of W
    factor: float
    score: float
    loss: float
    exported: float


EXACT = Tolerance(output=1e-5, weight=1e-6, factor=1e-4, score=1e-3, loss=1e-5, exported=1e-5)
TOLERANCES = {
    "fp32": EXACT,
    "bf16": Tolerance(output=1e-2, weight=4e-3, factor=2e-2, score=5e-2, loss=2e-2, exported=2e-2),
}


def input_type(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def train(rank: int, world_size: int, bucket: int, *arguments: object) -> dict:
    """The sharded run under test, what it sends cut into buckets of so many elements; returns what this rank saw."""
    with patch.object(srlora_dist.storage.collectives, "BUCKET_ELEMENTS", bucket):
        return _train(rank, world_size, *arguments)


def _train(
    rank: int,
    world_size: int,
    engine_name: str,
    precision: str,
    zero: dict,
    cache: str,
    accumulation: int,
    choices: dict,
) -> dict:
    model, dtype = make_odd_net(precision), input_type(precision)
    options = {"target_rank": TARGET, "fusion_ratio": RATIO, "beta1": BETAS[0], "beta2": BETAS[1], **choices}
    switcher = Switcher(model, SRLoRAConfig(svd_cache=cache, **options), NUM_STEPS)
    settings = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    engine = prepare(engine_name, model, RATE, CLIP, accumulation, settings, **zero)

    def probe() -> torch.Tensor:
        with torch.no_grad():
            return engine.model(PROBE.to(dtype)).float()

    seen = {"before": [probe()], "after": [], "still": [], "losses": [], "parts": [], "scores": []}
    switcher.bind(engine.model, engine.optimizer)
    seen["storage"] = switcher.storage.name
    seen["payload"] = [switcher.storage.digest_weight(number) for number in range(len(SITES))]
    seen["after"].append(probe())
    switched = True
    for step in range(NUM_STEPS):
        for group in switcher.storage.optimizer.param_groups:
            group["lr"] = 0.0 if switched else RATE  # what a switch preserves must survive the optimizer's copies
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        loss = 0.0
        for micro_x, micro_y in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            micro_loss = (engine.model(micro_x.to(dtype)).float() - micro_y).square().mean()
            engine.backward(micro_loss)
            engine.step()
            loss += micro_loss.detach() / accumulation
            if switcher.num_steps + 1 in switcher.due_steps or choices.get("switch_when") == "settled":
                before = probe()
            report = switcher.step()
        torch.distributed.all_reduce(loss)
        seen["losses"].append(loss / world_size)
        if switched:  # before a step that changes nothing
            seen["still"].append(probe())
        switched = report is not None
        if switched:
            seen["before"].append(before)
            seen["after"].append(probe())
            seen["parts"].append(
                {part.site: (part.slots, part.directions, part.new_directions) for part in report.sites}
            )
            seen["scores"].append({part.site: part.scores for part in report.sites})
    if engine_name == "zero3":
        seen["persistent"] = [site.weight.ds_status.name == "AVAILABLE" for site in switcher.storage.sites]
        seen["stored_sizes"] = [site.weight.ds_numel for site in switcher.storage.sites]
    seen["final"] = probe()
    switcher.export(f"{cache}/adapter")
    seen.update(state_of(switcher))
    seen["payload_after"] = [switcher.storage.digest_weight(number) for number in range(len(SITES))]
    seen["held"] = {site.name: site.state.held for site in switcher.sites}
    seen["steps"], seen["due"] = switcher.num_steps, switcher.due_steps
    return seen


def state_of(switcher: Switcher) -> dict:
    """Whole weights with what was added beside them, factors and moments, as this rank sees them."""
    storage, sites = switcher.storage, switcher.storage.sites
    storage.to_rest_layout_()
    # Each rank in turn gathers what the others hold; where ranks hold copies it is this rank's own.
    gathered = [
        [storage.gather_weight(number, rank) for number in range(len(SITES))] for rank in range(storage.world_size)
    ]
    weights = gathered[storage.rank]
    for number, site in enumerate(sites):
        if site.fused_a is not None:
            fused_a, fused_b = storage.gather_parameters([site.fused_a, site.fused_b])
            assert not any(factor.requires_grad for factor in (site.fused_a, site.fused_b))
            weights[number] = weights[number] + site.scale * (fused_b @ fused_a)
    factors = storage.gather_parameters([site.factor(f) for site in sites for f in "AB"])
    moments = {}
    for number, name in enumerate(SITES):
        for f in "AB":
            whole = torch.zeros(sites[number].factor_shape(f).numel())
            for run in storage.held:
                if (run.site, run.factor) == (number, f):
                    whole[run.start : run.start + run.numel] = run.of(storage.optimizer.state[run.owner]["exp_avg_sq"])
            if storage.cuts_optimizer:
                torch.distributed.all_reduce(whole)
            moments[f"{name}.{f}"] = whole
    return {
        "weights": [w.detach().clone() for w in weights],
        "factors": [f.detach().float().clone() for f in factors],
        "moments": moments,
    }


PARTITIONED = {"stage3_param_persistence_threshold": 0}
MIXED = {"stage3_param_persistence_threshold": 100, "sub_group_size": 50}
ON_CPU = {"device": "cpu"}
ENGINES = {  # engine, ranks, zero_optimization, accumulation steps
    "plain": ("plain", 1, {}, 1),
    "ddp, 2 ranks": ("ddp", 2, {}, 1),
    "ddp, 4 ranks, more than sites": ("ddp", 4, {}, 1),
    "zero0, 2 ranks": ("zero0", 2, {}, 1),
    "zero0, 3 ranks, accumulation": ("zero0", 3, {}, 2),
    "zero1, 2 ranks": ("zero1", 2, {}, 1),
    "zero2, 2 ranks": ("zero2", 2, {}, 1),
    "zero2, 2 ranks, accumulation": ("zero2", 2, {}, 2),
    "zero2, 3 ranks, uneven": ("zero2", 3, {}, 1),
    "zero2, 2 ranks, round robin": ("zero2", 2, {"round_robin_gradients": True}, 1),
    "zero2, 2 ranks, optimizer on the CPU": ("zero2", 2, {"offload_optimizer": ON_CPU}, 1),
    "zero3, 2 ranks": ("zero3", 2, PARTITIONED, 1),
    "zero3, 3 ranks, uneven": ("zero3", 3, PARTITIONED, 1),
    "zero3, 4 ranks, empty spans": ("zero3", 4, PARTITIONED, 1),
    "zero3, 2 ranks, persistent, accumulation": ("zero3", 2, {}, 2),
    "zero3, 4 ranks, mixed": ("zero3", 4, MIXED, 1),
    "zero3, 2 ranks, optimizer on the CPU": ("zero3", 2, {**PARTITIONED, "offload_optimizer": ON_CPU}, 1),
    "zero3, 2 ranks, parameters on the CPU": ("zero3", 2, {**PARTITIONED, "offload_param": ON_CPU}, 1),
    "zero3, 2 ranks, hpZ": ("zero3", 2, {**PARTITIONED, "zero_hpz_partition_size": 2}, 1),
    "fsdp2, 2 ranks": ("fsdp2", 2, {}, 1),
    "fsdp2, 4 ranks, empty shards": ("fsdp2", 4, {}, 1),
}
QUANTISED_ON = ["plain", "ddp, 2 ranks", "zero2, 2 ranks", "zero3, 2 ranks", "zero3, 2 ranks, persistent, accumulation"]
CELLS = [(engine, precision) for precision in ("fp32", "bf16") for engine in ENGINES]
CELLS += [(engine, precision) for precision in ("nf4", "nf4-double", "fp4", "int8") for engine in QUANTISED_ON]
CELLS += [("fsdp2, 2 ranks", precision) for precision in ("nf4", "nf4-double", "fp4")]
REFUSED = {  # tested in test_agreement.py; here for the matrix
    ("fsdp2, 2 ranks", "int8"): "refused: bitsandbytes cannot use it there",
}


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        *(pytest.param(*cell, id=" | ".join(cell)) for cell in CELLS),
        *(pytest.param(*cell, id=" | ".join(cell), marks=pytest.mark.skip(reason)) for cell, reason in REFUSED.items()),
    ],
)
def test_engine_equals_the_reference(engine: str, precision: str, tmp_path) -> None:
    assert_equals_the_reference(engine, precision, tmp_path, {})


EARLY = {"switch_when": "settled", "num_switches": 2}
OTHER_CHOICES = {
    "plain": {
        "score": "relative",
        "choose": "highest",
        "optimizer_reset": "survivors",
        "exhausted": "wrap",
        "start": "zero_b",
    },
    "ddp, 2 ranks": {"score": "change", "choose": "oldest", "optimizer_reset": "pair_steps", "exhausted": "renew"},
    "zero0, 2 ranks": {"grace": 2, "optimizer_reset": "pair_steps", **EARLY},
    "zero2, 3 ranks, uneven": {"score": "relative", "grace": 2, "optimizer_reset": "pair_steps", "exhausted": "wrap"},
    "zero3, 4 ranks, empty spans": {"score": "change", "optimizer_reset": "survivors", "start": "zero_b"},
    "zero3, 2 ranks": {"exhausted": "renew"},
    "fsdp2, 4 ranks, empty shards": {"score": "relative", "choose": "oldest", "exhausted": "renew", **EARLY},
}
"""What is not the paper's, on an engine of each way to hold tensors."""


@pytest.mark.timeout(150)
@pytest.mark.parametrize("engine", OTHER_CHOICES)
def test_other_choices_equal_the_reference(engine: str, tmp_path) -> None:
    assert_equals_the_reference(engine, "fp32", tmp_path, OTHER_CHOICES[engine])


def assert_equals_the_reference(engine: str, precision: str, tmp_path: Path, choices: dict) -> None:
    """Train on the engine and with the reference, and compare all that there is."""
    name, world_size, zero, accumulation = ENGINES[engine]
    bucket = 1 if world_size == 3 else 1 << 18  # elements: a bucket per site, or one for all
    leaves_settings = "zero_hpz_partition_size" in zero
    arguments = (bucket, name, precision, zero, str(tmp_path), accumulation, choices)
    ranks = run_ranks(train, world_size, *arguments, last=leaves_settings)
    masters_in_fp32 = precision == "bf16" and name.startswith("zero")
    options = {"num_steps": NUM_STEPS, "rate": RATE, "clip": CLIP, "target": TARGET, "ratio": RATIO, "betas": BETAS}
    num_switches = choices.get("num_switches", len(DUE))
    options["due"] = [(k + 1) * NUM_STEPS // (num_switches + 1) for k in range(num_switches)]
    options["choices"] = {key.removeprefix("optimizer_"): value for key, value in choices.items()}
    options["choices"].pop("num_switches", None)
    if options["choices"].pop("switch_when", "due") == "settled":
        options["choices"]["interval"] = options["due"][0]
    expected = reference_run(precision, masters_in_fp32, options)
    tolerance, first = TOLERANCES.get(precision, EXACT), ranks[0]
    assert first["storage"] == name  # the engine asked for is the one that ran
    assert first["due"] == expected["due"]
    assert (first["due"] == options["due"]) == (choices.get("switch_when") != "settled")
    assert first["steps"] == NUM_STEPS
    assert first["parts"] == expected["parts"]
    assert first["held"] == expected["held"]
    if not choices:
        assert first["due"] == DUE == [2, 4, 7, 9]
        assert "first" not in first["parts"][2]  # its directions are used up, those of the second are not
    for mine, theirs in zip(first["scores"], expected["scores"], strict=True):
        for site, score in mine.items():
            close(torch.tensor(score).double(), theirs[site].double(), tolerance.score, 1e-12)
    for mine, theirs in zip(first["losses"], expected["losses"], strict=True):
        close(mine, theirs, tolerance.loss, 1e-6)
    # Directions of weights that differ by a rounding differ by as much times the norm of W over a gap of its values.
    of_weight = tolerance.weight * (10 if choices.get("exhausted") == "renew" else 1)
    for mine, theirs in zip(first["weights"], expected["weights"], strict=True):
        assert (mine - theirs).norm() <= of_weight * theirs.norm()
    for mine, theirs in zip(first["factors"], expected["factors"], strict=True):
        close(mine, theirs, tolerance.factor, tolerance.factor / 10)
    for key, theirs in expected["moments"].items():
        close(first["moments"][key], theirs, 10 * tolerance.factor, 1e-8)
    for before, after, still in zip(first["before"], first["after"], first["still"], strict=True):  # invariant 1
        assert (after - before).norm() <= tolerance.output * before.norm()
        assert (still - before).norm() <= tolerance.output * before.norm()
    if name == "zero3":  # both ways of holding W were run
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        assert first["persistent"] == [threshold > size for size in first["stored_sizes"]]
    base = make_odd_base(precision)
    exported = PeftModel.from_pretrained(base, tmp_path / "adapter").train()  # invariant 4
    output = exported(PROBE.to(input_type(precision))).float()
    assert (output - first["final"]).norm() <= tolerance.exported * output.norm()
    for other in ranks[1:]:  # invariant 2: bit for bit
        assert other["parts"] == first["parts"]
        assert all(torch.equal(a, b) for a, b in zip(other["factors"], first["factors"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(other["weights"], first["weights"], strict=True))
    for seen in ranks if precision in ("nf4", "nf4-double", "fp4", "int8") else ():
        assert seen["payload"] == seen["payload_after"]  # never written


def close(mine: torch.Tensor, theirs: torch.Tensor, relative: float, absolute: float) -> None:
    torch.testing.assert_close(mine, theirs, rtol=relative, atol=absolute)


logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
