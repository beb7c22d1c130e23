"""One process at a time writes into a folder: a lock that names its holder, and that no dead process keeps.

The kernel's lock (``flock``) ends with the process, however that ends, and on file systems that share it (NFS, GPFS,
Lustre with ``flock``) other hosts see it too. Where they do not, the holder's heartbeat tells them that it is alive.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import weakref
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

logger = logging.getLogger(__name__)

ENDING = ".srlora_lock"
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
PATIENCE_SECONDS, PATIENCE_OF_A_RESTART = 5.0, 120.0
"""How long a new start waits for the process before it to end, and one by the launcher or by SLURM."""
BEAT_SECONDS, WATCH_SECONDS = 4.0, 12.0
"""Time between two heartbeats, and how long a process on another host is watched for one."""
SAY_SECONDS, LOOK_SECONDS = 15.0, 0.2
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderInUseError(ValueError):
    """Another process writes into the folder."""


def was_restarted() -> bool:
    """Whether the launcher or SLURM has started this process in the place of one before it."""
    return any(os.environ.get(count, "0") != "0" for count in RESTART_COUNTS)


@dataclass
class Holder:
    """The process that holds a lock.

    Args:
        host: Its name.
        boot: Of the kernel that it runs on: containers of one machine have different names.
        pid: Number of the process there.
        started: When it took the lock, in UTC.
        command: The script that was started.
    """

    host: str
    boot: str
    pid: int
    started: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.started} UTC ({self.command})"


class FolderLock:
    """Holds a folder until :meth:`release`, the end of this object or of the process, ``kill -9`` too.

    A folder inside one that this process holds is held with it. If an object of this process holds the folder already,
    a run that was given up, this one takes its place. Where a file system refuses the file of the lock, nothing is
    held.

    Args:
        folder: What is written into; it need not be there yet.
        what: For the message: the option that chose the folder.
        remedy: Likewise, what to do if the other one shall go on.
        patience: Seconds to wait for another process to end; None for those of a new start or of a restart.

    Raises:
        FolderInUseError: Another process has not ended by then; the message names it.
    """

    def __init__(self, folder: str | Path, what: str, remedy: str, patience: float | None = None) -> None:
        self.folder = Path(folder).resolve()
        self._held: _Held | None = None
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
            self._finalizer = weakref.finalize(self, self._held.let_go)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the folder, or one that it is in."""
        return self._held is not None or _is_inside(self.folder)

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if self._held is not None:
            _locks.pop(self.folder, None)
            self._held = None
            self._finalizer()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class HeldFolders:
    """The folders that an object writes into, each held from the first time that it is named."""

    def __init__(self) -> None:
        self._locks: dict[Path, FolderLock] = {}

    def hold(self, folder: str | Path, what: str, remedy: str) -> bool:
        """Take a folder as :class:`FolderLock` does; tells whether that is new.

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
        """Let others in."""
        for lock in self._locks.values():
            lock.release()
        self._locks = {}


_locks: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()
"""Those of this process that hold a folder."""


def _is_inside(folder: Path) -> bool:
    return any(parent in _locks for parent in folder.parents)


class _Held:
    """The open file of a lock that is held, and the thread that shows other hosts that its process is alive."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        self.stopped = threading.Event()
        with contextlib.suppress(OSError):  # on a full disk it is a lock without a name
            os.ftruncate(number, 0)
            os.pwrite(number, json.dumps(asdict(_this_process())).encode(), 0)
        threading.Thread(target=_beat, args=(number, self.stopped), daemon=True).start()

    def let_go(self) -> None:
        """Remove the file while it is still locked, so that whoever waits with it open takes a new one."""
        self.stopped.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self.number)


def _beat(number: int, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(number)


def _forget_after_fork() -> None:
    """A forked process, such as a data loader's, would keep the lock after the end of the one that took it."""
    for lock in list(_locks.values()):
        lock._finalizer.detach()
        lock._held.stopped.set()
        os.close(lock._held.number)
        lock._held = None
    _locks.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def _wait_for(folder: Path, what: str, remedy: str, patience: float | None) -> _Held | None:
    if patience is None:
        patience = PATIENCE_OF_A_RESTART if was_restarted() else PATIENCE_SECONDS
    path, began = _place(folder), time.monotonic()
    next_word = began
    while True:
        found, now = _try(path), time.monotonic()
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
    """Beside the folder; inside it where that is another file system, which another machine may not see there."""
    with contextlib.suppress(OSError):
        if folder.stat().st_dev != folder.parent.stat().st_dev or not os.access(folder.parent, os.W_OK):
            return folder / ENDING
    return folder.with_name(f".{folder.name}{ENDING}")


def _try(path: Path) -> _Held | str | None:
    """The lock, or who has it; None where there can be none."""
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            logger.debug("%s cannot be made, so nothing is locked: %s", path, error)
            return None
        try:
            holder, locks = _read(path), _lock(number)
            if locks is False or (holder is not None and _is_alive_elsewhere(holder, path, locks)):
                os.close(number)
                return str(holder or "another process")
            if _is_same(number, path):
                if holder is not None:
                    logger.info("%s was left behind by %s, which is gone", path, holder)
                return _Held(path, number)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(number)
            raise
        os.close(number)  # that file was removed by the one who held it


def _lock(number: int) -> bool | None:
    """Whether it is locked now; None where the file system has no locks."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in WITHOUT_LOCKS else False
    return True


def _is_same(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except OSError:
        return False


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # it has just been made, or the disk was full
        return None


def _is_alive_elsewhere(holder: Holder, path: Path, locks: bool | None) -> bool:
    """Whether a process shows that it is alive, where locks say nothing of it or count on one machine alone."""
    if locks and holder.boot == _boot():
        return False
    logger.warning("watching for %.0f s whether %s is still alive", WATCH_SECONDS, holder)
    last, end = _touched(path), time.monotonic() + WATCH_SECONDS
    while last is not None and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        now = _touched(path)
        if now is not None and now != last:
            return True
    return False


def _touched(path: Path) -> int | None:
    """When a file was last touched; opened anew, because NFS asks its server then."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.fstat(number).st_mtime_ns
    finally:
        os.close(number)


def _this_process() -> Holder:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    # Not its arguments: a token can be among them.
    return Holder(socket.gethostname(), _boot(), os.getpid(), now, sys.argv[0] or "python")


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
