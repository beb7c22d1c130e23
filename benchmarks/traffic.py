"""How many bytes does SRLoRA send between switches, beside plain LoRA on the same engine? None is the promise.

    python benchmarks/traffic.py [--quick] [--engines ddp zero2 zero3 fsdp2] [--ranks 2]

Trains the small model of the tests on gloo ranks on CPUs, with and without SRLoRA, and counts at the dispatcher the
tensors that are handed to collectives; nothing is timed, so the counts say the same of any machine. What a DTensor
sends by itself, such as the norm of a clipped gradient, is out of the counter's sight, on both sides alike. A ratio is
the extra bytes of a step; the bytes of the one switch in the run stand beside it.
"""

from __future__ import annotations

import tempfile
from statistics import median

from side_by_side import Row, arguments, report

from tests.ranks.test_agreement import PARTITIONED, train
from tests.ranks.world import run_ranks

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")


def total(sent: list[tuple[str, int]]) -> int:
    """Bytes of some collectives."""
    return sum(size for _, size in sent)


def row(engine: str, num_ranks: int, cache: str) -> Row:
    """Plain LoRA and SRLoRA on one engine; a step counts with the rank whose bytes differ most."""
    zero = PARTITIONED if engine == "zero3" else {}
    plain = run_ranks(train, num_ranks, engine, zero, None)
    ours = run_ranks(train, num_ranks, engine, zero, cache)
    pairs = list(zip(ours, plain, strict=True))
    extra = [
        float(max((total(mine) - total(theirs) for mine, theirs in step), key=abs))
        for step in zip(*(zip(mine["steps"], theirs["steps"], strict=True) for mine, theirs in pairs), strict=True)
    ]
    switches = [total(sent) for seen in ours for sent in seen["switches"]]
    more = {
        "bytes_of_a_step_plain": median(total(sent) for sent in plain[0]["steps"]),
        "collectives_of_a_step_plain": median(len(sent) for sent in plain[0]["steps"]),
        "extra_collectives_of_a_step": sum(
            len(a) - len(b) for mine, theirs in pairs for a, b in zip(mine["steps"], theirs["steps"], strict=True)
        ),
        "bytes_of_a_switch": max(switches),
        "collectives_of_a_switch": len(ours[0]["switches"][0]),
    }
    case = f"{engine}, {num_ranks} gloo ranks, {len(extra)} steps, {len(ours[0]['switches'])} switch"
    question, reason = "extra bytes sent in a step between switches", "something is sent that plain LoRA does not send"
    return Row(question, "SRLoRA", "plain LoRA", case, extra, "exactly", 0.0, more=more, reason=reason)


def main() -> None:
    """Count and report; the counts are small enough that --quick changes nothing."""
    options = arguments(
        __doc__,
        engines={"nargs": "+", "choices": ENGINES, "help": "all of them, ddp alone if tiny"},
        ranks={"type": int, "default": 2},
    )
    engines = options.engines or (ENGINES[:1] if options.tiny else ENGINES)
    with tempfile.TemporaryDirectory() as cache:
        report("traffic", [row(engine, options.ranks, cache) for engine in engines], options)


if __name__ == "__main__":
    main()
