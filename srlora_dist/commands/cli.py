"""The command ``srlora``: finds the file of a command in ``commands/`` and runs it."""

from __future__ import annotations

import os
import sys
from importlib import import_module

COMMANDS = {
    "train": "train one model; on several processes: accelerate launch -m srlora_dist train",
    "svd": "compute the directions of a run ahead of it",
    "inspect": "show a checkpoint: sites, directions taken, schedule, score history",
    "export": "write a plain PEFT adapter from a checkpoint",
    "merge": "make one plain checkpoint of a base and its adapter",
    "plan": "what a run will hold, send and wait for, before it is started",
    "plot": "the paper's Figures 3, 4 and 5 from the files of runs",
    "doctor": "try on this machine what a run needs, and print what to fix",
}


def usage() -> str:
    """What there is, a line a command."""
    lines = [f"  {name:9}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: srlora COMMAND [option ...], and srlora COMMAND --help", "", *lines])


def main(argv: list[str] | None = None) -> int:
    """Run a command; gives the exit status: 2 where it was given something that cannot be, else the command's own."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        print(usage())
        return 0
    try:
        if not argv:
            raise ValueError(f"no command is given: choose one of {', '.join(COMMANDS)}")
        if argv[0] not in COMMANDS:
            raise ValueError(f"there is no command {argv[0]!r}: choose one of {', '.join(COMMANDS)}")
        return import_module(f"srlora_dist.commands.{argv[0]}").run(argv[1:]) or 0
    except ModuleNotFoundError as error:
        if os.environ.get("SRLORA_DEBUG") or (error.name or "").startswith("srlora_dist"):
            raise
        print(f"srlora: error: {error}: pip install 'srlora-dist[all]' installs what commands need", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        if os.environ.get("SRLORA_DEBUG"):
            raise
        print(f"srlora: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
