"""DeepSpeed's operators are compiled when they are first used, under a lock that a killed process leaves behind."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger(__name__)

SILENT_SECONDS = 5.0
PATIENCE_SECONDS = 120.0
"""A lock that no process of this machine holds open may be that of another one, with the same home folder."""


def wait_for_locks(operators: Iterable[str], patience: float = PATIENCE_SECONDS) -> None:
    """Wait until none of these operators is being compiled, and remove the locks of processes that are gone.

    Torch itself waits for a lock for ever, so that after a kill no run would start again.

    Args:
        operators: Those that a run uses, as DeepSpeed names their folders.
        patience: Seconds from when a lock was made, after which it is removed if no process here holds it.
    """
    began, told = time.monotonic(), False
    while locks := [path for path in _locks(set(operators)) if path.exists()]:
        for path in locks:
            age = _age(path)
            if age is not None and age > patience and not _is_open(path):
                time.sleep(0.2)  # torch closes a lock before it removes it
                if path.exists():
                    logger.warning("removing %s: the process that was compiling there is gone", path)
                    path.unlink(missing_ok=True)
        if not told and time.monotonic() - began > SILENT_SECONDS:
            logger.warning("waiting for %s: another process compiles an operator, or was killed in it", locks[0])
            told = True
        time.sleep(0.2)


def _locks(operators: set[str]) -> Iterator[Path]:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(chosen).glob("*/lock") if chosen else Path(get_default_build_root()).glob("*/*/lock")
    yield from (path for path in locks if path.parent.name in operators)


def _age(path: Path) -> float | None:
    """Seconds since a file was made; None if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return None


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has a file open, as torch has while it holds a lock; Linux tells."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == path.resolve():
                return True
        except OSError:  # that process has ended, or is another user's
            continue
    return False
