"""What ``srlora doctor`` starts: ranks that add up a number, and ``accelerate launch -m srlora_dist train``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from srlora_dist.commands.doctor import runs
from srlora_dist.commands.doctor.runs import try_run, write_files, write_launch_file
from srlora_dist.storage import process_group
from srlora_dist.storage.process_group import try_process_group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    write_files(folder)
    return folder


def test_two_processes_come_together() -> None:
    assert try_process_group(2, timeout=120) is None


def test_processes_that_are_late_are_reported() -> None:
    assert "2 processes did not come together in 0.1 s" in try_process_group(2, timeout=0.1)


def test_a_process_that_fails_is_told_at_once_and_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    """The rank that is left would wait for the other one until the time is over."""
    script = tmp_path / "probe.py"
    script.write_text("import sys, time\nif sys.argv[4] == '1': sys.exit('CUDA error: busy')\ntime.sleep(60)\n")
    monkeypatch.setattr(process_group, "__file__", str(script))
    began = time.monotonic()
    assert try_process_group(2, timeout=60) == "CUDA error: busy"
    assert time.monotonic() - began < 30


def test_a_launcher_that_is_late_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(100)\n")
    launcher = "import subprocess, sys; subprocess.Popen([sys.executable, sys.argv[1]]).wait()"
    status, text = runs._start([sys.executable, "-c", launcher, str(tmp_path / "child.py")], limit=5)
    assert status is None
    for _ in range(100):  # it may be a zombie for a moment
        state = Path(f"/proc/{int(text)}/stat")
        if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the process that the launcher had started is still there")


def test_three_steps_run_on_the_engine_that_was_asked_for(folder: Path) -> None:
    found = try_run(folder, write_launch_file(folder, "zero3", 2), "zero3")
    assert found.status == "ok", found.what
    assert found.what.startswith("2 x zero3: 3 steps, 1 switch, ")


def test_another_engine_is_a_failure_with_its_reason(folder: Path) -> None:
    found = try_run(folder, write_launch_file(folder, "plain", 1), "zero2")
    assert found.status == "failed"
    assert "the engine asked for is zero2, but the launch asks for plain" in found.what
