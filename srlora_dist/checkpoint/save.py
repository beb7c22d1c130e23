"""Saves a run as a checkpoint, and opens a checkpoint on all ranks; the same for every method of training."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from torch import Tensor, nn

from srlora_dist.checkpoint.export import exported_parts
from srlora_dist.checkpoint.export_parts import ExportParts
from srlora_dist.checkpoint.files import MANIFEST, clean_up
from srlora_dist.checkpoint.folder_lock import HeldFolders
from srlora_dist.checkpoint.format import (
    LEDGER,
    NOT_TRAINED,
    Checkpoint,
    describe_sites,
    find_checkpoint,
    write_checkpoint,
)
from srlora_dist.checkpoint.ledger import Ledger
from srlora_dist.checkpoint.training_state import gather_training_state
from srlora_dist.storage.base import Storage


def save_run(
    parent: Path,
    model: nn.Module,
    storage: Storage,
    parts: ExportParts,
    *,
    digests: list[int],
    state: dict[str, object],
    tensors: dict[str, dict[str, Tensor]],
    ledger: Ledger | None,
    folders: HeldFolders | None = None,
) -> int | None:
    """Write ``step-N`` into a folder of checkpoints.

    Args:
        parent: The folder of checkpoints.
        model: The prepared model.
        storage: How the ranks hold the model.
        parts: What is exported.
        digests: Digest of each site's untouched W.
        state: Further entries of ``state.json``; ``step`` names the checkpoint.
        tensors: Further tensors by file and name, on rank 0.
        ledger: The ledger on rank 0; None on the other ranks, and in a run without switches.
        folders: Locks the parent against other processes; None if it is locked already.

    Returns:
        The size in bytes on rank 0; None on the other ranks.

    Collective: every rank must call it; see :func:`gather_training_state` and :func:`exported_parts`.

    Raises:
        ValueError: Rank 0 could not write, the optimizer's state cannot be saved, or another adapter is trained too.
            Raised on every rank.
    """
    parts.require_alone(model, storage.sites)
    about, files, adapter_config = _gather_run(model, storage, parts, digests)
    state = {**state, **about}

    def fill(folder: Path) -> dict[str, dict[str, object]]:
        adapter_config.save_pretrained(str(folder))
        known = ledger.copy_to(folder / LEDGER) if ledger is not None else {}
        return {f"{LEDGER}/{name}": about for name, about in known.items()}

    def write() -> int:
        parent.mkdir(parents=True, exist_ok=True)
        if folders is not None and folders.hold(parent, "the folder of checkpoints", "choose another one"):
            clean_up(parent)
        return write_checkpoint(parent, state, {**tensors, **files}, fill)

    return storage.on_rank_0(f"write the checkpoint of step {state['step']} to {parent}", write)


def _gather_run(
    model: nn.Module, storage: Storage, parts: ExportParts, digests: list[int]
) -> tuple[dict[str, object], dict[str, dict[str, Tensor]], PeftConfig]:
    """What the checkpoints of all runs hold: entries of ``state.json``, tensors on rank 0, the adapter's configuration.

    Collective: see :func:`gather_training_state` and :func:`exported_parts`.
    """
    storage.to_rest_layout_()
    trained, about_training = gather_training_state(model, storage, parts.buffers(model))
    about_export, not_trained, adapter_config = exported_parts(model, storage, parts)
    about = {
        **describe_sites(storage.sites, digests),
        **about_training,
        **about_export,
        "storage": storage.name,
        "world_size": storage.world_size,
    }
    return about, {**trained, NOT_TRAINED: not_trained}, adapter_config


@dataclass
class SavedRun:
    """An open checkpoint: its state on every rank, its tensors on rank 0.

    Args:
        checkpoint: The checkpoint on rank 0; None on the other ranks.
        state: Content of ``state.json``.
    """

    checkpoint: Checkpoint | None
    state: dict[str, object]

    def read(self, file: str, name: str) -> Tensor:
        """Read one tensor. Only rank 0 may call it."""
        return self.checkpoint.read(file, name)


def open_run(
    storage: Storage, source: str | Path | Checkpoint | None, folders: HeldFolders | None = None
) -> SavedRun | None:
    """Open a checkpoint for all ranks.

    Args:
        storage: How the ranks hold the model.
        source: The checkpoint, its folder, or a folder of checkpoints, of which the last good one is taken. Only rank
            0's value is used.
        folders: Locks a folder of checkpoints, because a run that goes on from there also saves there.

    Returns:
        The checkpoint, or None if the folder has none.

    Collective: two broadcasts, of the length and the content of ``state.json``.

    Raises:
        ValueError: Rank 0 cannot read it, or it is damaged. Raised on every rank.
    """

    def find() -> Checkpoint | None:
        if isinstance(source, Checkpoint):
            return source
        folder = Path(source)
        if folders is not None and not (folder / MANIFEST).exists():
            remedy = f"name one checkpoint, such as {folder / 'step-N'}, to start from it in another folder"
            if folders.hold(folder, "the folder of checkpoints", remedy):
                with contextlib.suppress(OSError):  # the folder may be read-only
                    clean_up(folder)
        return find_checkpoint(folder)

    checkpoint = storage.on_rank_0(f"open the checkpoint {source}", find)
    state = storage.broadcast_object(checkpoint.state if checkpoint is not None else None)
    return SavedRun(checkpoint, state) if state is not None else None
