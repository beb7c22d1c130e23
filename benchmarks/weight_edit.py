"""What does the edit of W by a sum of pairs cost, beside one scalar ``add_`` on the same run?

    python benchmarks/weight_edit.py [--quick] [--width 4096] [--threads 2]

A switch that fuses r' pairs and takes r' directions out adds ``s left @ right`` of rank 2 r' to what a rank holds of W.
No edit can be faster than reading and writing the run once, which is what ``add_`` of a number does. Runs: the whole
matrix; an odd one that begins and ends inside rows; and the whole of many matrices in turn, more than a cache (cold),
as a switch finds the weights of a model. Beside the ratios stands the speed of the edit and that of a large product in
the same rounds. The 16-bit form keeps W as ``high + low``; its peer is ``add_`` on both terms. Both forms are first
checked against float64. Runs on the accelerator where there is one (so far measured on CPU only), else on so many
threads: on a machine whose cores others use too, threads that wait for each other drown the difference.
"""

from __future__ import annotations

import itertools

import torch
from side_by_side import Row, alternate, arguments, device, medians, ratios, report
from torch import Tensor

from srlora_dist.layers.pairs import add_pairs_, add_pairs_to_sum_

TARGETS = {4: 2.0, 8: 2.0, 16: 2.5}
COLD_BYTES = 1 << 30
REASON = (
    "where gflops is near that of a large product the edit is bound by arithmetic, as add_ runs at the speed of a "
    "cache that holds W; where it is far below, its threads waited for cores"
)
SQUARE = 1024


def runs(width: int) -> dict[str, tuple[int, int]]:
    """First and last element of each run of a square matrix."""
    return {
        "whole": (0, width * width),
        "cold": (0, width * width),
        "odd": (width // 3, width * width // 2 + width // 7),  # of two ranks, with a cut in a row at both ends
    }


def make_pairs(width: int, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Columns (m, k) and rows (k, n), so small that a thousand rounds do not matter."""
    left, right = torch.randn(width, num_pairs, device=device()), torch.randn(num_pairs, width, device=device())
    return left * 1e-6, right


def require_right(run: Tensor, before: Tensor, start: int, left: Tensor, right: Tensor, bound: float) -> None:
    """The edit of a run against float64, in a part of it that spans rows."""
    part = slice(0, min(run.numel(), 4 * right.shape[1]))
    rows = slice(start // right.shape[1], (start + part.stop) // right.shape[1] + 1)
    change = (left[rows].double() @ right.double()).flatten()[start % right.shape[1] :][part]
    wanted = before[part].double() + change
    assert float((run[part] - wanted).norm() / wanted.norm()) <= bound


def fp32_row(width: int, kind: str, num_fused: int, rounds: int, cold_bytes: int, side: int) -> Row:
    """One matrix in float32, edited in place, beside a product of square matrices of that side."""
    start, stop = runs(width)[kind]
    run, (left, right) = torch.randn(width * width, device=device())[start:stop], make_pairs(width, 2 * num_fused)
    copies = cold_bytes // run.nbytes if kind == "cold" else 0
    turn = itertools.cycle([run, *(run.clone() for _ in range(copies))])
    before = run.clone()
    add_pairs_(run, start, left, right)
    require_right(run.double(), before, start, left, right, 1e-6)
    square = torch.randn(side, side, device=device())
    contenders = {
        "edit": lambda: add_pairs_(next(turn), start, left, right),
        "add": lambda: next(turn).add_(1e-9),
        "product": lambda: square @ square,
    }
    row = make_row("fp32", width, kind, num_fused, alternate(contenders, rounds), TARGETS[num_fused])
    row.more = {
        "gflops": 4e-9 * num_fused * run.numel() / row.seconds["edit"],
        "gflops_of_a_large_product": 2e-9 * side**3 / row.seconds["product"],
    }
    return row


def sum_row(width: int, kind: str, num_fused: int, rounds: int) -> Row:
    """The same with W as the sum of two bfloat16 terms."""
    start, stop = runs(width)[kind]
    left, right = make_pairs(width, 2 * num_fused)
    high = torch.randn(width * width, device=device())[start:stop].bfloat16()
    low = torch.zeros_like(high)
    before = high.float()
    add_pairs_to_sum_(high, low, start, left, right)
    require_right(high.double() + low.double(), before, start, left, right, 2**-16)

    def add() -> None:
        high.add_(1e-9)
        low.add_(1e-9)

    contenders = {"edit": lambda: add_pairs_to_sum_(high, low, start, left, right, 1.0), "add": add}
    return make_row("bf16 high + low", width, kind, num_fused, alternate(contenders, rounds), None)


def make_row(form: str, width: int, kind: str, num_fused: int, seconds: dict, target: float | None) -> Row:
    """Of one form, run and rank."""
    where = "the accelerator" if device().type != "cpu" else f"{torch.get_num_threads()} threads"
    case = f"{form}, {kind} run of {width} x {width}, rank {2 * num_fused}, {where}"
    gains = ratios(seconds["edit"], seconds["add"])
    question, peer = f"the edit of W alone, r' = {num_fused}", "a scalar add_ on the same run"
    return Row(question, "add_pairs_", peer, case, gains, target=target, seconds=medians(seconds), reason=REASON)


def main() -> None:
    """Measure and report."""
    options = arguments(
        __doc__,
        width={"type": int, "default": 4096},
        threads={"type": int, "default": 2},
        rounds={"type": int},
    )
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds = options.rounds or (2 if options.tiny else 15 if options.quick else 50)
    width, cold_bytes, side = (64, 1 << 16, 64) if options.tiny else (options.width, COLD_BYTES, SQUARE)
    rows = [fp32_row(width, kind, fused, rounds, cold_bytes, side) for kind in runs(width) for fused in TARGETS]
    rows += [sum_row(width, kind, fused, max(5, rounds // 3)) for kind in ("whole", "odd") for fused in (4, 16)]
    report("weight_edit", rows, options)


if __name__ == "__main__":
    main()
