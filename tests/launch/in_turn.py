"""Runs scripts as Python would, one after the other in one process, so that the imports are paid for once."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path


def main(orders: dict[str, list[str]]) -> dict[str, str]:
    """Run each script with its arguments; gives by its name what went wrong."""
    problems = {}
    for script, arguments in orders.items():
        path = list(sys.path)
        sys.argv = [script, *arguments]
        sys.path.insert(0, str(Path(script).parent))
        began = time.perf_counter()
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                problems[script] = f"exit status {end.code}"
        except Exception:
            problems[script] = traceback.format_exc()
        sys.stderr.write(f"{script}: {time.perf_counter() - began:.1f} s\n")
        sys.path[:] = path
    return problems


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the scripts print is no result
    out.write(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
    out.flush()
