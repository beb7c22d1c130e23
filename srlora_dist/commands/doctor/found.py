"""What ``srlora doctor`` looks at: one file a kind of check, each of which gives findings as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Found:
    """What a check found.

    Args:
        status: ``failed`` stands in the way of training, a ``warning`` only in that of some of it.
        what: In a line.
        remedy: What to do.
    """

    status: Literal["ok", "warning", "failed"]
    what: str
    remedy: str = ""
