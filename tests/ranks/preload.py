"""What every rank imports, for the process that the ranks are forked from (see world.py)."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported

LATER_IMPORTS = ("deepspeed.ops.op_builder.all_ops", "peft.tuners.lora.bnb", "torch.distributed.fsdp")
"""What an engine imports when it is first used."""

for name in LATER_IMPORTS:
    import_module(name)
for path in sorted(Path(__file__).parent.glob("test_*.py")):
    import_module(f"tests.ranks.{path.stem}")
