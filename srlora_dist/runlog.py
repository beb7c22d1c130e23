"""What a run leaves in its output folder while it goes on: metrics, switches, the TensorBoard log, the summary."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from srlora_dist.config import RunConfig
from srlora_dist.ledger import SwitchReport

WRITTEN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "switches.jsonl",
    "summary.json",
    "figures/*.png",
    "tensorboard/events.out.tfevents.*",
    "ledger/switch-*.safetensors",
    "ledger/switch-*.tmp",
    *(
        f"{folder}/{name}"
        for folder in ("adapter", "adapter_last")
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md")
    ),
)
"""Patterns of what a run writes; nothing else in the folder is ever removed."""


class RunLog:
    """Writes into the output folder, on the main process alone.

    Args:
        folder: Made if it is not there. What an earlier run wrote to it is removed.
        config: Saved as ``config.yaml``.

    Raises:
        ValueError: The folder cannot be written.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_earlier_run(folder)
            config.save(folder / "config.yaml")
        except OSError as error:
            raise ValueError(
                f"output_dir {folder} cannot be written ({error.strerror}): choose another with --output_dir"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def metrics(self, record: dict[str, object]) -> None:
        """Append one line to ``metrics.jsonl`` and the same figures to TensorBoard."""
        self._append("metrics.jsonl", record)
        for name, value in record.items():
            if name not in ("step", "split") and value is not None:
                self._writer.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def switch(self, report: SwitchReport) -> None:
        """Append one line a site to ``switches.jsonl``."""
        for site in report.sites:
            self._append("switches.jsonl", {"step": report.step, "switch": report.switch, **site.as_dict()})
        self._writer.add_scalar("train/switch", report.switch, report.step)

    def summary(self, summary: dict[str, object]) -> None:
        """Write ``summary.json`` and close the TensorBoard log."""
        (self.folder / "summary.json").write_text(json.dumps(_finite(summary), indent=2) + "\n")
        self._writer.close()

    def _append(self, name: str, record: dict[str, object]) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(_finite(record)) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The objects of a ``.jsonl`` file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _finite(value: object) -> object:
    """NaN and infinity become null, because JSON knows neither."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove_earlier_run(folder: Path) -> None:
    for pattern in WRITTEN_FILES:
        for path in folder.glob(pattern):
            path.unlink()
