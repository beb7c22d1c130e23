"""The options of the method: the section ``srlora`` of a run, and what the Switcher and the callback take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from srlora_dist.config.checks import BELOW_ONE, COUNT, COUNT_OR_NONE, POSITIVE, expand_home, require
from srlora_dist.config.option import option

ADAPTED, SWITCHING = ("pissa", "srlora"), ("srlora",)
"""The methods that start pairs along directions, and the one that switches them."""

DEFAULT_TARGET_RANK = 32
"""Directions that are shared out where ``target_rank`` is not set."""


@dataclass
class SRLoRAConfig:
    """How pairs are scored, fused and restarted (SRLoRA, arXiv 2505.12433).

    Args:
        target_rank: Directions of each pretrained weight to share out over the run; the paper's r_target. The last
            switch of the paper's schedule falls on the end of training and is left out, so the last ones stay unused.
            ``null`` is 32, and in a run with fewer steps than that asks for switches as many as there are steps for.
        fusion_ratio: Share of a site's pairs that one switch fuses, in (0, 1]; the paper's gamma (Eq. 13).
        beta1: Decay of the moving average of the sensitivity (Eq. 4).
        beta2: Decay of the moving average of its deviation (Eq. 5).
        importance_window: Steps before a switch whose gradients count for its choice: ``all``, their number, or
            ``auto``, which leaves out those that weigh less than a millionth. It begins with statistics of 0; where
            switches follow each other more closely it never begins, and ``score_reset`` alone clears them.
        start: What a pair begins as: ``pissa`` is the paper's, B and A along a direction that is taken out of W
            (Eq. 2); ``zero_b`` leaves W as it is and B at zero, with A a unit vector along the direction.
        score: What a pair is worth: ``sensitivity`` is the paper's (Eq. 3 to 7), ``relative`` the same, divided by the
            mean square of the pair's elements, so that a large pair is not important by its size alone, ``change`` how
            far the pair has come since it was started.
        choose: Which pairs a switch fuses: those of the ``lowest`` scores (Eq. 8), of the ``highest``, or the
            ``oldest``, and of equal age those of the lowest scores.
        grace: Intervals between switches that a pair has to live before it may be fused; where too few have, younger
            ones are.
        switch_until: Share of the run in which all switches happen; the paper's is 1.
        num_switches: Switches after the first choice of directions; ``null`` makes as many as ``target_rank`` has
            directions for.
        switch_when: ``due`` switches at fixed intervals (Eq. 14), ``settled`` already before that, once the choice of
            pairs stays the same; never before half an interval.
        exhausted: What a site does that has used all its directions: ``stop`` trains on without switches, ``wrap``
            begins again with the first ones, but for those in use, ``renew`` takes the first ones of the weight as it
            is by then.
        score_reset: What a switch clears: the statistics of ``all`` pairs (the paper's section 3.1) or only those of
            the ``restarted`` ones (its Algorithm 1).
        optimizer_reset: What a restarted pair keeps of the optimizer's state: ``zero`` clears it, ``first_moment``
            clears the momentum alone, ``keep`` clears nothing. For Adam also ``survivors``, which gives the second
            moment the mean of the pairs that stay, and ``pair_steps``, which clears both and counts the steps of its
            bias correction from the start of the pair.
        fusion: Where fused pairs go: ``in_place`` edits W (a 16-bit W keeps a second term, so that roundings do not add
            up), ``adapter`` fills a frozen second adapter and never writes W, ``auto`` is ``adapter`` for quantised
            weights and ``in_place`` for others.
        fused_rank: Largest rank of that second adapter; ``null`` takes the ``2 target_rank - rank`` that a run fills. A
            smaller one is compressed by SVD as it fills up, and the error is logged.
        residual_device: Where the second term of a 16-bit W lies: ``weight`` is beside it, ``cpu`` in host memory.
        directions_from: Folder of the original checkpoint (safetensors) to take the directions from; ``null`` takes
            them from the loaded weights, dequantised if they are quantised.
        check_switch: Compare the model's output on the last training batch before and after each switch, and undo a
            switch that changes it; costs two forward passes and, for a moment, a copy of this rank's weights in host
            memory.
        switch_tolerance: Largest relative change of the output then; ``null`` is 1e-4 for float32, 4e-3 for float16 and
            3e-2 for bfloat16.
        agreement_every: Steps between comparisons of all that ranks hold copies of; 0 compares at switches alone.
        adapter_name: The PEFT adapter to work on.
        svd_cache: Folder of the computed directions; ``null`` is ``srlora_dist/svd`` in the user's cache folder.
        svd_distribute: Share the decompositions out over the ranks instead of leaving all of them to rank 0.
        ledger_dir: Folder to which each switch is appended; ``null`` keeps the ledger in memory alone.
    """

    target_rank: int | None = option(None, methods=SWITCHING)
    fusion_ratio: float = option(0.5, methods=SWITCHING)
    beta1: float = option(0.85, methods=SWITCHING, only_with=("srlora.score", ("sensitivity", "relative")))
    beta2: float = option(0.85, methods=SWITCHING, only_with=("srlora.score", ("sensitivity", "relative")))
    importance_window: int | Literal["auto", "all"] = option(
        "auto", methods=SWITCHING, only_with=("srlora.score", ("sensitivity", "relative"))
    )
    start: Literal["pissa", "zero_b"] = option("pissa", methods=ADAPTED)
    score: Literal["sensitivity", "relative", "change"] = option("sensitivity", methods=SWITCHING)
    choose: Literal["lowest", "highest", "oldest"] = option("lowest", methods=SWITCHING)
    grace: int = option(0, methods=SWITCHING)
    switch_until: float = option(1.0, methods=SWITCHING)
    num_switches: int | None = option(None, methods=SWITCHING)
    switch_when: Literal["due", "settled"] = option("due", methods=SWITCHING)
    exhausted: Literal["stop", "wrap", "renew"] = option("stop", methods=SWITCHING)
    score_reset: Literal["all", "restarted"] = option(
        "all", methods=SWITCHING, only_with=("srlora.score", ("sensitivity", "relative"))
    )
    optimizer_reset: Literal["zero", "first_moment", "keep", "survivors", "pair_steps"] = option(
        "zero", methods=SWITCHING
    )
    fusion: Literal["auto", "in_place", "adapter"] = option("auto", methods=ADAPTED)
    fused_rank: int | None = option(None, methods=ADAPTED)
    residual_device: Literal["weight", "cpu"] = option("weight", free_on_resume=True, methods=ADAPTED)
    directions_from: str | None = option(None, methods=ADAPTED)
    check_switch: bool = option(False, free_on_resume=True, methods=SWITCHING)
    switch_tolerance: float | None = option(None, free_on_resume=True, methods=SWITCHING)
    agreement_every: int = option(0, free_on_resume=True, methods=ADAPTED)
    adapter_name: str = "default"
    svd_cache: str | None = option(None, free_on_resume=True, names_run_in=(), methods=ADAPTED)
    svd_distribute: bool = option(False, free_on_resume=True, methods=ADAPTED)
    ledger_dir: str | None = option(None, free_on_resume=True, names_run_in=(), methods=ADAPTED)

    def __post_init__(self) -> None:
        share = (lambda value: 0 < value <= 1, "a share of the pairs in (0, 1], such as 0.5")
        decay = (BELOW_ONE[0], "a decay in [0, 1), such as 0.85")
        name = (lambda value: re.fullmatch(r"[\w-]+", value), "a name of letters, digits, _ and -")
        rules = {"fusion_ratio": share, "beta1": decay, "beta2": decay, "fused_rank": COUNT, "adapter_name": name}
        steps = (
            lambda x: x in ("auto", "all") or (isinstance(x, int) and COUNT[0](x)),
            f"auto, all or {COUNT[1]} steps",
        )
        part = (share[0], "a share of the steps in (0, 1], such as 0.5")
        rules |= {"grace": COUNT_OR_NONE, "switch_until": part, "num_switches": COUNT}
        rules |= {"importance_window": steps, "switch_tolerance": POSITIVE, "agreement_every": COUNT_OR_NONE}
        require("srlora.", self, rules | {"target_rank": (COUNT[0], "at least the rank of the adapter")})
        if self.exhausted == "renew" and self.start == "zero_b":
            raise ValueError(
                "srlora.exhausted is renew, but with srlora.start zero_b the first directions of W are still in it, "
                "those of pairs that stay too: choose wrap or stop, or start pissa"
            )
        if self.switch_when == "settled" and isinstance(self.importance_window, int):
            raise ValueError(
                f"srlora.importance_window is {self.importance_window}, but with srlora.switch_when settled no step is "
                "known to come before a switch: choose auto, which then counts all"
            )
        expand_home(self, "directions_from", "svd_cache", "ledger_dir")

    @property
    def num_directions(self) -> int:
        """``target_rank``, or what it is where it is not set."""
        return DEFAULT_TARGET_RANK if self.target_rank is None else self.target_rank
