"""The paper's Figures 3, 4 and 5, and its tables of results, drawn from the files that runs leave."""

from __future__ import annotations

from srlora_dist.training.figures.drawing import compare, draw
from srlora_dist.training.figures.intervals import Interval, active_intervals

__all__ = ["Interval", "active_intervals", "compare", "draw"]
