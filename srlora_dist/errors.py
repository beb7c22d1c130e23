"""Ends of a run that are no fault of the program."""

from __future__ import annotations

STOPPED_BY_SIGNAL = 75
"""Exit status of a training process that was asked to stop and has written a checkpoint (EX_TEMPFAIL: try again)."""


class RunStoppedError(RuntimeError):
    """Training cannot go on: it diverged, or the ranks no longer agree. Raised on every rank alike."""


class StoppedBySignalError(Exception):
    """The run was asked to stop, and the checkpoint that it goes on from is written. Raised on every rank."""


def short(error: Exception) -> str:
    """What an error says, without the hundreds of names that Transformers lists where it does not know a model."""
    return str(error).split("Model type should be one of")[0].strip() or type(error).__name__
