"""A switch that changes the output is undone to the last bit, and ranks that drift apart are stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import srlora_dist.method.switch
from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.training_state import trained_parameters
from srlora_dist.method.switch import SwitchExecutor
from tests.ranks.engines import Engine, make_batch, make_odd_net, prepare
from tests.ranks.test_engines import MIXED, PARTITIONED, input_type
from tests.ranks.world import run_ranks

NUM_STEPS, DUE = 12, [2, 4, 7, 9]


def take_step(engine: Engine, switcher: Switcher, rank: int, world_size: int, step: int, dtype: torch.dtype) -> object:
    x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
    engine.backward((engine.model(x.to(dtype)).float() - y).square().mean())
    engine.step()
    return switcher.step()


def start(engine_name: str, precision: str, zero: dict, cache: str, **options) -> tuple[Engine, Switcher]:
    model = make_odd_net(precision)
    config = SRLoRAConfig(target_rank=7, svd_cache=f"{cache}/svd", beta1=0.8, beta2=0.6, **options)
    switcher = Switcher(model, config, NUM_STEPS)
    settings = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    engine = prepare(engine_name, model, 1e-2, 0.5, 1, settings, **zero)
    switcher.bind(engine.model, engine.optimizer)
    return engine, switcher


def held(engine: Engine, switcher: Switcher) -> dict:
    """All that this rank holds and a switch may change, and what it has noted."""
    storage = switcher.storage
    storage.to_rest_layout_()
    optimizer = {
        f"{run.site}.{run.factor}.{key}": run.of(moment).clone()
        for run in storage.held
        for key, moment in {**storage.optimizer.state[run.owner], "owner": run.owner}.items()
        if moment.dim() and moment.shape == run.owner.shape
    }
    statistics = [t.clone() for n in range(len(storage.sites)) for t in switcher.statistics.of_site(n)]
    model = [storage.local_span(p)[0].clone() for p in trained_parameters(engine.model).values()]
    fused = [f for site in storage.sites for f in (site.fused_a, site.fused_b) if f is not None]
    return {
        "weights": [storage.digest_weight(number) for number in range(len(storage.sites))],
        "residuals": [residual.clone() for residual in storage.residuals.values()],
        "tensors": [*optimizer.values(), *statistics, *model],
        "fused": [(f.clone() - 0 * f).detach() for f in storage.gather_parameters(fused)] if fused else [],
        "notes": [(list(site.state.held), site.state.num_taken, site.state.num_fused) for site in storage.sites],
        "ledger": sum(1 for _ in switcher.ledger.entries()) if switcher.ledger else 0,
    }


def undo(rank: int, world_size: int, engine_name: str, precision: str, zero: dict, cache: str) -> dict:
    """The second switch goes wrong: at one site W is not edited at all. The third is as it should be."""
    dtype = input_type(precision)
    engine, switcher = start(engine_name, precision, zero, cache, check_switch=True)
    reports, seen = [], {}
    add = SwitchExecutor._add_to_weight_
    before = {}

    def forget_one(self: SwitchExecutor, number: int, left: torch.Tensor, right: torch.Tensor) -> None:
        if number != 1:
            add(self, number, left, right)

    take_snapshot = srlora_dist.method.switch.take_snapshot

    def note_and_snapshot(*args: object) -> Callable[[], None]:
        before.update(held(engine, switcher))
        return take_snapshot(*args)

    srlora_dist.method.switch.take_snapshot = note_and_snapshot
    for step in range(NUM_STEPS):
        if step + 1 == DUE[1]:
            SwitchExecutor._add_to_weight_ = forget_one
        try:
            report = take_step(engine, switcher, rank, world_size, step, dtype)
        finally:
            SwitchExecutor._add_to_weight_ = add
        if step + 1 == DUE[1]:
            seen |= {"before": dict(before), "after": held(engine, switcher)}
        if report is not None:
            reports.append((report.undone, report.relative_output_change, report.switch))
    return {**seen, "reports": reports, "name": switcher.storage.name, "due": switcher.due_steps}


CELLS = [
    ("plain", 1, "fp32", {}),
    pytest.param("ddp", 2, "bf16", {}, marks=pytest.mark.slow),
    ("zero2", 3, "bf16", {}),
    ("zero3", 2, "fp32", PARTITIONED),
    ("zero3", 4, "bf16", MIXED),
    pytest.param("zero3", 2, "nf4", {}, marks=pytest.mark.slow),
    ("fsdp2", 2, "fp32", {}),
    pytest.param("fsdp2", 4, "bf16", {}, marks=pytest.mark.slow),
]


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("engine", "world_size", "precision", "zero"), CELLS)
def test_a_switch_that_changes_the_output_is_undone(
    engine: str, world_size: int, precision: str, zero: dict, tmp_path: Path
) -> None:
    ranks = run_ranks(undo, world_size, engine, precision, zero, str(tmp_path))
    for seen in ranks:
        assert seen["name"] == engine
        assert seen["due"] == DUE
        undone = [report[0] for report in seen["reports"]]
        assert undone == [False, True, False, False]
        assert seen["reports"][1][1] > 0.05
        assert all(change < 3e-2 for report, change, _ in seen["reports"] if not report)
        assert [number for *_, number in seen["reports"]] == [1, 2, 2, 3]
        before, after = seen["before"], seen["after"]
        assert after["weights"] == before["weights"]
        assert after["notes"] == before["notes"]
        assert after["ledger"] == before["ledger"]
        for key in ("residuals", "tensors", "fused"):
            assert len(after[key]) == len(before[key])
            assert all(torch.equal(a, b) for a, b in zip(after[key], before[key], strict=True)), key
        assert seen["reports"] == ranks[0]["reports"]


def drift(rank: int, world_size: int, engine_name: str, zero: dict, what: str, cache: str) -> dict:
    """One bit changes on the last rank after step 3; the ranks compare every 5 steps."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("srlora_dist").addHandler(handler)
    engine, switcher = start(engine_name, "fp32", zero, cache, agreement_every=5)
    message, step = "", 0
    try:
        for step in range(6):
            take_step(engine, switcher, rank, world_size, step, torch.float32)
            if step == 3 and rank == world_size - 1 and what != "none":
                parameters = trained_parameters(engine.model)
                bias = next(p for name, p in parameters.items() if "head" in name and "bias" in name)
                if what == "moment":
                    bias = switcher.storage.optimizer.state[bias]["exp_avg_sq"]
                with torch.no_grad():
                    bias = bias.to_local() if hasattr(bias, "to_local") else bias
                    bias.view(-1).view(torch.int32)[0] ^= 1 << 12
    except RuntimeError as error:
        message = str(error)
    logging.getLogger("srlora_dist").removeHandler(handler)
    return {"message": message, "step": step, "warnings": warnings}


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_ranks_that_drift_apart_are_stopped_at_the_next_comparison(what: str, tmp_path: Path) -> None:
    """Under ZeRO a copy is made anew in each step, so there it comes right by itself."""
    for seen in run_ranks(drift, 2, "ddp", {}, what, str(tmp_path), timeout=60):
        assert seen["step"] == 4
        assert "after step 5 the ranks hold different values of" in seen["message"]
        assert "head.modules_to_save.default.bias" in seen["message"]


def test_a_comparison_of_nothing_is_said_to_be_without_effect(tmp_path: Path) -> None:
    for seen in run_ranks(drift, 2, "fsdp2", {}, "none", str(tmp_path)):
        assert seen["message"] == ""
        assert [w for w in seen["warnings"] if "srlora.agreement_every 5 is without effect" in w]
