"""The file of a lock: the kernel locks it, it names the holder, and a heartbeat shows that the holder is alive."""

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
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

logger = logging.getLogger(__name__)

BEAT_SECONDS, WATCH_SECONDS = 4.0, 12.0
"""Time between two heartbeats, and how long to watch for one of a process on another host."""
LOOK_SECONDS = 0.2
"""Time between two looks at a lock that another process holds."""
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of a file system that has no locks."""


@dataclass
class Holder:
    """The process that holds a lock.

    Args:
        host: Name of its host.
        boot: Boot id of the kernel it runs on, because containers of one machine have different host names.
        pid: Its process id there.
        started: When it took the lock, in UTC.
        command: The script that it runs.
    """

    host: str
    boot: str
    pid: int
    started: str
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        """The current process."""
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        # Without the arguments: a token can be among them.
        return cls(socket.gethostname(), _boot(), os.getpid(), now, sys.argv[0] or "python")

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """The holder that a file names; None where the file is new, or was written on a full disk."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.started} UTC ({self.command})"


class LockFile:
    """A lock file that this process holds, open and locked, with the thread of its heartbeat.

    Args:
        path: Where the file is.
        number: Its file descriptor, locked.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self._number = number
        self._stopped = threading.Event()
        with contextlib.suppress(OSError):  # on a full disk the lock names no holder
            os.ftruncate(number, 0)
            os.pwrite(number, json.dumps(asdict(Holder.this_process())).encode(), 0)
        threading.Thread(target=_beat, args=(number, self._stopped), daemon=True).start()

    def release(self) -> None:
        """Unlock and remove the file. It goes while still locked, so whoever waits with it open makes a new one."""
        self._stopped.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._number)

    def close_in_child(self) -> None:
        """Close the file in a forked process, which does not own the lock. The parent's lock stays."""
        self._stopped.set()
        os.close(self._number)


def try_to_lock(path: Path) -> LockFile | str | None:
    """Make a lock file and lock it, without waiting for another process to end.

    Returns:
        The lock; or the description of the process that holds it; or None where the file cannot be made.
    """
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            logger.debug("%s cannot be made, so nothing is locked: %s", path, error)
            return None
        try:
            holder, locks = Holder.read(path), _lock(number)
            if locks is False or (holder is not None and _is_alive_elsewhere(holder, path, locks)):
                os.close(number)
                return str(holder or "another process")
            if _is_same(number, path):
                if holder is not None:
                    logger.info("%s was left behind by %s, which is gone", path, holder)
                return LockFile(path, number)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(number)
            raise
        os.close(number)  # its last holder has removed this file


def _beat(number: int, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(number)


def _lock(number: int) -> bool | None:
    """Whether the file is locked by this process now; None where the file system has no locks."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in WITHOUT_LOCKS else False
    return True


def _is_same(number: int, path: Path) -> bool:
    """Whether an open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except OSError:
        return False


def _is_alive_elsewhere(holder: Holder, path: Path, locks: bool | None) -> bool:
    """Watch for a heartbeat of the holder, where locks do not work or do not reach other hosts."""
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
    """Time of the file's last change, in ns. Opens the file anew, because NFS asks its server then."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.fstat(number).st_mtime_ns
    finally:
        os.close(number)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
