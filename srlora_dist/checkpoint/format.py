"""A portable checkpoint: a folder of safetensors and JSON that any engine resumes on any number of ranks.

It holds what the run has learnt: the trained parameters and their optimizer's moments, the moving averages, and the
ledger. It does not hold the pretrained weights; a resume applies the ledger's edits to them again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srlora_dist.checkpoint.files import (
    MANIFEST,
    folders_with_manifest,
    read_manifest,
    remove_folder,
    require_unharmed,
    write_folder,
)
from srlora_dist.layers.site import Site, describe_base

logger = logging.getLogger(__name__)

FORMAT = "srlora-checkpoint-2"
STATE, LEDGER = "state.json", "ledger"
"""The file of the run's state, and the folder of the ledger's entries."""
TRAINED, MOMENTS, BUFFERS = "trainable", "moments", "buffers"
"""Files of tensors: the trained parameters, their optimizer's moments, and the buffers that a resumed run needs."""
AVERAGES, NOT_TRAINED = "averages", "exported"
"""The moving averages of the scores, and the exported tensors that are not trained."""


class Checkpoint:
    """A checkpoint that agrees with its manifest.

    Args:
        folder: Folder of the checkpoint.

    Attributes:
        state: Content of ``state.json``.
        step: Number of optimizer steps that the run had taken.

    Raises:
        ValueError: The folder is not a checkpoint, is of another version, or is damaged. The message names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} has the format {manifest.get('format')!r}, and this version of srlora_dist reads "
                f"{FORMAT!r}: use the version that wrote it"
            )
        require_unharmed(self.folder, manifest)
        if STATE not in manifest["files"]:
            raise ValueError(f"the manifest of {self.folder} does not list {STATE}: it is not a checkpoint")
        self._listed = manifest["files"]
        try:
            self.state = json.loads((self.folder / STATE).read_text())
            self.step = int(self.state["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{self.folder / STATE} is not the state of a run ({error!r})") from error
        if manifest.get("step") != self.step:
            raise ValueError(f"the manifest of {self.folder} is of step {manifest.get('step')}, its state {self.step}")

    @property
    def ledger(self) -> list[Path]:
        """The files of the ledger in order, as the manifest lists them; none for a run without switches."""
        return list(self.listed_ledger)

    @property
    def listed_ledger(self) -> dict[Path, dict[str, object]]:
        """The files of the ledger, each with its size and checksum, which were verified when this object was made."""
        names = [name for name in sorted(self._listed) if name.startswith(f"{LEDGER}/")]
        return {self.folder / name: self._listed[name] for name in names}

    @property
    def num_bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its path in the folder, without the manifest."""
        return {name: listed["bytes"] for name, listed in self._listed.items()}

    def read(self, file: str, name: str) -> Tensor:
        """Read one tensor of a file.

        Args:
            file: Name of the file, without its ending.
            name: Name of the tensor.

        Raises:
            ValueError: There is no such tensor, or the file is not in the safetensors format.
        """
        path = f"{file}.safetensors"
        if path not in self._listed:
            raise ValueError(f"the checkpoint {self.folder} has no {path}")
        try:
            with safe_open(self.folder / path, "pt") as tensors:
                return tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.folder / path} cannot be read as safetensors ({error})") from error


def write_checkpoint(
    parent: Path,
    state: dict[str, object],
    tensors: dict[str, dict[str, Tensor]],
    fill: Callable[[Path], dict[str, dict[str, object]]],
) -> int:
    """Write ``step-N`` into the folder of a run's checkpoints, whole or not at all.

    Args:
        parent: Folder of the run's checkpoints.
        state: Content of ``state.json``; ``step`` names the folder.
        tensors: The tensors by file and name. A file without tensors is left out.
        fill: Writes further files into the given folder, and returns what it knows about them, as in
            :func:`~srlora_dist.checkpoint.files.write_folder`.

    Returns:
        The size of the files, in bytes.

    Raises:
        OSError: The checkpoint could not be written. Earlier checkpoints are still there.
    """

    def write(folder: Path) -> dict[str, dict[str, object]]:
        for file, named in tensors.items():
            if named:
                save_file({name: t.contiguous() for name, t in named.items()}, folder / f"{file}.safetensors")
        (folder / STATE).write_text(json.dumps(state) + "\n")
        return fill(folder)

    folder = parent / f"step-{state['step']}"
    try:
        write_folder(folder, write, {"format": FORMAT, "step": state["step"]})
    except SafetensorError as error:  # it reports a full disk in its own way
        raise OSError(str(error)) from error
    return sum(listed["bytes"] for listed in read_manifest(folder)["files"].values())


def find_checkpoint(parent: Path) -> Checkpoint | None:
    """The last good checkpoint in a folder, by the steps in the manifests. Damaged ones are skipped with a warning.

    Args:
        parent: A folder of checkpoints, or a checkpoint itself.

    Returns:
        The checkpoint, or None if the folder has none.

    Raises:
        ValueError: There are checkpoints, but all of them are damaged.
    """
    if (parent / MANIFEST).exists():
        return Checkpoint(parent)
    problems = []
    for folder in sorted(folders_with_manifest(parent), key=_step, reverse=True):
        try:
            return Checkpoint(folder)
        except (ValueError, OSError) as error:
            logger.warning("a checkpoint cannot be used, trying the one before it: %s", error)
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"no checkpoint in {parent} can be used ({problems[0]}): restore one from a backup, or start again with "
            "--checkpoint.resume never"
        )
    return None


def checkpoint_folders(parent: Path) -> list[Path]:
    """The checkpoints in a folder in order of their steps, including damaged ones."""
    return sorted((folder for folder in folders_with_manifest(parent) if _step(folder) >= 0), key=_step)


def remove_checkpoints(parent: Path, keep: set[int], newest: int) -> None:
    """Remove the checkpoints of a folder, except those of the steps ``keep`` and the ``newest`` last ones."""
    folders = checkpoint_folders(parent)
    for folder in folders[: max(0, len(folders) - newest)]:
        if _step(folder) not in keep:
            remove_folder(folder)


def remove_later_checkpoints(parent: Path, step: int) -> None:
    """Remove the checkpoints after a step, which a run that resumes from that step will write again."""
    for folder in checkpoint_folders(parent):
        if _step(folder) > step:
            remove_folder(folder)


def describe_sites(sites: list[Site], digests: list[int]) -> dict[str, object]:
    """The entries of ``state.json`` about the sites and their pretrained weights."""
    return {
        "weights": describe_base(sites),
        "sites": [
            {
                "name": site.name,
                "shape": list(site.shape),
                "rank": site.rank,
                "scale": site.scale,
                "target_rank": site.state.target_rank,
                "fused_rank": site.fused_rank,
                "num_taken": site.state.num_taken,
                "held": site.state.held,
                "born": site.state.born,
                "left_out": site.state.left_out,
                "digest": f"{digest:016x}",
            }
            for site, digest in zip(sites, digests, strict=True)
        ],
    }


def require_same_base(state: dict[str, object], sites: list[Site], digests: list[int]) -> None:
    """Check that a checkpoint belongs to this model, this adapter and these pretrained weights.

    Raises:
        ValueError: It does not. The message names the first difference and the remedy.
    """
    now = describe_sites(sites, digests)
    theirs, ours = ([site["name"] for site in what["sites"]] for what in (state, now))
    for name in [*theirs, *ours]:
        if (name in theirs) != (name in ours):
            where = "the checkpoint but not in the model" if name in theirs else "the model but not in the checkpoint"
            raise ValueError(
                f"the layer {name} is adapted in {where}: resume with the model and lora.target_modules of that run"
            )
    if state["weights"] != now["weights"]:
        raise ValueError(
            f"the checkpoint belongs to pretrained weights in {state['weights']}, and these are in {now['weights']}: "
            "what was fused into those does not fit these, so set model.dtype and model.quantization as in that run"
        )
    remedies = {
        "shape": "resume with the same model",
        "rank": "set lora.rank to that of the checkpoint",
        "scale": "set lora.alpha to that of the checkpoint",
        "target_rank": "set srlora.target_rank to that of the checkpoint",
        "fused_rank": "set srlora.fusion and srlora.fused_rank to those of the checkpoint",
        "digest": "the pretrained weights are others, or were edited already, so load the untouched model of that run",
    }
    for saved, live in zip(state["sites"], now["sites"], strict=True):
        for key, remedy in remedies.items():
            if saved[key] != live[key]:
                raise ValueError(
                    f"the checkpoint has {key} {saved[key]} at {saved['name']}, and the model {live[key]}: {remedy}"
                )


def _step(folder: Path) -> int:
    """The step in a checkpoint's manifest; -1 if the folder is not a checkpoint."""
    try:
        manifest = read_manifest(folder)
        return int(manifest["step"]) if str(manifest["format"]).startswith("srlora-checkpoint") else -1
    except (ValueError, KeyError, TypeError, OverflowError):
        return -1
