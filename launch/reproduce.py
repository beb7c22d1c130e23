"""Run a table of the paper: ``launch/reproduce.py --table 3 [--tasks rte mrpc] [--seeds 3] [--train.epochs 1 ...]``.

The same command goes on where it was stopped, and prints the table if all is done. See docs/paper.md.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

LAUNCH = Path(os.path.relpath(Path(__file__).resolve().parent))
sys.path.insert(0, str(LAUNCH.resolve().parent))  # the package may not be installed

from benchmarks.reproduce.grid import TableGrid, build_grid  # noqa: E402
from benchmarks.reproduce.report import draw_figures, found_results, write_table  # noqa: E402
from benchmarks.reproduce.results import Results  # noqa: E402
from benchmarks.reproduce.running import command, run_grid  # noqa: E402
from srlora_dist.errors import STOPPED_BY_SIGNAL  # noqa: E402 (after the path is set)


def main(argv: list[str]) -> int:
    """Run the grid and report; the exit status is 1 if a run failed, 2 for wrong options and 75 if asked to stop."""
    try:
        grid = build_grid(argv, LAUNCH / "paper")
        train = LAUNCH / "train.py"
        if grid.dry_run:
            _say(grid, train)
            return 0
        failed, stopped = run_grid(grid, train)
        found = found_results(grid, Results(grid.results))
        print(write_table(grid, found, failed, grid.folder / "table.md"))
        for path in draw_figures(grid, found, grid.folder / "figures") if found else ():
            print(path)
    except (ValueError, OSError) as error:
        print(f"reproduce: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if stopped:
        print("reproduce: stopped by a signal: the same command goes on", file=sys.stderr)
        return STOPPED_BY_SIGNAL
    return 1 if failed else 0


def _say(grid: TableGrid, train: Path) -> None:
    results = Results(grid.results)
    for cell in grid.cells:
        print(f"# {cell.name}{', done' if results.of(cell) else ''}")
        print(shlex.join(command(grid, cell, train)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
