"""Recognises signs that a run is failing, and words each as a warning with its figures.

Everything is computed from numbers that the caller already has. The thresholds were set on 2026-11-22 by what healthy
runs logged: the demo, RTE, MRPC and STS-B with MiniLM, and SmolLM2-135M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median, median_high, median_low

import torch

from srlora_dist.checkpoint.ledger import SiteSwitch, SwitchReport
from srlora_dist.errors import shorten_list
from srlora_dist.layers.site import Site

EVEN = 0.7
"""Scores whose ratio is above this are taken for equal.

The log of a score, MiniLM on the demo's sentences, batches of 16, beta 0.85, r=8, varied by 0.2 to 0.3 (standard
deviation) from one window of 12 steps to the next, so the difference of two varies by 0.35, and exp(-0.35) = 0.7. Pairs
of one site spread by 0.9. Scores that are nothing but such noise have an evenness of 0.86 at r=4, 0.79 at r=8, 0.71 at
r=64; the median over the sites was 0.15 to 0.58 at each of 89 switches of healthy runs on pretrained models."""

NOISE = {
    "float32": 2.5e-8,
    "float16": 2.1e-4,
    "bfloat16": 1.66e-3,
    "int8": 8.5e-3,
    "nf4": 0.092,
    "fp4": 0.122,
}
"""Rounding error relative to the weight, both root mean square.

Gaussian weights of 384 x 384 to 2048 x 2048: torch's casts, ``bitsandbytes.functional.quantize_4bit`` in blocks of 64
(quantised scales add less than 0.1% of the error), int8 by the largest of each row (it grows with the width, 0.0073 to
0.0084; the largest is taken). The matrices of MiniLM: nf4 0.093, fp4 0.125, int8 0.008."""

NOISE_MARGIN = 1.5
"""The rounding errors of a product of few vectors are not independent: the largest singular value of those of a matrix
of rank 4 to 64 was 1.0 to 1.5 times that of independent ones, in every type. Real weights are far above it: direction
31 of each matrix of MiniLM is more than 6 times the estimate for fp4, and 8 times that for nf4."""

WINDOWS_BEFORE, FEWEST_BEFORE, WINDOWS_AFTER = 12, 5, 2
"""Logged losses that a jump is measured against, the fewest that will do, and those after a switch that can show one:
the window in which it fell, and the next, which is the first that is whole."""

JUMP_SHARE, JUMP_SCATTERS = 0.1, 4.0
"""A jump is more than a tenth of the loss, below which it does not matter, and 4 robust standard deviations. At the 233
places of 11 real runs where a switch could have been there was no false alarm; on gamma-distributed noise of 5 to 30%
there was one at 2 to 3% of the switches. A loss half as high again was found at 3 of 4 places."""

WORSE_SHARE = 0.01
"""Both evaluations are over the same samples, so any rise is real; but a head that has learnt nothing yet moves about
by as much (RTE: 0.692 to 0.702 over 200 steps of plain LoRA)."""

TO_STANDARD_DEVIATION = 1.4826  # the median absolute deviation of a normal distribution, times this, is its sigma


@dataclass
class Finding:
    """One failure sign, for the log, TensorBoard and ``summary.json``.

    Args:
        kind: One of ``even_scores``, ``no_gradient``, ``directions_exhausted``, ``noise_level_directions``,
            ``loss_jump``, ``worse_than_start``, ``skipped_steps`` or ``doubtful_figures``.
        step: The optimizer step after which it was seen.
        message: One line with the figures and, where there is one, the remedy.
        figures: The numbers of the message, by name.
    """

    kind: str
    step: int
    message: str
    figures: dict[str, float]


def evenness(site: SiteSwitch) -> float | None:
    """How close the scores of the pairs that stayed are to those that were fused; from 0, a clear choice, to 1.

    The median of the fused ones over the median of the others, of two middle ones the closer: at 1, half of the fused
    pairs score no lower than half of the others. One pair that stands out hides nothing, as it would in a ratio of
    means. The unit of a score cancels. None where there was no choice: switch 0, all pairs fused, or all scores zero.
    """
    fused = [score for slot, score in enumerate(site.scores) if slot in site.slots]
    kept = [score for slot, score in enumerate(site.scores) if slot not in site.slots]
    if not fused or not kept or not any(site.scores):
        return None
    return median_high(fused) / median_low(kept) if median_low(kept) else 1.0


def even_scores(report: SwitchReport) -> Finding | None:
    """The choice of pairs was arbitrary at more than half of the sites: their scores differ by no more than noise.

    At a single site the evenness is above ``EVEN`` by chance at a tenth of the switches or more, so one site alone says
    nothing.
    """
    found = {site.site: even for site in report.sites if (even := evenness(site)) is not None}
    num_even = sum(even > EVEN for even in found.values())
    if 2 * num_even <= len(found):
        return None
    worst, middle = max(found, key=found.__getitem__), median(found.values())
    message = (
        f"switch {report.switch}: at {num_even} of {len(found)} sites the scores are so even that the choice of pairs "
        f"is arbitrary: fused pairs score {middle:.0%} of the others (median of sites; {worst} {found[worst]:.0%}). "
        "Larger batches (train.batch_size) and slower averages (srlora.beta1, srlora.beta2) make scores steadier"
    )
    figures = {"num_even": num_even, "num_sites": len(found), "median": middle, "worst": found[worst]}
    return Finding("even_scores", report.step, message, figures)


def no_gradient(report: SwitchReport) -> Finding | None:
    """All scores of a site are zero: no gradient reached it, or one too small for its type, so it learns nothing."""
    chosen = [site for site in report.sites if site.scores]
    dead = [site.site for site in chosen if not any(site.scores)]
    if not dead:
        return None
    message = (
        f"switch {report.switch}: all scores are zero at {len(dead)} of {len(chosen)} sites ({shorten_list(dead)}): no "
        "gradient reaches them; leave them out of lora.target_modules"
    )
    return Finding("no_gradient", report.step, message, {"num_dead": len(dead), "num_sites": len(chosen)})


def directions_exhausted(report: SwitchReport, sites: list[Site]) -> Finding | None:
    """Sites whose last directions this switch has taken: each is named once.

    Call it after the switch. There is no finding for switch 0: a target equal to the rank was asked for (PiSSA), and a
    matrix that holds no more directions was named when its target was clamped.
    """
    taking = {part.site for part in report.sites}
    states = [(site.name, site.state) for site in sites]
    exhausted = [name for name, state in states if state.num_taken >= state.target_rank == state.num_starts]
    last = [name for name in exhausted if name in taking]
    if report.switch == 0 or not last:
        return None
    message = (
        f"switch {report.switch}: {shorten_list(last)} took the last directions; {len(exhausted)} of {len(sites)} "
        "sites have none left and train on without switches. Where the matrices hold more, raise srlora.target_rank"
    )
    return Finding(
        "directions_exhausted", report.step, message, {"num_exhausted": len(exhausted), "num_sites": len(sites)}
    )


def noise_edge(values: list[float], shape: tuple[int, int], relative_error: float, norm: float | None = None) -> float:
    """The largest singular value that rounding alone gives a weight of this size.

    Independent errors of size sigma on an (m, n) matrix have singular values up to sigma (sqrt m + sqrt n). The size of
    the weight comes from its Frobenius norm. Without it a bound is used: the singular values that are not known are
    no larger than the last known one. That adds at most ``(2 NOISE_MARGIN relative_error values[-1])^2`` to the square
    of the edge, so with fp4 a last value up to 7% above the edge can be taken for noise, and less with the other types.

    Args:
        values: The first singular values, falling, in the unit of the weight.
        shape: (m, n).
        relative_error: One of ``NOISE``.
        norm: Frobenius norm of the weight, or None where it is not known.

    Returns:
        The edge, and no less than ``max(m, n)`` float32 roundings of the first value: what is smaller has no part in
        the numerical rank, whatever the type, for the decomposition itself is computed in float32.
    """
    m, n = shape
    unknown = (min(shape) - len(values)) * values[-1] ** 2
    norm = math.sqrt(sum(value**2 for value in values) + unknown) if norm is None else norm
    from_rounding = NOISE_MARGIN * relative_error * norm / math.sqrt(m * n) * (math.sqrt(m) + math.sqrt(n))
    return max(from_rounding, values[0] * max(shape) * torch.finfo(torch.float32).eps)


def noise_level_directions(
    step: int, sites: list[Site], values: dict[str, list[float]], stored_as: str | None = None
) -> Finding | None:
    """Find directions that carry no information: rounding of the stored weights alone could have made them.

    Call it before the switch. One call before switch 0 with all values finds all of them.

    Args:
        step: Optimizer step of the switch.
        sites: The sites to judge.
        values: For each site's name its singular values, falling, from direction 0 to the last about to be started;
            those from ``num_taken`` on are judged. A site without an entry starts none.
        stored_as: A name of ``NOISE``: the type of the weights the directions were computed from, where that is not the
            site's own (``srlora.directions_from``).
    """
    worst, lowest, num_directions, num_noisy = ("", 0.0, 0.0), None, 0, 0
    for site in sites:
        known = values.get(site.name) or []
        if len(known) <= site.state.num_taken:
            continue
        kind = stored_as or site.quantised.partition("-")[0] or str(site.weight.dtype).removeprefix("torch.")
        edge = noise_edge(known, site.shape, NOISE[kind])
        noisy = [k for k in range(site.state.num_taken, len(known)) if known[k] <= edge]
        if noisy:
            num_noisy, num_directions = num_noisy + 1, num_directions + len(noisy)
            if lowest is None or noisy[0] < lowest:
                lowest, worst = noisy[0], (site.name, known[noisy[0]], edge)
    if lowest is None:
        return None
    name, value, edge = worst
    message = (
        f"{num_directions} directions at {num_noisy} of {len(sites)} sites are no more than the rounding of the stored "
        f"weights: {name} from direction {lowest} on, singular value {value:.2e}, rounding makes up to {edge:.2e}. Set "
        f"srlora.target_rank to {max(lowest, 1)} or less, or leave those sites out of lora.target_modules"
    )
    figures = {"num_directions": num_directions, "num_sites": num_noisy, "lowest": lowest, "value": value, "edge": edge}
    return Finding("noise_level_directions", step, message, figures)


class LossWatch:
    """Notices that the training loss jumps at a switch, which keeps the function and must not do that.

    It compares logged losses, each the mean of a window of steps: the two after a switch with the median of the twelve
    before it. The window in which the switch fell counts, although it also holds steps before the switch. A loss that
    was reported is not used as a reference for later switches.
    """

    def __init__(self) -> None:
        self._before: list[float] = []
        self._after: list[float] = []
        self._switch: int | None = None

    def switched(self, step: int) -> None:
        """Note a switch after this step. One that comes while another is watched takes its place."""
        self._close()
        self._switch = step

    def update(self, step: int, loss: float) -> Finding | None:
        """Take the loss of the window that ends with this step; gives at most one finding per switch.

        A loss that is not finite is ignored: the log has it, and the scores of a diverged run stop it.
        """
        if not math.isfinite(loss):
            return None
        # A switch follows the step that it is due at: a window that ends there has not seen it.
        if self._switch is None or step <= self._switch:
            self._before = [*self._before, loss][-WINDOWS_BEFORE:]
            return None
        found = self._judge(step, loss)
        if found is None:
            self._after.append(loss)
        if found is not None or len(self._after) == WINDOWS_AFTER:
            self._close()
        return found

    def _close(self) -> None:
        self._before = [*self._before, *self._after][-WINDOWS_BEFORE:]
        self._after, self._switch = [], None

    def _judge(self, step: int, loss: float) -> Finding | None:
        if len(self._before) < FEWEST_BEFORE:
            return None
        before = median(self._before)
        scatter = TO_STANDARD_DEVIATION * median(abs(earlier - before) for earlier in self._before)
        if loss <= before + max(JUMP_SHARE * abs(before), JUMP_SCATTERS * scatter):
            return None
        message = (
            f"the training loss rose from {before:.4g} to {loss:.4g} after the switch of step {self._switch} (it "
            f"scattered by {scatter:.2g} before): lower train.learning_rate, or srlora.fusion_ratio, so that fewer "
            "pairs start anew at once"
        )
        figures = {"before": before, "after": loss, "scatter": scatter, "switch_step": self._switch}
        return Finding("loss_jump", step, message, figures)

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint: plain numbers and lists, which JSON can hold."""
        return {"before": list(self._before), "after": list(self._after), "switch": self._switch}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._before, self._after = list(state["before"]), list(state["after"])
        self._switch = state["switch"]


def worse_than_start(step: int, start: dict[str, float], now: dict[str, float]) -> Finding | None:
    """The validation loss is above that before the first step, by more than ``WORSE_SHARE``.

    Args:
        step: Optimizer step of this evaluation.
        start: The evaluation of step 0: ``loss``, and the task's metrics.
        now: This one, over the same samples. A loss that is not finite is worse.
    """
    if not math.isfinite(start["loss"]) or now["loss"] <= (1 + WORSE_SHARE) * start["loss"]:
        return None
    others = [name for name in now if name != "loss" and name in start]
    metrics = "".join(f"; {name} {start[name]:.4g}, now {now[name]:.4g}" for name in others)
    message = (
        f"the validation loss is {now['loss']:.4g}, and was {start['loss']:.4g} before the first step{metrics}: lower "
        "train.learning_rate, or train for fewer steps"
    )
    figures = {"start": start["loss"], "now": now["loss"]}
    return Finding("worse_than_start", step, message, figures)
