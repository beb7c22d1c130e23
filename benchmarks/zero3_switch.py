"""What does a switch cost under ZeRO-3, beside the same edit through DeepSpeed's GatheredParameters?

    python benchmarks/zero3_switch.py [--quick] [--layers 24] [--width 4096] [--ranks 2]

Ranks are gloo processes on CPUs on a real DeepSpeed ZeRO-3 engine that cuts every weight; nothing is measured on GPU.
Three contenders take turns on the same weights. *Gathered* is what a user can do with DeepSpeed alone: gather each W,
let rank 0 add ``s left @ right``, and have the result sent and cut again. *Local* is the same edit by
``Storage.edit_weight_`` on what each rank holds. *Switch* is all of ours: scores, choice, directions, factors, edit,
new pairs, moments, ledger and digests. A time ends with a barrier, and is that of the slowest rank. Bytes are those of
the tensors handed to collectives; the edits are checked to be equal first.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from side_by_side import Row, alternate, arguments, medians, ratios, report
from stack import make_stack, make_switcher, prepare_stack, train_step

from srlora_dist import Switcher
from srlora_dist.method.budget import num_fused
from tests.ranks.test_agreement import Traffic
from tests.ranks.world import run_ranks

RANK, RATIO, WARM_UP, TARGET = 8, 0.5, 3, 10.0
REASONS = {
    "local": "the edit reads and writes W once; the ranks share the bandwidth of one memory with the peer's messages",
    "switch": "beside the edit it has about 100 small operations a site on the factors, their moments and digests, "
    "which do not grow with the weights as the gathers do",
}


def edit_gathered_(switcher: Switcher, pairs: list[tuple]) -> None:
    """The peer: DeepSpeed's own way to edit a weight that is cut."""
    import deepspeed

    for site, (left, right) in zip(switcher.sites, pairs, strict=True):
        with deepspeed.zero.GatheredParameters([site.weight], modifier_rank=0):
            if dist.get_rank() == 0:
                site.weight.data.addmm_(left, right, alpha=site.scale)


def edit_locally_(switcher: Switcher, pairs: list[tuple]) -> None:
    """Ours."""
    for number, (left, right) in enumerate(pairs):
        switcher.storage.edit_weight_(number, left, right)


@torch.no_grad()
def measure(_rank: int, _num_ranks: int, num_layers: int, width: int, rounds: int, cache: str) -> dict:
    """Seconds of each round, bytes, and how far the two edits are from each other."""
    fused = num_fused(RANK, RATIO)
    model = make_stack(num_layers, width, RANK)
    switcher = make_switcher(model, RANK + fused * (rounds + WARM_UP + 1), cache)
    engine = prepare_stack("zero3", model)
    switcher.bind(engine.model, engine.optimizer)
    switcher._bound.watch.require_untouched = lambda: None  # the other contenders edit W on purpose
    with torch.enable_grad():
        train_step(engine, width)
    switcher.step()
    switcher.storage.to_rest_layout_()
    torch.manual_seed(1)
    pairs = [(torch.randn(width, 2 * fused) / width, torch.randn(2 * fused, width)) for _ in range(num_layers)]
    contenders = {
        "gathered": lambda: edit_gathered_(switcher, pairs),
        "local": lambda: edit_locally_(switcher, pairs),
        "switch": switcher._switch_now,
    }
    bytes_sent, largest = {}, 0.0
    runs = [switcher.storage.local_span(site.weight)[0] for site in switcher.sites]
    before, made = [run.clone() for run in runs], {}
    for name, contender in contenders.items():
        with Traffic() as traffic:
            contender()
        bytes_sent[name] = sum(size for _, size in traffic.take())
        if name != "switch":
            made[name] = [run.clone() for run in runs]
            for run, kept in zip(runs, before, strict=True):
                run.copy_(kept)
    for one, other, start in zip(made["local"], made["gathered"], before, strict=True):
        assert not torch.equal(one, start)
        largest = max(largest, float((one - other).norm() / other.norm()))
    timed = {name: lambda each=each: (each(), dist.barrier()) for name, each in contenders.items()}
    seconds = alternate(timed, rounds, WARM_UP)
    return {"seconds": seconds, "bytes": bytes_sent, "difference": largest, "small": small_bytes(switcher, fused)}


def small_bytes(switcher: Switcher, fused: int) -> int:
    """What a switch may send: scores, directions, factors, digests, and whether the ledger was written."""
    sizes = [sum(site.shape) for site in switcher.sites]
    directions = sum(4 * fused * (size + 1) for size in sizes) + 4 * len(list(switcher._bound.executor.buckets()))
    return sum(8 * RANK + 4 * RANK * size + 16 for size in sizes) + directions + 8


def rows_of(num_layers: int, width: int, num_ranks: int, rounds: int) -> list[Row]:
    """The two questions on one stack of weights."""
    with tempfile.TemporaryDirectory() as cache:
        seen = run_ranks(measure, num_ranks, num_layers, width, rounds, cache, timeout=3600)
    assert max(each["difference"] for each in seen) <= 1e-6, seen
    slowest = {
        name: [max(times) for times in zip(*(each["seconds"][name] for each in seen), strict=True)]
        for name in seen[0]["seconds"]
    }
    sent = {name: max(each["bytes"][name] for each in seen) for name in slowest}
    question, peer = "a switch under ZeRO-3", "GatheredParameters, one weight at a time"
    case = f"{num_layers} weights of {width} x {width}, fp32, rank {2 * num_fused(RANK, RATIO)}, "
    case += f"{num_ranks} gloo ranks of 1 thread"
    rows = []
    for name, ours in (("local", "the edits of W alone"), ("switch", "the whole switch")):
        more = {
            "bytes_ours": sent[name],
            "bytes_peer": sent["gathered"],
            "bytes_of_base_weights_ours": sent[name] - (seen[0]["small"] if name == "switch" else 0),
            "largest_relative_difference": max(each["difference"] for each in seen),
        }
        seconds = medians({name: slowest[name], "gathered": slowest["gathered"]})
        gains = ratios(slowest["gathered"], slowest[name])
        row = Row(f"{question}: {ours}", name, peer, case, gains, "at least", TARGET, seconds, more)
        row.reason = REASONS[name]
        rows.append(row)
    return rows


def main() -> None:
    """Measure and report."""
    options = arguments(
        __doc__,
        width={"type": int, "help": "of the square weights; without it 24 of 1024, and 6 of 4096"},
        layers={"type": int, "default": 24, "help": "of that width"},
        ranks={"type": int, "default": 2},
        rounds={"type": int},
    )
    cases = [(options.layers, options.width)] if options.width else [(24, 1024), (6, 4096)]
    for layers, width in [(2, 64)] if options.tiny else cases:
        rounds = options.rounds or (2 if options.tiny else 5 if options.quick else 15)
        report("zero3_switch", rows_of(layers, width, options.ranks, rounds), options)


if __name__ == "__main__":
    main()
