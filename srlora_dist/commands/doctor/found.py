"""One finding of ``srlora doctor``; each kind of check has a file beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Found:
    """What a check found.

    Args:
        status: ``failed`` stands in the way of training, a ``warning`` only in that of some of it.
        what: What was found, in one line.
        remedy: What to do.
    """

    status: Literal["ok", "warning", "failed"]
    what: str
    remedy: str = ""
