"""Two processes never write into one folder; the second one is told who the first one is, and a dead one keeps none."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import srlora_dist.checkpoint.folder_lock
import srlora_dist.checkpoint.lock_file
from srlora_dist.checkpoint.folder_lock import FolderInUseError, FolderLock, HeldFolders

HOLD = """
import sys, os, time
import srlora_dist.checkpoint.folder_lock as module
import srlora_dist.checkpoint.lock_file as file
exec(sys.argv[2])
lock = module.FolderLock(sys.argv[1], "output_dir", "choose another", 0)
print("held", flush=True)
sys.stdin.read()
"""
FORK = """
if os.fork() == 0:
    time.sleep(60)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process that holds a folder until its standard input is closed."""
    processes = []

    def start_one(folder: Path, first: str = "", then: str = "") -> subprocess.Popen:
        code = HOLD.replace("sys.stdin.read()", f"{then}\nsys.stdin.read()")
        process = subprocess.Popen(
            [sys.executable, "-c", code, folder, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def take(folder: Path, patience: float | None = 0) -> FolderLock:
    return FolderLock(folder, "output_dir", "choose another", patience)


@pytest.mark.parametrize("exists", [True, False])
def test_a_second_process_is_told_who_has_the_folder(tmp_path, start, exists: bool) -> None:
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    holder = start(folder)
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / "link"):
        with pytest.raises(FolderInUseError, match="wait until that has ended, or choose another") as refused:
            take(name)
        assert f"output_dir {folder} is in use by process {holder.pid} on host {socket.gethostname()}, since 20" in str(
            refused.value
        )
    holder.communicate()
    take(folder).release()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("then", ["", FORK])
def test_a_killed_process_keeps_nothing(tmp_path, start, then: str) -> None:
    """Nor do those that it has forked and that live on."""
    holder = start(tmp_path, then=then)
    with pytest.raises(FolderInUseError):
        take(tmp_path)
    holder.kill()
    holder.wait()
    take(tmp_path, None).release()  # a process that was only just forked lets go in a moment


def test_a_new_start_waits_a_moment_and_a_restart_longer(tmp_path, start, monkeypatch, caplog) -> None:
    holder = start(tmp_path)
    monkeypatch.setattr(srlora_dist.checkpoint.folder_lock, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(srlora_dist.checkpoint.folder_lock, "SAY_SECONDS", 0.2)
    with pytest.raises(FolderInUseError):
        take(tmp_path, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    caplog.clear()
    end = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {holder.pid}"])
    began = time.monotonic()
    take(tmp_path, None).release()
    assert 0.5 < time.monotonic() - began < 20
    assert end.wait() == 0
    assert "waiting for its end, 0 of at most 120 s" in caplog.text
    assert caplog.text.count("waiting") > 1


@pytest.mark.parametrize("locks", ["of each host", "none"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_process_on_another_host_is_known_by_its_heartbeat(tmp_path, start, monkeypatch, locks, ends) -> None:
    """Where the file system has no locks at all this holds on one host too."""
    blind = "import errno\ndef refuse(*_): raise OSError(errno.ENOSYS, 'no locks')\nfile.fcntl.flock = refuse\n"
    blind = "file.fcntl.flock = lambda *_: None\nfile._boot = lambda: 'another'\n" if locks != "none" else blind
    holder = start(tmp_path, f"{blind}\nfile.BEAT_SECONDS = 0.1")
    if locks == "none":

        def refuse(*_: object) -> None:
            raise OSError(srlora_dist.checkpoint.lock_file.errno.ENOSYS, "no locks")

        monkeypatch.setattr(srlora_dist.checkpoint.lock_file.fcntl, "flock", refuse)
    monkeypatch.setattr(srlora_dist.checkpoint.lock_file, "WATCH_SECONDS", 0.6)
    if ends:
        holder.kill()
        holder.wait()
        take(tmp_path).release()
        return
    with pytest.raises(FolderInUseError, match=f"process {holder.pid}"):
        take(tmp_path)


@pytest.mark.long
def test_a_run_that_was_given_up_in_this_process_is_in_nobodys_way(tmp_path) -> None:
    first = take(tmp_path)
    second = take(tmp_path)
    first.release()  # it holds nothing any more
    assert second.is_held
    assert not first.is_held
    program = [sys.executable, "-c", HOLD, str(tmp_path), ""]
    refused = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert f"is in use by process {os.getpid()}" in refused.stderr
    del second
    gc.collect()
    assert subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def test_what_is_inside_a_held_folder_is_held_with_it(tmp_path, start) -> None:
    with take(tmp_path / "run"):
        folders = HeldFolders()
        assert folders.hold(tmp_path / "run" / "checkpoints", "", "")
        assert not folders.hold(tmp_path / "run" / "checkpoints", "", "")
        assert [path.name for path in tmp_path.rglob("*")] == [".run.srlora_lock"]
    start(tmp_path / "run")


def test_a_folder_that_can_have_no_lock_is_no_error(tmp_path) -> None:
    (tmp_path / "file").touch()
    lock = take(tmp_path / "file" / "below")
    assert not lock.is_held
    lock.release()


def test_what_the_lock_says_may_be_missing(tmp_path) -> None:
    """A full disk takes the file, and not what is written into it; a lock may also be cut by a crash."""
    for content in ("", "{", json.dumps({"pid": 1})):
        (tmp_path / ".run.srlora_lock").write_text(content)
        lock = take(tmp_path / "run")
        assert lock.is_held
        lock.release()
