"""What ``srlora doctor`` starts: ranks that add up a number, and ``accelerate launch -m srlora_dist train``."""

from __future__ import annotations

from pathlib import Path

import pytest

from srlora_dist.health.runs import try_run, write_files, write_launch_file
from srlora_dist.storage import try_process_group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    write_files(folder)
    return folder


def test_two_processes_come_together() -> None:
    assert try_process_group(2, timeout=120) is None


def test_processes_that_are_late_are_reported() -> None:
    assert "2 processes did not come together in 0.1 s" in try_process_group(2, timeout=0.1)


def test_three_steps_run_on_the_engine_that_was_asked_for(folder: Path) -> None:
    found = try_run(folder, write_launch_file(folder, "zero3", 2), "zero3")
    assert found.status == "ok", found.what
    assert found.what.startswith("2 x zero3: 3 steps, 1 switch, ")


def test_another_engine_is_a_failure_with_its_reason(folder: Path) -> None:
    found = try_run(folder, write_launch_file(folder, "plain", 1), "zero2")
    assert found.status == "failed"
    assert "the engine asked for is zero2, but the launch asks for plain" in found.what
