"""The specification: SRLoRA (arXiv 2505.12433) in one process on dense tensors, to be read beside the paper.

Every fast or sharded path in the project is compared with this file. It favours plainness over speed, and it imports
nothing from the project. ``Reference`` is Algorithm 1 with the paper's choices. Below it stands what the paper does not
have: weights of 16 bits, and the other choices of ``SRLoRAConfig``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Site:
    """One adapted layer: y = x (W + s B A)^T, with W (m, n), A (r, n), B (m, r)."""

    W: Tensor
    A: Tensor
    B: Tensor
    s: float
    target: int  # r_target of this site, at most min(m, n)
    taken: int = 0  # number of the next unused direction
    holds: list[int] = field(default_factory=list)  # the direction that the pair in each slot was started along
    U: Tensor = None  # W0 = U diag(S) Vt
    S: Tensor = None
    Vt: Tensor = None
    mean: dict[str, Tensor] = None  # moving average of the sensitivity, of A and of B
    dev: dict[str, Tensor] = None  # moving average of its deviation

    def used(self, factor: Tensor) -> Tensor:
        """A part of a factor as the forward pass uses it."""
        return factor

    def add(self, delta: Tensor) -> None:
        """Edit W."""
        self.W += delta


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
    """Algorithm 1: initialise, observe before each optimizer step, switch after a due one."""

    def __init__(self, sites: dict[str, Site], gamma: float, b1: float = 0.85, b2: float = 0.85) -> None:
        self.sites, self.gamma, self.b1, self.b2 = sites, gamma, b1, b2
        for site in sites.values():
            site.U, site.S, site.Vt = directions(site.W.float())
            r = site.A.shape[0]
            site.holds = [-1] * r
            self.restart(site, list(range(min(r, site.target))))
            self.clear_scores(site)

    @torch.no_grad()
    def restart(self, site: Site, slots: list[int]) -> None:
        """Eq. 2 and 10-12: start the slots along the next unused directions and take those out of W."""
        for k in slots:
            d = site.taken
            self.start(site, k, d, site.U[:, d], site.S[d], site.Vt[d, :])
            site.taken += 1

    def start(self, site: Site, k: int, d: int, u: Tensor, sigma: Tensor, v: Tensor) -> None:
        root = torch.sqrt(sigma / site.s)
        site.B[:, k], site.A[k, :] = site.used(u * root), site.used(v * root)
        site.add(-site.s * torch.outer(site.B[:, k], site.A[k, :]))
        site.holds[k] = d

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
        """Eq. 6-7: one score per pair, the mean over its column of B plus the mean over its row of A."""
        return (site.mean["B"] * site.dev["B"]).mean(0) + (site.mean["A"] * site.dev["A"]).mean(1)

    def slots(self, site: Site) -> list[int]:
        """Eq. 8 and 13: the lowest scores, of ties the lower slot; no more than there are unused directions."""
        r, score = site.A.shape[0], self.scores(site).tolist()
        num_fused = min(max(1, round(self.gamma * r)), max(site.target - site.taken, 0))
        return sorted(sorted(range(r), key=lambda k: (score[k], k))[:num_fused])

    @torch.no_grad()
    def switch(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, list[int]]:
        """Eq. 8-12 on every site; gives the slots that were fused."""
        chosen = {name: self.slots(site) for name, site in self.sites.items()}
        for name, slots in chosen.items():
            site = self.sites[name]
            for k in slots:  # Eq. 8-9
                site.add(site.s * torch.outer(site.used(site.B[:, k]), site.used(site.A[k, :])))
            self.restart(site, slots)
            if optimizer is not None:
                self.reset_moments(optimizer.state[site.A], slots)
                self.reset_moments({key: m.T for key, m in optimizer.state[site.B].items() if m.dim()}, slots)
            self.clear_scores(site)
        return chosen

    def reset_moments(self, state: dict[str, Tensor], slots: list[int]) -> None:
        """Those of restarted pairs, whose moments are rows."""
        state["exp_avg"][slots] = 0.0
        state["exp_avg_sq"][slots] = 0.0


# Beyond the paper.


@dataclass
class RoundedSite(Site):
    """W is the rounding of a sum that is kept exactly. The forward pass may use 16-bit copies of A and B."""

    used_type: torch.dtype = torch.float32
    total: Tensor = None  # W0 and all that was added to it

    def used(self, factor: Tensor) -> Tensor:
        return factor.to(self.used_type).float()

    def add(self, delta: Tensor) -> None:
        if self.total is None:
            self.total = self.W.double()
        self.total += delta
        self.W.copy_(self.total)


class OtherChoices(Reference):
    """The choices of ``SRLoRAConfig`` that are not the paper's; each default is the paper's."""

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
        self.begin, self.score, self.choose, self.grace = start, score, choose, grace
        self.reset, self.exhausted = reset, exhausted
        self.interval = interval  # of the fixed schedule, where switches may come earlier
        self.switched_after, self.last_look = [0], None  # steps; the choice when it was last looked at
        self.started_as = {id(s): {"A": s.A.detach().clone(), "B": s.B.detach().clone()} for s in sites.values()}
        self.born = {id(site): [0] * site.A.shape[0] for site in sites.values()}  # the switch that started each pair
        super().__init__(sites, gamma, b1, b2)

    @property
    def num_switches(self) -> int:
        return len(self.switched_after) - 1

    @torch.no_grad()
    def restart(self, site: Site, slots: list[int]) -> None:
        """Where all directions are used: ``wrap`` goes round, ``renew`` takes the first ones of W as it is now."""
        if self.exhausted == "renew" and site.taken + len(slots) > site.target:
            site.taken = max(site.taken, site.target)
            U, S, Vt = directions(site.W.float())
            for number, k in enumerate(slots):
                self.start(site, k, site.taken, U[:, number], S[number], Vt[number, :])
                site.taken += 1
        elif self.exhausted == "wrap":
            for k in slots:
                site.holds[k] = -1
            for k in slots:
                while site.taken % site.target in site.holds:
                    site.taken += 1
                d = site.taken % site.target
                self.start(site, k, d, site.U[:, d], site.S[d], site.Vt[d, :])
                site.taken += 1
        else:
            super().restart(site, slots)

    def start(self, site: Site, k: int, d: int, u: Tensor, sigma: Tensor, v: Tensor) -> None:
        if self.begin == "zero_b":  # as LoRA begins: W stays as it is
            site.B[:, k], site.A[k, :], site.holds[k] = 0.0, site.used(v), d
        else:
            super().start(site, k, d, u, sigma, v)
        as_now = self.started_as[id(site)]
        as_now["B"][:, k], as_now["A"][k, :] = site.B[:, k], site.A[k, :]
        self.born[id(site)][k] = self.num_switches

    def scores(self, site: Site) -> Tensor:
        if self.score == "change":
            start = self.started_as[id(site)]
            return (site.B - start["B"]).square().mean(0) + (site.A - start["A"]).square().mean(1)
        if self.score == "relative":
            a, b = ((site.mean[name] * site.dev[name]).mean(dim) for name, dim in (("A", 1), ("B", 0)))
            return b / site.B.square().mean(0) + a / site.A.square().mean(1)
        return super().scores(site)

    def slots(self, site: Site) -> list[int]:
        r, score = site.A.shape[0], self.scores(site).tolist()
        age = [self.num_switches - born for born in self.born[id(site)]]
        num_fused = max(1, round(self.gamma * r))
        if self.exhausted == "stop" or site.target < r:
            num_fused = min(num_fused, max(site.target - site.taken, 0))
        key = {"lowest": lambda k: score[k], "highest": lambda k: -score[k], "oldest": lambda k: (-age[k], score[k])}
        # A pair younger than the grace comes after all others.
        return sorted(sorted(range(r), key=lambda k: (age[k] < self.grace, key[self.choose](k), k))[:num_fused])

    def switch(self, optimizer: torch.optim.Optimizer | None = None, num_steps: int = 0) -> dict[str, list[int]]:
        """After so many optimizer steps."""
        self.switched_after.append(num_steps)
        self.last_look = None
        return super().switch(optimizer)

    def reset_moments(self, state: dict[str, Tensor], slots: list[int]) -> None:
        stay = [k for k in range(len(state["exp_avg"])) if k not in slots]
        before = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
        super().reset_moments(state, slots)
        if self.reset == "keep":
            state["exp_avg"][slots] = before["exp_avg"][slots]
        if self.reset in ("keep", "first_moment"):
            state["exp_avg_sq"][slots] = before["exp_avg_sq"][slots]
        elif self.reset == "survivors" and slots and stay:
            state["exp_avg_sq"][slots] = before["exp_avg_sq"][stay].mean()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        """The optimizer's step number ``num_steps``, counted from 1; ``pair_steps`` counts from the start of a pair."""
        before = {name: (site.A.clone(), site.B.clone()) for name, site in self.sites.items()}
        optimizer.step()
        if self.reset != "pair_steps":
            return
        b1, b2 = optimizer.param_groups[0]["betas"]

        def correction(t: int) -> float:
            return math.sqrt(1 - b2**t) / (1 - b1**t)

        for name, site in self.sites.items():
            for k, born in enumerate(self.born[id(site)]):
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
