"""Notices that the choice of pairs has settled, so that a switch need not wait for its fixed step."""

from __future__ import annotations

LOOKS_PER_INTERVAL = 8
EARLIEST = 0.5
SAME_SHARE = 0.9


class Settling:
    """Looks at what a switch would choose, some times in each interval, and compares it with the look before.

    Args:
        interval: Steps between the switches of the fixed schedule.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.before: list[list[int]] | None = None  # slots of each site at the last look since the last switch

    def looks_after(self, steps: int) -> bool:
        """Whether so many steps after the last switch are a time to look: half an interval, or one look earlier."""
        between = max(1, self.interval // LOOKS_PER_INTERVAL)
        return steps % between == 0 and steps >= EARLIEST * self.interval - between

    def has_settled(self, slots: list[list[int]], steps: int) -> bool:
        """Take note of a choice, so many steps after the last switch; true if it is most of the one before."""
        before, self.before = self.before, slots
        if before is None or steps < EARLIEST * self.interval:
            return False
        kept = sum(len(set(now) & set(then)) for now, then in zip(slots, before, strict=True))
        return kept >= SAME_SHARE * sum(map(len, slots))
