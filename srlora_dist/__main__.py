"""``python -m srlora_dist COMMAND`` is ``srlora COMMAND``, for ``accelerate launch -m srlora_dist train``."""

from __future__ import annotations

import sys

from srlora_dist.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
