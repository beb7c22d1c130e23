"""The lock of a compiler that was killed does not stop later runs; that of one at work is waited for."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from srlora_dist.engine.deepspeed import wait_for_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


def make_old(lock: Path) -> None:
    os.utime(lock, (time.time() - 1000,) * 2)


def test_a_lock_that_nobody_holds_is_removed(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock.touch()
    make_old(lock)
    wait_for_locks(["cpu_adam"])
    assert not lock.exists()
    assert "the process that was compiling there is gone" in caplog.text


def test_a_lock_that_is_held_is_waited_for_however_old(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    baton, events = FileBaton(str(lock)), []
    assert baton.try_acquire()
    make_old(lock)

    def release() -> None:
        events.append("released")
        baton.release()

    threading.Timer(1.0, release).start()
    wait_for_locks(["cpu_adam"])
    assert events == ["released"]
    assert "gone" not in caplog.text


def test_a_young_lock_is_given_time(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    looks = []
    monkeypatch.setattr("srlora_dist.engine.deepspeed._age", lambda path: looks.append(path) or 0.2 * len(looks))
    wait_for_locks(["cpu_adam"], patience=0.5)
    assert len(looks) == 3  # at 0.2 and 0.4 s it is still given time
    assert not lock.exists()


def test_without_a_lock_nothing_is_said(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    wait_for_locks(["cpu_adam"])
    assert caplog.text == ""


def test_the_lock_of_another_operator_is_not_waited_for(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock.touch()
    wait_for_locks(["deepspeed_shm_comm"], patience=math.inf)  # it would be waited for without an end
    assert lock.exists()
    assert caplog.text == ""
