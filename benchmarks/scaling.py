"""What does SRLoRA cost a rank as ranks are added, with the same work a rank (weak scaling)?

    python benchmarks/scaling.py [--quick] [--engines ddp zero3 fsdp2] [--ranks 1 2 4] [--layers 12] [--width 1024]

Gloo ranks on CPUs, nothing is measured on GPU; every rank trains on four rows a step. What is counted does not depend
on the machine: memory for tracking, elements of W that a rank edits, collectives and bytes of a switch. The seconds do,
and with more ranks than cores they grow whatever a program does, so they have no target; nor do the numbers of ranks
take turns, for each has its own processes.
"""

from __future__ import annotations

import os
import tempfile

import torch.distributed as dist
from side_by_side import Row, alternate, arguments, medians, ratios, report
from stack import make_stack, make_switcher, prepare_stack, train_step

from srlora_dist.method.budget import num_fused
from tests.ranks.test_agreement import Traffic
from tests.ranks.world import run_ranks

RANK, WARM_UP, CUT = 8, 2, ("zero3", "fsdp2")
SECONDS = ("step", "switch")


def measure(_rank: int, _num_ranks: int, engine_name: str, layers: int, width: int, rounds: int, cache: str) -> dict:
    """One engine on so many ranks: what each of them holds, sends and waits for."""
    model = make_stack(layers, width, RANK)
    # Each switch takes directions: those of the warm-up, of the rounds and the counted one.
    switcher = make_switcher(model, RANK + num_fused(RANK, 0.5) * (rounds + WARM_UP + 3), cache)
    engine = prepare_stack(engine_name, model)
    switcher.bind(engine.model, engine.optimizer)

    def step() -> None:
        train_step(engine, width)
        switcher.step()
        dist.barrier()

    def switch() -> None:
        switcher._switch_now()
        dist.barrier()

    step()
    with Traffic() as traffic:
        switcher._switch_now()
    sent = traffic.take()
    storage = switcher.storage
    storage.to_rest_layout_()
    return {
        "tracking_bytes": switcher.statistics.num_bytes,
        "whole_tracking_bytes": sum(8 * site.rank * sum(site.shape) for site in switcher.sites),
        "edited": sum(storage.weight_to_edit(number)[0].numel() for number in range(layers)),
        "weights": sum(site.shape[0] * site.shape[1] for site in switcher.sites),
        "collectives": len(sent),
        "bytes": sum(size for _, size in sent),
        "seconds": alternate({"step": step, "switch": switch}, rounds, WARM_UP),
    }


def rows_of(engine: str, seen: dict[int, list[dict]], case: str) -> list[Row]:
    """What is reported of one engine, from its ranks' answers by the number of ranks."""
    rows = []

    def add(question: str, above: int, below: int, values: list[float], bound: str, target: float | None) -> Row:
        of_case = f"{engine}, {above} ranks beside {below}, {case}"
        rows.append(Row(question, f"{above} ranks", f"{below} rank{'s' * (below > 1)}", of_case, values, bound, target))
        return rows[-1]

    def fullest(name: str, num_ranks: int) -> float:
        return max(each[name] for each in seen[num_ranks])

    fewest = min((number for number in seen if number > 1), default=1)
    for number in sorted(set(seen) - {1}):
        shares = [each["tracking_bytes"] * number / each["whole_tracking_bytes"] for each in seen[number]]
        row = add("memory of a rank for tracking, of 1 / N", number, 1, [max(shares)], "at most", 1.05)
        row.more = {"emptiest_rank": min(shares)}
        row.reason = "sites, or under FSDP2 rows of factors, do not divide evenly"
        if engine in CUT:
            share = fullest("edited", number) * number / fullest("weights", number)
            add("elements of W that a rank edits, of 1 / N", number, 1, [share], "at most", 1.05)
        if number > fewest:
            for name, bound in (("collectives", "exactly"), ("bytes", "at most")):
                growth = fullest(name, number) / fullest(name, fewest)
                row = add(f"{name} of a switch on a rank", number, fewest, [growth], bound, 1.0)
                row.more = {f"on_{n}_ranks": fullest(name, n) for n in (fewest, number)}
    slowest = {
        number: {name: [max(s) for s in zip(*(e["seconds"][name] for e in each), strict=True)] for name in SECONDS}
        for number, each in seen.items()
    }
    for number in sorted(set(seen) - {min(seen)}):
        note = ", oversubscribed" if number > (os.cpu_count() or 1) else ""
        for name in SECONDS:
            gains = ratios(slowest[number][name], slowest[min(seen)][name])
            row = add(f"seconds of a {name}{note}", number, min(seen), gains, "at most", None)
            row.seconds = medians({f"on {n}": slowest[n][name] for n in (min(seen), number)})
    return rows


def main() -> None:
    """Measure and report."""
    options = arguments(
        __doc__,
        engines={"nargs": "+", "choices": ("ddp", *CUT), "help": "all of them, ddp alone if tiny"},
        ranks={"nargs": "+", "type": int, "help": "1 2 4, 1 2 if tiny"},
        layers={"type": int, "default": 12},
        width={"type": int, "help": "of the square weights, 256 if quick, else 1024"},
        rounds={"type": int},
    )
    width = options.width or (64 if options.tiny else 256 if options.quick else 1024)
    rounds = options.rounds or (2 if options.tiny else 5 if options.quick else 15)
    engines = options.engines or (("ddp",) if options.tiny else ("ddp", *CUT))
    ranks = sorted(options.ranks or ([1, 2] if options.tiny else [1, 2, 4]))
    case = f"{options.layers} weights of {width} x {width}, LoRA rank {RANK}, gloo ranks of 1 thread"
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for engine in engines:
            sizes = (options.layers, width, rounds, cache)
            seen = {n: run_ranks(measure, n, engine, *sizes, timeout=3600) for n in ranks}
            rows += rows_of(engine, seen, case)
    report("scaling", rows, options)


if __name__ == "__main__":
    main()
