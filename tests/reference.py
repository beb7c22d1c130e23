"""The specification: SRLoRA (arXiv 2505.12433) in one process on dense tensors, to be read beside the paper.

Every fast or sharded path in the project is compared with this file. It favours plainness over speed, and it imports
nothing from the project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Site:
    """One adapted layer: y = x (W + s B A)^T, with W (m, n), A (r, n), B (m, r).

    W may be of 16 bits: then it is the rounding of a sum that is kept exactly. So may be the copies of A and B that the
    forward pass uses, while the optimizer steps these in fp32.
    """

    W: Tensor
    A: Tensor
    B: Tensor
    s: float
    target: int  # r_target of this site, at most min(m, n)
    used_type: torch.dtype = torch.float32  # of A and B in the forward pass
    taken: int = 0  # directions used so far; the next unused one has this number
    holds: list[int] = field(default_factory=list)  # the direction that each slot was started along
    U: Tensor = None
    S: Tensor = None
    Vt: Tensor = None
    mean: dict[str, Tensor] = None  # moving average of the sensitivity, of A and of B
    dev: dict[str, Tensor] = None  # moving average of its deviation
    total: Tensor = None  # W0 and all that was added to it

    def used(self, x: Tensor) -> Tensor:
        """A part of a factor as the forward pass uses it."""
        return x.to(self.used_type).float()

    def add(self, delta: Tensor) -> None:
        self.total += delta
        self.W.copy_(self.total)


def directions(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W = U diag(S) V^T with falling S; the largest entry of each column of U is made positive."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    sign = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
    return U * sign, S, Vt * sign.T


def due_steps(num_steps: int, r: int, r_target: int, gamma: float) -> list[int]:
    """Eq. 13-14: after which optimizer steps to switch. The last, smaller switch takes the remainder."""
    num_fused = max(1, round(gamma * r))
    num_switches = math.ceil((r_target - r) / num_fused)
    steps = [(k + 1) * num_steps // num_switches for k in range(num_switches)]
    return [step for step in steps if step < num_steps]  # no training would follow a later one


class Reference:
    """Init, observe before each optimizer step, switch after a due one."""

    def __init__(self, sites: dict[str, Site], gamma: float, b1: float = 0.85, b2: float = 0.85) -> None:
        self.sites, self.gamma, self.b1, self.b2 = sites, gamma, b1, b2
        for site in sites.values():
            site.U, site.S, site.Vt = directions(site.W.float())
            site.total = site.W.double()
            r = site.A.shape[0]
            site.holds = [-1] * r
            self.restart(site, list(range(min(r, site.target))))
            self.clear_scores(site)

    @torch.no_grad()
    def restart(self, site: Site, slots: list[int]) -> None:
        """Eq. 2 and 10-12: start the slots along the next unused directions and take those out of W."""
        for k in slots:
            d = site.taken
            root = torch.sqrt(site.S[d] / site.s)
            site.B[:, k] = site.used(site.U[:, d] * root)
            site.A[k, :] = site.used(site.Vt[d, :] * root)
            site.add(-site.s * torch.outer(site.B[:, k], site.A[k, :]))
            site.holds[k] = d
            site.taken += 1

    def clear_scores(self, site: Site) -> None:
        site.mean = {"A": torch.zeros_like(site.A), "B": torch.zeros_like(site.B)}
        site.dev = {"A": torch.zeros_like(site.A), "B": torch.zeros_like(site.B)}

    @torch.no_grad()
    def observe(self) -> None:
        """Eq. 3-5, with the gradient that the optimizer is about to apply."""
        for site in self.sites.values():
            for name, w in (("A", site.A), ("B", site.B)):
                sensitivity = (w * w.grad).abs()  # Eq. 3
                site.mean[name] = self.b1 * site.mean[name] + (1 - self.b1) * sensitivity  # Eq. 4
                deviation = (sensitivity - site.mean[name]).abs()
                site.dev[name] = self.b2 * site.dev[name] + (1 - self.b2) * deviation  # Eq. 5

    def scores(self, site: Site) -> Tensor:
        """Eq. 6-7: one score a pair, the mean over its column of B plus the mean over its row of A."""
        a = site.mean["A"] * site.dev["A"]
        b = site.mean["B"] * site.dev["B"]
        return b.mean(0) + a.mean(1)

    @torch.no_grad()
    def switch(self, optimizer: torch.optim.Optimizer | None = None, reset: str = "zero") -> dict[str, list[int]]:
        """Eq. 8-12 on every site; gives the slots that were fused."""
        chosen = {}
        for name, site in self.sites.items():
            r = site.A.shape[0]
            num_fused = min(max(1, round(self.gamma * r)), site.target - site.taken)
            order = sorted(range(r), key=lambda k: (self.scores(site)[k].item(), k))  # ties: the lower slot first
            slots = sorted(order[: max(num_fused, 0)])
            for k in slots:  # Eq. 8-9
                site.add(site.s * torch.outer(site.used(site.B[:, k]), site.used(site.A[k, :])))
            self.restart(site, slots)
            if optimizer is not None and reset != "keep":
                for w, index in ((site.A, (slots, slice(None))), (site.B, (slice(None), slots))):
                    for key in ("exp_avg", "exp_avg_sq") if reset == "zero" else ("exp_avg",):
                        optimizer.state[w][key][index] = 0.0
            self.clear_scores(site)
            chosen[name] = slots
        return chosen
