"""Which checkpoint a run goes on from, and whether it is a checkpoint of the same run."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from srlora_dist.checkpoint.files import clean_up
from srlora_dist.checkpoint.folder_lock import was_restarted
from srlora_dist.checkpoint.format import Checkpoint, find_checkpoint
from srlora_dist.config.method import DEFAULT_TARGET_RANK
from srlora_dist.config.option import flatten, free_on_resume
from srlora_dist.config.run import RunConfig
from srlora_dist.training.earlier_run import CHECKPOINTS

logger = logging.getLogger(__name__)

FREE = free_on_resume(RunConfig)
"""Options that may be others when a run is resumed: where things are, on what it runs, how often it reports. The
pretrained weights are compared by their digests."""


def checkpoints_of(config: RunConfig) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.output_dir) / CHECKPOINTS


def choose_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that ``checkpoint.resume`` asks for; None to start anew. For the main process.

    Raises:
        ValueError: There is none where one is asked for, none that is good, or one of another run.
    """
    asked, own = config.checkpoint.resume, checkpoints_of(config)
    clean_up(own)
    # After a restart by the launcher or by SLURM the run of this launch goes on, whatever it was started from. It may
    # even have ended: a signal in its last moments has the job put back into the queue all the same.
    checkpoint = find_checkpoint(own) if was_restarted() else None
    if checkpoint is None:
        has_ended = (Path(config.output_dir) / "summary.json").exists()
        if asked == "never" or (asked == "auto" and has_ended):
            return None
        folder = own if asked in ("auto", "must") else Path(asked)
        checkpoint = find_checkpoint(folder)
        if checkpoint is None and asked != "auto":
            raise ValueError(f"checkpoint.resume is {asked}, but there is no checkpoint in {folder}: choose auto")
    if checkpoint is None:
        return None
    _require_same_run(checkpoint, config)
    logger.info("resuming after step %d from %s", checkpoint.step, checkpoint.folder)
    return checkpoint


def _require_same_run(checkpoint: Checkpoint, config: RunConfig) -> None:
    try:
        name, theirs, ours = first_difference(checkpoint.state["extra"]["config"], config) or ("", None, None)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint.folder} is not a checkpoint of srlora train: it has no options") from error
    if name:
        given = config.checkpoint.resume not in ("auto", "must", "never")
        other = "another --checkpoint.resume" if given else "another --output_dir"
        raise ValueError(
            f"{checkpoint.folder} is of a run with {name} {theirs}, and this one has {ours}: set it back to go on, "
            f"choose {other}, or start anew with --checkpoint.resume never"
        )


def first_difference(theirs: dict[str, object], config: RunConfig) -> tuple[str, object, object] | None:
    """The first option that decides what a run computes and is another here: its name, their value and this one's.

    Args:
        theirs: A resolved configuration, as ``config.yaml`` has it.
        config: Options of this run.
    """
    theirs, ours = _options(theirs), _options(asdict(config))
    names = (name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name))
    return next(((name, theirs.get(name), ours.get(name)) for name in names), None)


def _options(config: dict[str, object]) -> dict[str, object]:
    """The options of a run that decide what it computes, by their full names."""
    flat = flatten(config)
    if flat.get("srlora.target_rank", 0) is None:  # the same, unsaid
        flat["srlora.target_rank"] = DEFAULT_TARGET_RANK
    return {name: value for name, value in flat.items() if name not in FREE}
