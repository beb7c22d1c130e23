"""An earlier run in the output folder: set aside while it is not yet certain that a new one can begin."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from srlora_dist.checkpoint.format import checkpoint_folders
from srlora_dist.checkpoint.ledger import entry_paths

ASIDE, OWN_LEDGER = ".earlier", "ledger_dir"


class EarlierRun:
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
