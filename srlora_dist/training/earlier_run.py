"""Makes room for a new run: what an earlier run has left in the output folder moves to ``<output_dir>.1`` and so on."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from srlora_dist.checkpoint.format import checkpoint_folders
from srlora_dist.checkpoint.ledger_files import entry_paths

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
WRITTEN_FILES = (
    "metrics.jsonl",
    "switches.jsonl",
    "findings.jsonl",
    "figures/loss.png",
    "figures/active_intervals.png",
    "figures/interval_lengths.png",
    "tensorboard/events.out.tfevents.*",
    "ledger/switch-*.safetensors",
    "ledger/.switch-*.srlora_part",
    *(
        f"{folder}/{name}"
        for folder in ("adapter", "adapter_last")
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md")
    ),
    "config.yaml",
    SUMMARY,
)
"""Patterns of the files that a run writes beside its checkpoints. Other files in the folder are never touched.

They are moved in this order. The summary comes last: without it, what is left would count as a run that can go on. The
configuration comes before it, because it says where the ledger is.
"""
PROOFS = ("adapter/adapter_config.json", "adapter_last/adapter_config.json", SUMMARY)
"""A run that has left one of these or a checkpoint is worth keeping."""


def make_room(folder: Path, ledger_dir: str | None) -> None:
    """Move what an earlier run has left in the output folder to a folder beside it, the first number that is free.

    A run that ended before it had written a checkpoint or an adapter has left nothing to use: its files are removed. If
    this process is killed on the way, the next call moves the rest, to the next number.

    Args:
        folder: The output folder.
        ledger_dir: ``srlora.ledger_dir`` of the new run. If the earlier run had the same one, its ledger moves too.

    Raises:
        ValueError: The files cannot be moved; the message names the remedy.
    """
    folder = folder.resolve()
    moving = folder.with_name(f".{folder.name}.moving")
    left = _Leftovers(checkpoint_folders(folder / CHECKPOINTS), _own_ledger(folder, ledger_dir), [*_written(folder)])
    if moving.exists():
        moving.rename(_next_place(folder))
    elif not left.checkpoints and not any((folder / name).exists() for name in PROOFS):
        for path in [*left.ledger, *left.files]:
            _remove(path)
        return
    if not any(left):
        return
    place = _next_place(folder)
    try:
        _fill(moving, left, folder)
        moving.rename(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            moving.rmdir()
        raise ValueError(
            f"the earlier run in output_dir {folder} cannot be moved to {place} ({error}): choose another --output_dir"
        ) from error
    logger.info("the earlier run in %s was moved to %s", folder, place)


class _Leftovers(NamedTuple):
    """What an earlier run has left."""

    checkpoints: list[Path]
    ledger: list[Path]
    files: list[Path]


def _fill(moving: Path, left: _Leftovers, folder: Path) -> None:
    """Move it all into a new folder: the checkpoints first and at once, so that half of a run is never resumed."""
    moving.mkdir()
    if left.checkpoints:
        (folder / CHECKPOINTS).rename(moving / CHECKPOINTS)
    for path in left.ledger:
        (moving / "ledger").mkdir(exist_ok=True)
        shutil.move(path, moving / "ledger")  # maybe from another file system
    for path in left.files:
        target = moving / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


def _next_place(folder: Path) -> Path:
    places = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return next(place for place in places if not place.exists())


def _written(folder: Path) -> Iterator[Path]:
    """The files of a run, in the order of the patterns."""
    for pattern in WRITTEN_FILES:
        yield from folder.glob(pattern)


def _own_ledger(folder: Path, ledger_dir: str | None) -> list[Path]:
    """The entries in ``ledger_dir``, if the earlier run in the folder had chosen that one too and it is elsewhere."""
    try:
        theirs = yaml.safe_load((folder / "config.yaml").read_text())["srlora"]["ledger_dir"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    is_inside = ledger_dir is None or Path(ledger_dir).resolve() == folder / "ledger"
    return [] if is_inside or theirs != ledger_dir else entry_paths(Path(ledger_dir))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
