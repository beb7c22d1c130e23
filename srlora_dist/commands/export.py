"""``srlora export`` writes the adapter of a checkpoint: no model, no GPU, no network."""

from __future__ import annotations

import os
from pathlib import Path

from srlora_dist.commands.arguments import Arguments
from srlora_dist.engine.process import prepare_process


def run(argv: list[str]) -> None:
    """Export.

    Raises:
        ValueError: The command line or the checkpoint cannot be read.
        OSError: The adapter cannot be written.
    """
    parser = Arguments(
        "export", "Write a plain PEFT adapter from a checkpoint, which needs neither the model nor a GPU."
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of them: then the last good one")
    parser.add_argument("folder", type=Path, help="where to write the adapter")
    parser.add_argument("--max_rank", type=int, help="truncate each site to this rank by SVD; without it, exact")
    options = parser.parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT would ask the hub about the base
    prepare_process()
    from srlora_dist.checkpoint.export import export_checkpoint
    from srlora_dist.checkpoint.format import find_checkpoint  # after the environment is set

    checkpoint = find_checkpoint(options.checkpoint)
    if checkpoint is None:
        raise ValueError(
            f"there is no checkpoint in {options.checkpoint}: give the checkpoints/ folder of a run, or "
            "checkpoint-N/srlora where the HF Trainer saved it"
        )
    export_checkpoint(checkpoint, options.folder, options.max_rank)
    print(f"adapter of step {checkpoint.step}: {options.folder}")
