"""How fast and how exact are the first singular triplets of a weight? Ours beside the full SVD and PEFT's PiSSA.

    python benchmarks/directions.py [--quick] [--sides 2048 4096] [--threads 2]

Three questions: the time of the block Krylov iteration on large matrices, with its errors against the full
decomposition in float64; that no shape takes longer than the full one; and a start with the file of directions beside
one without. ``pissa_niter_16`` is ``torch.svd_lowrank(W, k, niter=16)``. On a GPU the matrices are there.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial

import torch
from peft import LoraConfig
from side_by_side import Row, alternate, arguments, device, medians, ratios, report
from torch import Tensor
from tracking import adapted

from srlora_dist import SRLoRAConfig
from srlora_dist.layers.discovery import find_sites
from srlora_dist.method.budget import clamp_target_ranks
from srlora_dist.method.directions import Directions
from srlora_dist.method.svd import compute_directions, is_worth_it
from srlora_dist.storage.find import find_storage

SMALL = ((384, 384, 32), (384, 1536, 32), (768, 3072, 24), (1024, 1024, 32), (1024, 4096, 32), (1024, 4096, 16))
QUESTIONS = ("directions: error of the values", "directions: sine of the angle")
FLAT = "a Gaussian matrix has the flattest spectrum there is among weights; trained ones fall faster"


def make_weight(kind: str, side: int) -> Tensor:
    """(side, side): values that fall slowly; Gaussian; or that with a falling part on top, as weights have it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(side, side, generator=generator)
    if kind == "Gaussian":
        return noise.to(device())
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator).to(device())).Q for _ in range(2))
    falling = (left * torch.arange(1, side + 1, device=device()) ** -0.3) @ right.T
    return falling if kind == "values i^-0.3" else falling + 0.2 * noise.to(device()) / side**0.5


def errors(found: tuple[Tensor, Tensor, Tensor], exact: tuple[Tensor, Tensor, Tensor]) -> list[float]:
    """Largest relative error of a value, and sine of the largest angle to the true subspaces."""
    count = found[1].numel()
    value = float(((found[1].double() - exact[1][:count]) / exact[1][:count]).abs().max())
    pairs = ((found[0].double(), exact[0][:, :count]), (found[2].double().T, exact[2][:count].T))
    return [value, max(float(torch.linalg.matrix_norm(mine - true @ (true.T @ mine), ord=2)) for mine, true in pairs)]


def large(kind: str, side: int, count: int, rounds: int) -> list[Row]:
    """Time, errors of the values and angle."""
    weight = make_weight(kind, side)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    contenders = {
        "ours": lambda: compute_directions(weight, count),
        "full": lambda: torch.linalg.svd(weight, full_matrices=False),
        "pissa_niter_16": lambda: torch.svd_lowrank(weight, q=count, niter=16),
    }
    seconds = alternate(contenders, rounds, warm_up=1)
    u, s, v = contenders["pissa_niter_16"]()
    mine, theirs = errors(contenders["ours"](), exact), errors((u, s, v.T), exact)
    case = f"{torch.get_num_threads()} threads, {side} x {side}, {kind}, k = {count}"
    common = {"ours": "block Krylov iteration", "case": case}
    speed = {"full / pissa_niter_16": statistics.median(ratios(seconds["full"], seconds["pissa_niter_16"]))}
    return [
        Row(
            *("directions: time of the full SVD over ours",),
            **common,
            peer="torch.linalg.svd",
            ratios=ratios(seconds["full"], seconds["ours"]),
            bound="at least",
            target=8.0,
            seconds=medians(seconds),
            more=speed,
            reason=FLAT if kind == "Gaussian" else "",
        ),
        Row(
            *("directions: time of pissa_niter_16 over ours",),
            **common,
            peer="torch.svd_lowrank",
            ratios=ratios(seconds["pissa_niter_16"], seconds["ours"]),
            more={"its error of the values": theirs[0], "its sine of the angle": theirs[1]},
        ),
        *(
            Row(question, **common, peer="float64", ratios=[ours], target=target, more={"of pissa_niter_16": peers})
            for question, ours, peers, target in zip(QUESTIONS, mine, theirs, (1e-5, 1e-2), strict=True)
        ),
    ]


def small(shape: tuple[int, int, int], rounds: int) -> Row:
    """Where the full decomposition should be taken, ours takes as long."""
    *sides, count = shape
    weight = torch.randn(*sides, generator=torch.Generator().manual_seed(0)).to(device())
    full = partial(torch.linalg.svd, weight, full_matrices=False)
    seconds = alternate({"ours": partial(compute_directions, weight, count), "full": full}, rounds, warm_up=1)
    way = "block Krylov iteration" if is_worth_it(tuple(sides), count) else "the full one"
    return Row(
        *("directions: no shape takes longer", way, "torch.linalg.svd"),
        case=f"{torch.get_num_threads()} threads, {sides[0]} x {sides[1]}, Gaussian, k = {count}",
        ratios=ratios(seconds["ours"], seconds["full"]),
        target=1.05,  # the same routine twice differs by about this much
        seconds=medians(seconds),
    )


def start_up(hidden: int, layers: int, rounds: int) -> Row:
    """A start that computes the file of directions over one that finds it."""
    model = adapted(LoraConfig(r=8, target_modules="all-linear"), hidden, layers)
    sites = find_sites(model)
    clamp_target_ranks(sites, 32)
    storage = find_storage(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), sites)
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name in seconds:
                began = time.perf_counter()
                Directions(storage, SRLoRAConfig(svd_cache=cache)).prepare()
                seconds[name].append(time.perf_counter() - began)
    return Row(
        *("directions: a cold start over a warm one", "file of directions", "none"),
        case=f"{torch.get_num_threads()} threads, {layers} layers of {hidden}, target rank 32",
        ratios=ratios(seconds["cold"], seconds["warm"]),
        bound="at least",
        target=20.0,
        seconds=medians(seconds),
    )


def main() -> None:
    """Ask all three, and report."""
    options = arguments(
        *(__doc__,),
        sides={"type": int, "nargs": "+", "default": [2048, 4096]},
        threads={"type": int, "default": 2},
        rounds={"type": int, "default": 5},
    )
    torch.set_num_threads(options.threads)
    sides, rounds = ([2048], 2) if options.quick else (options.sides, options.rounds)
    sides = [64] if options.tiny else sides
    kinds = ("values i^-0.3", "Gaussian") if options.quick else ("values i^-0.3", "Gaussian and falling", "Gaussian")
    for side in sides:
        for kind in kinds:
            for count in (side // 32,) if options.quick else (side // 64, side // 32):
                report("directions", large(kind, side, count, rounds), options)
    shapes = ((48, 64, 4),) if options.tiny else SMALL
    report("directions", [small(shape, 3 * rounds) for shape in shapes], options)
    models = ((48, 1, 1),) if options.tiny else ((384, 6, rounds + 1), (768, 4, rounds))
    report("directions", [start_up(*model) for model in models], options)


if __name__ == "__main__":
    main()
