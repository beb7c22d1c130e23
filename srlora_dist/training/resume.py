"""Which checkpoint a run goes on from, and whether it is a checkpoint of the same run."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from srlora_dist.checkpoint.files import clean_up
from srlora_dist.checkpoint.folder_lock import was_restarted
from srlora_dist.checkpoint.format import Checkpoint, checkpoint_folders, find_checkpoint
from srlora_dist.checkpoint.ledger_files import entry_paths
from srlora_dist.config.method import DEFAULT_TARGET_RANK
from srlora_dist.config.option import flatten, free_on_resume
from srlora_dist.config.run import RunConfig

logger = logging.getLogger(__name__)

FREE = free_on_resume(RunConfig)
"""Options that may be others when a run is resumed: where things are, on what it runs, how often it reports. The
pretrained weights are compared by their digests."""


def checkpoints_of(config: RunConfig) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.output_dir) / "checkpoints"


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
        config: Of this run.
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


ASIDE, OWN_LEDGER = ".earlier", "ledger_dir"


class PreviousRun:
    """What an earlier run left behind.

    Args:
        folder: The output folder.
        patterns: Of the files that a run writes, ``summary.json`` last; nothing else is ever touched.
        ledger_dir: ``srlora.ledger_dir`` of the new run. If the earlier one had the same, its ledger is there.
    """

    def __init__(self, folder: Path, patterns: tuple[str, ...], ledger_dir: str | None) -> None:
        self.folder, self.patterns, self.ledger_dir = folder, patterns, ledger_dir
        self.aside = folder / ASIDE

    def set_aside(self) -> None:
        """Move it into a hidden folder, checkpoints first and the summary last, so that no half of it is ever resumed.

        If there is one aside already, a start was interrupted: what that left behind is removed.
        """
        if self.aside.exists():
            self._remove_present()
            return
        pairs = [(path, self.aside / path.relative_to(self.folder)) for path in self._present()]
        pairs += [(path, self.aside / OWN_LEDGER / path.name) for path in self._own_ledger(self.folder)]
        # The summary goes last, and what tells where the ledger is before it.
        for path, place in sorted(pairs, key=lambda pair: pair[0].name in ("config.yaml", "summary.json")):
            _move(path, place)

    def put_back(self) -> None:
        """The new run cannot begin: restore the earlier one."""
        self._remove_present()
        for path in self._own_ledger(self.aside, self.aside / OWN_LEDGER):
            _move(path, Path(self.ledger_dir) / path.name)
        paths = [path for path in self.aside.rglob("*") if path.is_file()]
        for path in paths:
            _move(path, self.folder / path.relative_to(self.aside))
        self.discard()

    def discard(self) -> None:
        """The new run has begun: remove the earlier one."""
        shutil.rmtree(self.aside, ignore_errors=True)

    def keep(self) -> Path:
        """The new run has begun: move the earlier one to a folder beside the output folder, with a number."""
        numbers = itertools.count(1)
        place = next(p for p in (self.folder.with_name(f"{self.folder.name}.{k}") for k in numbers) if not p.exists())
        return self.aside.rename(place)

    def finished_config(self) -> dict[str, object] | None:
        """The resolved configuration of what is aside, if that had come to its end."""
        try:
            config = yaml.safe_load((self.aside / "config.yaml").read_text())
        except (OSError, yaml.YAMLError):
            return None
        return config if isinstance(config, dict) and (self.aside / "summary.json").exists() else None

    def _present(self) -> Iterator[Path]:
        yield from checkpoint_folders(self.folder / "checkpoints")
        for pattern in self.patterns:
            yield from self.folder.glob(pattern)

    def _remove_present(self) -> None:
        for path in [*self._present(), *self._own_ledger(self.folder)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _own_ledger(self, config_folder: Path, ledger: Path | None = None) -> list[Path]:
        """Entries in the ledger folder that the run whose configuration lies in a folder had chosen, as this one."""
        try:
            theirs = yaml.safe_load((config_folder / "config.yaml").read_text())["srlora"]["ledger_dir"]
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return []
        inside = self.ledger_dir is None or Path(self.ledger_dir).resolve() == (self.folder / "ledger").resolve()
        if inside or theirs != self.ledger_dir:
            return []
        return entry_paths(ledger or Path(self.ledger_dir))


def _move(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, place)
