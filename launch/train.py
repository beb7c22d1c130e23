"""Train one model: ``accelerate launch launch/train.py [--config FILE] [--section.option value ...]``.

It is ``srlora train`` from a clone that may not be installed. Without arguments it runs the demo. ``--help`` lists the
options; ``SRLORA_DEBUG=1`` shows where an error came from.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from srlora_dist.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
