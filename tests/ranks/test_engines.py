"""Every engine against tests/reference.py, around each switch and at the end, and ranks against ranks."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import PeftModel

import srlora_dist.switcher
from srlora_dist import SRLoRAConfig, Switcher
from tests.ranks.engines import BATCH, SHAPES, OddNet, make_batch, make_odd_net, prepare
from tests.ranks.world import run_ranks
from tests.reference import Reference, Site, due_steps

NUM_STEPS, RATE, CLIP, TARGET, RATIO, BETAS = 12, 1e-2, 0.5, 7, 0.5, (0.8, 0.6)
# Of rank 2 the second site needs the most switches and sets the pace: they fall after steps 2, 4, 7, 9 and 12, the last
# is left out, and the first site has used its 7 directions after two of them, the second of which takes a remainder.
DUE = due_steps(NUM_STEPS, 2, TARGET, RATIO)
SITES = tuple(SHAPES)
PROBE = torch.randn(BATCH, 13, generator=torch.Generator().manual_seed(5))


def rate_of(step: int) -> float:
    """0 for the step right after a switch: what a switch preserves must survive the optimizer's copies."""
    return 0.0 if step in (0, *DUE) else RATE


def train(
    rank: int, world_size: int, engine_name: str, zero: dict, cache: str, accumulation: int, bucket_bytes: int
) -> dict:
    """The sharded run under test; returns what this rank saw."""
    model = make_odd_net()
    srlora_dist.switcher.BUCKET_BYTES = bucket_bytes
    options = {"target_rank": TARGET, "fusion_ratio": RATIO, "beta1": BETAS[0], "beta2": BETAS[1]}
    switcher = Switcher(model, SRLoRAConfig(svd_cache=cache, **options), NUM_STEPS)
    engine = prepare(engine_name, model, RATE, CLIP, accumulation, **zero)
    seen = {"before": [engine.model(PROBE).detach()], "after": [], "still": [], "losses": [], "parts": [], "scores": []}
    switcher.bind(engine.model, engine.optimizer)
    seen["storage"] = switcher.storage.name
    seen["after"].append(engine.model(PROBE).detach())
    for step in range(NUM_STEPS):
        for group in switcher.storage.optimizer.param_groups:
            group["lr"] = rate_of(step)
        x, y = (t.chunk(world_size)[rank] for t in make_batch(step))
        loss = 0.0
        for micro_x, micro_y in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            micro_loss = (engine.model(micro_x) - micro_y).square().mean()
            engine.backward(micro_loss)
            engine.step()
            loss += micro_loss.detach() / accumulation
            if switcher.num_steps + 1 in switcher.due_steps:
                before = engine.model(PROBE).detach()
            report = switcher.step()
        torch.distributed.all_reduce(loss)
        seen["losses"].append(loss / world_size)
        if rate_of(step) == 0:  # a step that changes nothing, right after a switch
            seen["still"].append(engine.model(PROBE).detach())
        if report is not None:
            seen["before"].append(before)
            seen["after"].append(engine.model(PROBE).detach())
            seen["parts"].append(
                {part.site: (part.slots, part.directions, part.new_directions) for part in report.sites}
            )
            seen["scores"].append({part.site: part.scores for part in report.sites})
    if engine_name == "zero3":
        seen["whole"] = [site.weight.ds_status.name == "AVAILABLE" for site in switcher.storage.sites]
    seen["final"] = engine.model(PROBE).detach()
    switcher.export(f"{cache}/adapter")
    seen.update(state_of(switcher))
    seen["held"] = {site.name: site.held for site in switcher.sites}
    seen["steps"], seen["due"] = switcher.num_steps, switcher.due_steps
    return seen


def state_of(switcher: Switcher) -> dict:
    """Whole weights (rank 0, or every copy), factors and moments as this rank can see them."""
    storage = switcher.storage
    weights = [storage.gather_weight(number) for number in range(len(SITES))]
    if storage.name != "zero3":
        weights = [site.weight for site in storage.sites]
    factors = storage.gather_parameters([site.factor(f) for site in storage.sites for f in "AB"])
    moments = {}
    for number, name in enumerate(SITES):
        for f in "AB":
            whole = torch.zeros(storage.sites[number].factor_shape(f).numel())
            for run in storage.held:
                if (run.site, run.factor) == (number, f):
                    whole[run.start : run.start + run.numel] = run.of(storage.optimizer.state[run.owner]["exp_avg_sq"])
            if storage.name.startswith("zero"):
                torch.distributed.all_reduce(whole)
            moments[f"{name}.{f}"] = whole
    return {
        "weights": [w.detach().clone() for w in weights if w is not None],
        "factors": [f.detach().clone() for f in factors],
        "moments": moments,
    }


def reference_run() -> dict:
    """The same training with the specification."""
    model = make_odd_net().base_model.model
    layers = {name: getattr(model, name) for name in SITES}
    sites = {}
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        sites[name] = Site(
            layer.base_layer.weight, a, b, layer.scaling["default"], min(TARGET, *layer.base_layer.weight.shape)
        )
    reference = Reference(sites, RATIO, *BETAS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0)
    losses, parts, scores = [], [], []
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = rate_of(step)
        x, y = make_batch(step)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        reference.observe()
        optimizer.step()
        losses.append(loss.detach())
        if step + 1 in DUE:
            scores.append({name: reference.scores(site) for name, site in sites.items()})
            held = {name: list(site.holds) for name, site in sites.items()}
            chosen = {name: slots for name, slots in reference.switch(optimizer).items() if slots}
            pick = {
                name: ([held[name][k] for k in ks], [sites[name].holds[k] for k in ks]) for name, ks in chosen.items()
            }
            parts.append({name: (slots, *pick[name]) for name, slots in chosen.items()})
    return {
        "losses": losses,
        "parts": parts,
        "scores": scores,
        "held": {name: site.holds for name, site in sites.items()},
        "weights": [site.W.detach() for site in sites.values()],
        "factors": [f.detach() for site in sites.values() for f in (site.A, site.B)],
        "moments": {
            f"{n}.{f}": optimizer.state[getattr(s, f)]["exp_avg_sq"].flatten() for n, s in sites.items() for f in "AB"
        },
    }


def untouched() -> OddNet:
    """The base that the runs started from."""
    torch.manual_seed(0)
    return OddNet()


CASES = [
    pytest.param("plain", 1, {}, 1, id="plain"),
    pytest.param("ddp", 2, {}, 1, id="ddp-2"),
    pytest.param("ddp", 4, {}, 1, id="ddp-4-more-ranks-than-sites"),
    pytest.param("zero1", 2, {}, 1, id="zero1-2"),
    pytest.param("zero2", 2, {}, 2, id="zero2-2-accumulation"),
    pytest.param("zero2", 3, {}, 1, id="zero2-3-uneven"),
    pytest.param("zero2", 2, {"round_robin_gradients": True}, 1, id="zero2-2-round-robin"),
    pytest.param("zero2", 2, {"offload_optimizer": {"device": "cpu"}}, 1, id="zero2-2-offload"),
    pytest.param("zero3", 2, {"offload_optimizer": {"device": "cpu"}}, 1, id="zero3-2-offload"),
    pytest.param("zero3", 2, {"stage3_param_persistence_threshold": 0}, 1, id="zero3-2-partitioned"),
    pytest.param("zero3", 3, {"stage3_param_persistence_threshold": 0}, 1, id="zero3-3-uneven"),
    pytest.param("zero3", 4, {"stage3_param_persistence_threshold": 0}, 1, id="zero3-4-empty-spans"),
    pytest.param("zero3", 2, {}, 2, id="zero3-2-persistent-accumulation"),
    pytest.param("zero3", 4, {"stage3_param_persistence_threshold": 100, "sub_group_size": 50}, 1, id="zero3-4-mixed"),
]


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("name", "world_size", "zero", "accumulation"), CASES)
def test_engine_equals_the_reference(name: str, world_size: int, zero: dict, accumulation: int, tmp_path) -> None:
    bucket_bytes = 1 if world_size == 3 else 1 << 20  # a bucket a site, or one for all
    ranks = run_ranks(train, world_size, name, zero, str(tmp_path), accumulation, bucket_bytes)
    expected = reference_run()
    first = ranks[0]
    assert first["storage"] == name  # the engine asked for is the one that ran
    assert first["due"] == DUE == [2, 4, 7, 9]
    assert first["steps"] == NUM_STEPS
    assert first["parts"] == expected["parts"]
    assert first["held"] == expected["held"]
    assert "first" not in first["parts"][2]  # its directions are used up, those of the second are not
    for mine, theirs in zip(first["scores"], expected["scores"], strict=True):
        for site, score in mine.items():
            torch.testing.assert_close(torch.tensor(score), theirs[site], rtol=1e-3, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(first["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(first["weights"], expected["weights"], strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    torch.testing.assert_close(first["factors"], expected["factors"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["moments"], expected["moments"], rtol=1e-3, atol=1e-8)
    for before, after, still in zip(first["before"], first["after"], first["still"], strict=True):  # invariant 1
        assert (after - before).norm() <= 1e-5 * before.norm()
        assert (still - before).norm() <= 1e-5 * before.norm()
    if name == "zero3":  # both ways of holding W were run
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        assert first["whole"] == [threshold > m * n for m, n in SHAPES.values()]
    exported = PeftModel.from_pretrained(untouched(), tmp_path / "adapter")  # invariant 4
    assert (exported(PROBE) - first["final"]).abs().max() <= 1e-5
    for other in ranks[1:]:  # invariant 2: bit for bit
        assert other["parts"] == first["parts"]
        assert all(torch.equal(a, b) for a, b in zip(other["factors"], first["factors"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(other["weights"], first["weights"], strict=False))


logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
