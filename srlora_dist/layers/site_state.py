"""Records how far SRLoRA has got at one site: which directions it has used, and which pair holds which."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass
class SiteState:
    """The state of the method at one site, the same on every rank.

    Args:
        target_rank: Number of directions to use by the end of training, at most min(m, n).
        num_starts: Number of pairs that may be started in the whole run. Equals ``target_rank``, or is larger where the
            site goes on after its unused directions are exhausted.
        num_taken: Number of the next direction. While there are unused directions this is how many were used.
        held: For each slot the direction that its pair was started along, -1 for none.
        born: For each slot the number of optimizer steps that had been taken when its pair was started.
        num_fused: Number of pairs in the second adapter that are in use.
        left_out: Whether the first batch has shown that the model bypasses the layer. Then W is untouched, and no
            switch changes the site.
    """

    target_rank: int = 0
    num_starts: int = 0
    num_taken: int = 0
    held: list[int] = field(default_factory=list)
    born: list[int] = field(default_factory=list)
    num_fused: int = 0
    left_out: bool = False

    def copy(self) -> SiteState:
        """A copy that later switches do not change."""
        return replace(self, held=list(self.held), born=list(self.born))

    def forget_pairs_(self, num_slots: int) -> None:
        """Go back to the state before switch 0, in which nothing was started or fused."""
        self.num_taken = self.num_fused = 0
        self.held, self.born = [-1] * num_slots, [0] * num_slots

    def restore_(self, saved: dict[str, object]) -> None:
        """Take over what a checkpoint says of this site; what is fused comes from the ledger."""
        self.num_taken, self.held, self.born = saved["num_taken"], list(saved["held"]), list(saved["born"])
        self.left_out = saved.get("left_out", False)
