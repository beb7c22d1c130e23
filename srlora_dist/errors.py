"""Expected ways for a run to stop early, and short texts for messages."""

from __future__ import annotations

STOPPED_BY_SIGNAL = 75
"""Exit status of a training process that was asked to stop and has written a checkpoint (EX_TEMPFAIL: try again)."""


class RunStoppedError(RuntimeError):
    """Training cannot go on: it diverged, or the ranks no longer agree. Raised on every rank alike."""


class StoppedBySignalError(Exception):
    """The run was asked to stop, and the checkpoint that it goes on from is written. Raised on every rank."""


def first_sentence(error: Exception) -> str:
    """What an error says, without the hundreds of names that Transformers lists where it does not know a model."""
    return str(error).split("Model type should be one of")[0].strip() or type(error).__name__


def shorten_list(names: list[str]) -> str:
    """The first four, and how many more there are."""
    names = list(dict.fromkeys(name.replace(".base_layer", "") for name in names))  # PEFT nests the experts' layers
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
