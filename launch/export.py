"""Write the adapter of a checkpoint: ``python launch/export.py runs/.../checkpoints/step-N adapter [--max_rank R]``.

It reads nothing but the checkpoint: the pretrained model, a GPU or the network are not needed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package may not be installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT would ask the hub about the base
logging.basicConfig(format="%(message)s")
logging.getLogger("srlora_dist").setLevel(logging.INFO)

from srlora_dist.checkpoint import find_checkpoint  # noqa: E402 (after the environment is set)
from srlora_dist.export import export_checkpoint  # noqa: E402


def main() -> None:
    """Read the command line, and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of them: then the last good one")
    parser.add_argument("folder", type=Path, help="where to write the adapter")
    parser.add_argument("--max_rank", type=int, help="truncate each site to this rank by SVD; without it, exact")
    options = parser.parse_args()
    try:
        checkpoint = find_checkpoint(options.checkpoint)
        if checkpoint is None:
            raise ValueError(f"there is no checkpoint in {options.checkpoint}: give the checkpoints/ folder of a run")
        export_checkpoint(checkpoint, options.folder, options.max_rank)
    except (ValueError, OSError) as error:
        sys.exit(f"srlora_dist: error: {' '.join(str(error).split())}")
    sys.stdout.write(f"adapter of step {checkpoint.step}: {options.folder}\n")


if __name__ == "__main__":
    main()
