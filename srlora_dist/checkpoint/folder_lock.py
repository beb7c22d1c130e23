"""One process at a time writes into a folder: a lock that names its holder and ends with it.

The kernel's lock (``flock``) ends with the process, however that ends. On file systems that share it (NFS, GPFS, Lustre
with ``flock``) other hosts see it too; elsewhere the holder's heartbeat tells them that it is alive.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from pathlib import Path

from srlora_dist.checkpoint.lock_file import LOOK_SECONDS, LockFile, try_to_lock

logger = logging.getLogger(__name__)

ENDING = ".srlora_lock"
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
PATIENCE_SECONDS, PATIENCE_OF_A_RESTART = 5.0, 120.0
"""How long a new process waits for the holder to end: after a fresh start, and after a restart by torchrun or SLURM."""
SAY_SECONDS = 15.0
"""Time between two messages while it waits."""


class FolderInUseError(ValueError):
    """Another process writes into the folder."""


def was_restarted() -> bool:
    """Whether the launcher or SLURM has started this process to replace an earlier one."""
    return any(os.environ.get(count, "0") != "0" for count in RESTART_COUNTS)


class FolderLock:
    """Holds a folder until :meth:`release`, the end of this object or the end of the process, even by ``kill -9``.

    Folders inside a folder that this process holds are held with it. If another object of this process holds the
    folder already (of a run that was given up), this one takes over its lock. Where the file system refuses the lock
    file, nothing is held.

    Args:
        folder: The folder that is written into. It need not exist yet.
        what: The option that chose the folder, for the message.
        remedy: What to do if the other process should go on, for the message.
        patience: Seconds to wait for another process to end; None chooses by :func:`was_restarted`.

    Raises:
        FolderInUseError: Another process still holds the folder by then. The message names the process.
    """

    def __init__(self, folder: str | Path, what: str, remedy: str, patience: float | None = None) -> None:
        self.folder = Path(folder).resolve()
        self._held: LockFile | None = None
        self._finalizer = None
        if _is_inside(self.folder):
            return
        before = _locks.get(self.folder)
        if before is not None:
            before._finalizer.detach()
            self._held, before._held = before._held, None
        else:
            self._held = _wait_for(self.folder, what, remedy, patience)
        if self._held is not None:
            _locks[self.folder] = self
            self._finalizer = weakref.finalize(self, self._held.release)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the folder or one of its parents."""
        return self._held is not None or _is_inside(self.folder)

    def release(self) -> None:
        """Unlock the folder. A second call does nothing."""
        if self._held is not None:
            _locks.pop(self.folder, None)
            self._held = None
            self._finalizer()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class HeldFolders:
    """The folders that an object writes into, each locked when it is first named."""

    def __init__(self) -> None:
        self._locks: dict[Path, FolderLock] = {}

    def hold(self, folder: str | Path, what: str, remedy: str) -> bool:
        """Lock a folder as :class:`FolderLock` does, and tell whether it was not held before.

        Raises:
            FolderInUseError: Another process holds it.
        """
        path = Path(folder).resolve()
        if path in self._locks:
            return False
        lock = FolderLock(path, what, remedy)
        if lock.is_held:
            self._locks[path] = lock
        return True

    def release(self) -> None:
        """Unlock all folders."""
        for lock in self._locks.values():
            lock.release()
        self._locks = {}


_locks: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()
"""The locks that this process holds, by folder."""


def _is_inside(folder: Path) -> bool:
    return any(parent in _locks for parent in folder.parents)


def _forget_after_fork() -> None:
    """Let go of every lock in a forked process, such as a data loader's, which may outlive the holder."""
    for lock in list(_locks.values()):
        lock._finalizer.detach()
        lock._held.close_in_child()
        lock._held = None
    _locks.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def _wait_for(folder: Path, what: str, remedy: str, patience: float | None) -> LockFile | None:
    """Lock a folder as soon as no other process holds it; None where there can be no lock.

    Raises:
        FolderInUseError: Another process still holds it after ``patience`` seconds.
    """
    if patience is None:
        patience = PATIENCE_OF_A_RESTART if was_restarted() else PATIENCE_SECONDS
    path, began = _place(folder), time.monotonic()
    next_word = began
    while True:
        found, now = try_to_lock(path), time.monotonic()
        if not isinstance(found, str):
            return found
        if now - began >= patience:
            raise FolderInUseError(f"{what} {folder} is in use by {found}: wait until that has ended, or {remedy}")
        if now >= next_word:
            word = "%s %s is in use by %s: waiting for its end, %.0f of at most %.0f s"
            logger.warning(word, what, folder, found, now - began, patience)
            next_word = now + SAY_SECONDS
        time.sleep(LOOK_SECONDS)


def _place(folder: Path) -> Path:
    """Path of a folder's lock file: beside the folder, or inside it if it is a mount point or its parent is read-only.

    Other hosts may mount such a folder under another parent.
    """
    with contextlib.suppress(OSError):
        if folder.stat().st_dev != folder.parent.stat().st_dev or not os.access(folder.parent, os.W_OK):
            return folder / ENDING
    return folder.with_name(f".{folder.name}{ENDING}")
