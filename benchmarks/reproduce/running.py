"""Runs the grid: one launch after the other, each of which goes on where it was stopped."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.reproduce.grid import Cell, Grid
from benchmarks.reproduce.results import Results, finished_summary
from srlora_dist.checkpoint.folder_lock import FolderInUseError, FolderLock

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SECONDS_TO_STOP = 120
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
START = "$ "
"""Begins the line of a log that a new start writes."""


class Stopped:
    """Whether this process was asked to stop; passes that on to the run, which then writes a checkpoint.

    Used as a context, outside of which signals do what they did before.
    """

    def __init__(self) -> None:
        self.asked = False
        self.child: subprocess.Popen | None = None

    def __enter__(self) -> Stopped:
        self._before = {name: signal.signal(name, self._stop) for name in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _stop(self, *_: object) -> None:
        again, self.asked = self.asked, True
        if self.child is None or self.child.poll() is not None:
            return
        if again:  # what was not saved will be done once more
            os.killpg(self.child.pid, signal.SIGKILL)
        else:
            self.child.terminate()


def run_grid(grid: Grid, train: Path) -> tuple[list[str], bool]:
    """Run what has no result yet.

    Args:
        grid: The runs.
        train: The file ``launch/train.py``.

    Returns:
        What failed, a line each, and whether the grid was asked to stop.

    Raises:
        ValueError: Another process runs a grid in this folder.
    """
    grid.folder.mkdir(parents=True, exist_ok=True)
    # Not the folder itself, in which the runs of this grid hold theirs.
    held = FolderLock(grid.results, "another grid runs already:", "choose another --output_dir", patience=0)
    with held, Stopped() as stopped:
        return _run_all(grid, train, Results(grid.results), stopped)


def _run_all(grid: Grid, train: Path, results: Results, stopped: Stopped) -> tuple[list[str], bool]:
    failed: list[str] = []
    missing = [cell for cell in grid.cells if results.of(cell) is None]
    numbers = {"total": len(grid.cells), "initial": len(grid.cells) - len(missing)}
    with tqdm(**numbers, unit="run", desc=grid.title) as bar:
        for cell in missing:
            bar.set_postfix_str(cell.name)
            error = _run_one(grid, cell, train, results, stopped)
            if stopped.asked:
                break
            if error is not None:
                failed.append(f"{cell.name}: {error} ({_log_of(grid, cell)})")
                tqdm.write(f"failed: {failed[-1]}", file=sys.stderr)
            bar.update()
    return failed, stopped.asked


def _run_one(grid: Grid, cell: Cell, train: Path, results: Results, stopped: Stopped) -> str | None:
    """Run a cell and note its result; gives the error of one that failed."""
    began, status = time.perf_counter(), 0
    if finished_summary(cell) is None:  # the grid may have been killed between the end of a run and its result
        status = _launch(grid, cell, train, stopped)
    summary = finished_summary(cell)
    if summary is not None:
        results.add_done(cell, summary, time.perf_counter() - began, grid.about(cell))
        return None
    error = _last_error(_log_of(grid, cell))
    if not stopped.asked:
        results.add_failed(cell, error, status)
    return error


def command(grid: Grid, cell: Cell, train: Path) -> list[str]:
    """What starts a run."""
    return [*grid.launcher, str(train), *cell.arguments]


def _launch(grid: Grid, cell: Cell, train: Path, stopped: Stopped) -> int:
    """Run the command to its end; gives its exit status. What it prints is appended to its log."""
    _wait_for_the_run_before(cell)
    path = _log_of(grid, cell)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as log:
        log.write(f"{START}{shlex.join(command(grid, cell, train))}\n")
        log.flush()
        # A group of its own, so that Ctrl-C in a terminal comes to this process alone, which then asks the run to stop.
        stopped.child = subprocess.Popen(
            command(grid, cell, train), stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_the_parent
        )
        if stopped.asked:
            stopped.child.terminate()
        status = stopped.child.wait()
        _wait_for_group(stopped.child.pid)
    return status


def _wait_for_the_run_before(cell: Cell) -> None:
    """Of a grid that was killed a moment ago: it has been asked to stop, and may still write its checkpoint."""
    with contextlib.suppress(FolderInUseError):  # then the run says so
        FolderLock(cell.folder, "the folder of the run", "wait", patience=SECONDS_TO_STOP).release()


def _end_with_the_parent() -> None:
    """If the grid is killed, its run is asked to stop: otherwise the next call would meet it in its folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for_group(group: int) -> None:
    """A launcher of one process does not wait for it, and a checkpoint may still be on its way."""
    end = time.monotonic() + SECONDS_TO_STOP
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.2)
    os.killpg(group, signal.SIGKILL)


def _log_of(grid: Grid, cell: Cell) -> Path:
    return grid.folder / "logs" / f"{cell.folder.name}.log"


def _last_error(log: Path) -> str:
    """What the last start said of its end: the line for its user, or the last one."""
    last_start = f"\n{log.read_text(errors='replace')}".split(f"\n{START}")[-1]
    lines = [line.strip() for line in last_start.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if "srlora_dist: error:" in line]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("srlora_dist: error: ")[:500]
