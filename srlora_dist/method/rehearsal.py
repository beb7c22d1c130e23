"""Checks at ``bind`` that the optimizer can be reset and saved, so that no run fails at its first checkpoint."""

from __future__ import annotations

import warnings

from torch import nn

from srlora_dist.checkpoint.training_state import trained_parameters
from srlora_dist.storage.base import Storage
from srlora_dist.storage.factor_spans import local_part
from srlora_dist.storage.optimizer_state import require_resettable
from srlora_dist.storage.optimizer_trial import try_state


def rehearse(model: nn.Module, storage: Storage, optimizer_reset: str, will_save: bool) -> None:
    """Refuse what a switch could not reset, and what a checkpoint could not hold.

    Args:
        model: The prepared model.
        storage: How it is held.
        optimizer_reset: ``srlora.optimizer_reset``.
        will_save: Whether the run writes checkpoints; else an optimizer whose state they cannot hold gets a warning.

    Collective: one all-reduce of 8 bytes; after a failure also the messages.

    Raises:
        ValueError: The optimizer lacks a trained parameter, which is named, or its state does not permit the reset or
            checkpoints. Raised on every rank.
    """
    error, problem = None, None
    try:
        owners = _stepped(model, storage)
        tried = try_state(storage.optimizer, owners)
        problem = tried.problem() if tried is not None else None
        if problem is not None and will_save:  # another reset would not help
            raise ValueError(f"{problem}, or save none")
        require_resettable(storage.optimizer, optimizer_reset, tried.iterates() if tried is not None else [])
    except ValueError as failure:
        error = failure
    storage.raise_together(error)
    if problem is not None:
        warnings.warn(f"{problem}; save_checkpoint() will be refused", stacklevel=4)


def _stepped(model: nn.Module, storage: Storage) -> list:
    """The tensors that this rank's optimizer steps, one for each trained parameter.

    Raises:
        ValueError: The optimizer lacks a parameter; the message has its name.
    """
    owners = []
    for name, parameter in trained_parameters(model).items():
        try:
            owners.append(local_part(storage.owned_span(parameter).owner))
        except ValueError as error:
            raise ValueError(f"{name} is trained, but {error}") from error
    return owners
