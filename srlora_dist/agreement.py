"""Compares between switches what ranks hold copies of, on request: ``srlora.agreement_every``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from srlora_dist.checkpoint.training_state import trained_parameters
from srlora_dist.errors import RunStoppedError
from srlora_dist.layers.digest import digest_run
from srlora_dist.storage.base import Storage


def require_agreement(model: nn.Module, storage: Storage, num_steps: int) -> bool:
    """Compare trained parameters, their moments under DDP, and the weights that SRLoRA edits or what stands for it.

    Args:
        model: The prepared model.
        storage: How it is held.
        num_steps: Optimizer steps that were done, for the message.

    Returns:
        Whether there are copies at all.

    Collective: see ``Storage.settle``; one all-reduce of 16 bytes per tensor.

    Raises:
        RunStoppedError: Some rank holds something else; the message names the first such tensor.
    """
    storage.settle()
    named = list(_copies(model, storage))
    number = storage.find_difference([digest_run(copy) for _, copy in named])
    if number is not None:
        raise RunStoppedError(
            f"after step {num_steps} the ranks hold different values of {named[number][0]}; they have drifted "
            "apart, so the run stops. Restart from the last good checkpoint"
        )
    return bool(named)


def _copies(model: nn.Module, storage: Storage) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trained_parameters(model).items():
        for copy in storage.copies([parameter]):
            yield name, copy
    for number, site in enumerate(storage.sites):
        for copy in storage.weight_copies(number):
            yield f"the weight of {site.name}, or of what stands for its change", copy
