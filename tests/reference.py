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
    taken: int = 0  # number of the next direction
    holds: list[int] = field(default_factory=list)  # the direction that each slot was started along
    born: list[int] = field(default_factory=list)  # the switch that started it
    start: dict[str, Tensor] = None  # what it was started as, of A and of B
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
    """Init, observe before each optimizer step, switch after a due one.

    The paper's choices are the defaults; for the others see ``SRLoRAConfig``.
    """

    def __init__(
        self,
        sites: dict[str, Site],
        gamma: float,
        b1: float = 0.85,
        b2: float = 0.85,
        *,
        start: str = "pissa",
        score: str = "sensitivity",
        choose: str = "lowest",
        grace: int = 0,
        reset: str = "zero",
        exhausted: str = "stop",
        interval: int | None = None,
    ) -> None:
        self.sites, self.gamma, self.b1, self.b2 = sites, gamma, b1, b2
        self.begin = start
        self.score, self.choose, self.grace, self.reset = score, choose, grace, reset
        self.exhausted, self.interval = exhausted, interval  # of the fixed schedule, where switches may come earlier
        self.last_look = None
        self.num_switches, self.switched_after = 0, [0]
        for site in sites.values():
            site.U, site.S, site.Vt = directions(site.W.float())
            site.total = site.W.double()
            r = site.A.shape[0]
            site.holds, site.born = [-1] * r, [0] * r
            site.start = {"A": site.A.detach().clone(), "B": site.B.detach().clone()}
            self.restart(site, list(range(min(r, site.target))))
            self.clear_scores(site)

    @torch.no_grad()
    def restart(self, site: Site, slots: list[int]) -> None:
        """Eq. 2 and 10-12: start the slots along the next unused directions and take those out of W."""
        U, S, Vt = site.U, site.S, site.Vt
        renewed = self.exhausted == "renew" and site.taken + len(slots) > site.target
        if renewed:  # of the weight as it is now
            U, S, Vt = directions(site.W.float())
            site.taken = max(site.taken, site.target)
        for k in slots:
            site.holds[k] = -1
        for number, k in enumerate(slots):
            while self.exhausted == "wrap" and site.taken % site.target in site.holds:
                site.taken += 1
            d = site.taken % site.target if self.exhausted == "wrap" else site.taken
            row = number if renewed else d
            root = torch.sqrt(S[row] / site.s)
            site.B[:, k] = site.used(U[:, row] * root)
            site.A[k, :] = site.used(Vt[row, :] * root)
            if self.begin == "zero_b":
                site.B[:, k], site.A[k, :] = 0.0, site.used(Vt[row, :])
            site.add(-site.s * torch.outer(site.B[:, k], site.A[k, :]))  # nothing, where B begins at 0
            site.start["B"][:, k], site.start["A"][k, :] = site.B[:, k], site.A[k, :]
            site.holds[k], site.born[k] = d, self.num_switches
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
        if self.score == "change":
            return (site.B - site.start["B"]).square().mean(0) + (site.A - site.start["A"]).square().mean(1)
        a = (site.mean["A"] * site.dev["A"]).mean(1)
        b = (site.mean["B"] * site.dev["B"]).mean(0)
        if self.score == "relative":
            a, b = a / site.A.square().mean(1), b / site.B.square().mean(0)
        return b + a

    def order(self, site: Site) -> list[int]:
        """Slots, those to be fused first in front."""
        score, age = self.scores(site).tolist(), [self.num_switches - born for born in site.born]
        key = {"lowest": lambda k: score[k], "highest": lambda k: -score[k], "oldest": lambda k: (-age[k], score[k])}
        # Ties: the lower slot first. A pair younger than the grace comes after all others.
        return sorted(range(len(score)), key=lambda k: (age[k] < self.grace, key[self.choose](k), k))

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        """The optimizer's step number ``num_steps``, counted from 1."""
        before = {name: (site.A.clone(), site.B.clone()) for name, site in self.sites.items()}
        optimizer.step()
        if self.reset != "pair_steps":
            return
        b1, b2 = optimizer.param_groups[0]["betas"]

        def correction(t: int) -> float:
            return math.sqrt(1 - b2**t) / (1 - b1**t)

        for name, site in self.sites.items():
            for k, born in enumerate(site.born):
                ratio = correction(num_steps - self.switched_after[born]) / correction(num_steps)
                a, b = before[name]
                site.A[k] = a[k] + ratio * (site.A[k] - a[k])
                site.B[:, k] = b[:, k] + ratio * (site.B[:, k] - b[:, k])

    def settled(self, num_steps: int) -> bool:
        """Whether to switch before the fixed step: the choice has stayed the same for an eighth of an interval."""
        since = num_steps - self.switched_after[-1]
        between = max(1, self.interval // 8)
        if since % between != 0 or since < self.interval / 2 - between:
            return False
        before, self.last_look = self.last_look, {name: self.slots(site) for name, site in self.sites.items()}
        if before is None or since < self.interval / 2:
            return False
        kept = sum(k in before[name] for name, slots in self.last_look.items() for k in slots)
        return kept >= 0.9 * sum(len(slots) for slots in self.last_look.values())

    def slots(self, site: Site) -> list[int]:
        """Eq. 8 and 13: those that a switch fuses now."""
        r = site.A.shape[0]
        num_fused = max(1, round(self.gamma * r))
        if self.exhausted == "stop" or site.target < r:
            num_fused = min(num_fused, site.target - site.taken)
        return sorted(self.order(site)[: max(num_fused, 0)])

    @torch.no_grad()
    def switch(self, optimizer: torch.optim.Optimizer | None = None, num_steps: int = 0) -> dict[str, list[int]]:
        """Eq. 8-12 on every site, after so many optimizer steps; gives the slots that were fused."""
        self.num_switches += 1
        self.switched_after.append(num_steps)
        self.last_look = None
        chosen = {}
        for name, site in self.sites.items():
            slots = self.slots(site)
            for k in slots:  # Eq. 8-9
                site.add(site.s * torch.outer(site.used(site.B[:, k]), site.used(site.A[k, :])))
            self.restart(site, slots)
            if optimizer is not None and self.reset != "keep":
                self.reset_moments(optimizer.state[site.A], slots)
                self.reset_moments({key: m.T for key, m in optimizer.state[site.B].items() if m.dim()}, slots)
            self.clear_scores(site)
            chosen[name] = slots
        return chosen

    def reset_moments(self, state: dict[str, Tensor], slots: list[int]) -> None:
        """Of restarted pairs, whose moments are rows."""
        stay = [k for k in range(len(state["exp_avg"])) if k not in slots]
        state["exp_avg"][slots] = 0.0
        if self.reset in ("zero", "pair_steps") or (self.reset == "survivors" and not stay):
            state["exp_avg_sq"][slots] = 0.0
        elif self.reset == "survivors" and slots:
            state["exp_avg_sq"][slots] = state["exp_avg_sq"][stay].mean()
