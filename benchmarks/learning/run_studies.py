"""Does it learn better? Runs what the study still lacks, and appends a line a run to results.jsonl.

    python benchmarks/learning/prepare.py
    GLUE_DIR=path/to/glue python benchmarks/learning/run_studies.py [--tasks sst2 mnist] [--parts rates main ...]
    python benchmarks/learning/report.py

The same command goes on where it was stopped. With ``--worker 1/2`` and ``--worker 2/2`` two processes share the work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from studies import (
    ABLATION_TASKS,
    QUESTIONS,
    RUNS,
    TASKS,
    Run,
    as_grid,
    main_runs,
    rate_runs,
    variant_runs,
)

from benchmarks.reproduce.running import run_grid


def main() -> int:
    """Run part after part: a later one can need the results of an earlier one."""
    parts = ("rates", "main", *QUESTIONS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--worker", default="1/1", help="which of how many")
    options = parser.parse_args()
    number, of = map(int, options.worker.split("/"))
    failed: list[str] = []
    for part in options.parts:
        runs = [run for task in options.tasks for run in _runs(part, task)]
        grid = as_grid(runs[number - 1 :: of], RUNS / f"{'-'.join(options.tasks)}-{number}-of-{of}")
        errors, stopped = run_grid(grid, Path("launch/train.py"))
        failed += errors
        if stopped:
            break
    print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


def _runs(part: str, task: str) -> list[Run]:
    if part == "rates":
        return rate_runs(task)
    if part == "main":
        return main_runs(task)
    return variant_runs(task, part) if task in ABLATION_TASKS else []


if __name__ == "__main__":
    sys.exit(main())
