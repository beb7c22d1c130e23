"""What an earlier run has left is moved to a numbered folder, whole, whatever interrupts the move."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import yaml

from srlora_dist.checkpoint.files import write_folder
from srlora_dist.training.earlier_run import make_room

FOREIGN = {Path("notes.txt"): b"mine", Path("figures", "mine.png"): b"mine"}
LEFT = ("config.yaml", "metrics.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
LEFT += ("tensorboard/events.out.tfevents.1", "ledger/switch-00000.safetensors", "summary.json")


def put(folder: Path, name: str, content: str = "of the run") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The output folder of a run that has ended, in which there are other files too."""
    folder = tmp_path / "runs" / "mine"
    for name in LEFT:
        put(folder, name)
    for name in FOREIGN:
        put(folder, str(name), "mine")
    for step in (2, 4):
        about = {"format": "srlora-checkpoint-2", "step": step}
        write_folder(folder / "checkpoints" / f"step-{step}", lambda place: put(place, "state.json"), about)
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_moved_and_other_files_stay(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = content(folder)
    with caplog.at_level(logging.INFO):
        make_room(folder, None)
    assert content(folder) == FOREIGN
    assert content(folder.with_name("mine.1")) | FOREIGN == before
    assert f"was moved to {folder}.1" in caplog.text
    put(folder, "summary.json", "of the next run")
    make_room(folder, None)
    assert content(folder.with_name("mine.2")) == {Path("summary.json"): b"of the next run"}
    assert content(folder.with_name("mine.1")) | FOREIGN == before


def test_nothing_there_makes_no_folder(tmp_path: Path) -> None:
    make_room(tmp_path / "new", None)
    assert list(tmp_path.iterdir()) == []


def test_what_a_failed_start_has_left_is_removed(folder: Path) -> None:
    make_room(folder, None)
    for name in ("config.yaml", "tensorboard/events.out.tfevents.2", "ledger/switch-00000.safetensors"):
        put(folder, name)
    make_room(folder, None)
    assert content(folder) == FOREIGN
    assert not folder.with_name("mine.2").exists()


@pytest.mark.parametrize("proof", ["checkpoints", "adapter/adapter_config.json"])
def test_a_run_that_never_ended_is_kept_too(proof: str, folder: Path) -> None:
    (folder / "summary.json").unlink()
    if proof != "checkpoints":
        (folder / "checkpoints").rename(folder.with_name("elsewhere"))
    else:
        (folder / "adapter" / "adapter_config.json").unlink()
    before = content(folder)
    make_room(folder, None)
    assert content(folder.with_name("mine.1")) | FOREIGN == before


@pytest.mark.parametrize("same", [True, False])
def test_a_ledger_elsewhere_goes_along_if_it_is_that_of_the_new_run(same: bool, folder: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    put(ledger, "switch-00000.safetensors", "elsewhere")
    (folder / "ledger" / "switch-00000.safetensors").unlink()
    put(folder, "config.yaml", yaml.safe_dump({"srlora": {"ledger_dir": str(ledger)}}))
    make_room(folder, str(ledger) if same else str(tmp_path / "other"))
    assert (ledger / "switch-00000.safetensors").exists() is not same
    moved = folder.with_name("mine.1") / "ledger" / "switch-00000.safetensors"
    assert moved.exists() is same


class KilledError(BaseException):
    """In place of a kill."""


@pytest.mark.parametrize("has_ended", [True, False])
def test_an_interrupted_move_loses_nothing(has_ended: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed before its first rename, the next one before its second rename, and so on."""
    if not has_ended:
        (folder / "summary.json").unlink()
    before, num_kills, rename = content(folder), 0, os.rename

    def deadly(*args: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > num_kills:
            raise KilledError
        rename(*args)

    monkeypatch.setattr(os, "rename", deadly)
    monkeypatch.setattr(Path, "rename", lambda self, target: (deadly(self, target), Path(target))[1])
    while True:
        num_calls = 0
        try:
            make_room(folder, None)
            break
        except KilledError:
            num_kills += 1
            there = folder / "checkpoints"
            assert not there.exists() or len(list(there.iterdir())) == 2
            assert (folder / "summary.json").exists() or not has_ended or content(folder) == FOREIGN
    assert num_kills > 3
    assert content(folder) == FOREIGN
    moved = [path for place in folder.parent.glob("mine.*") for path in content(place)]
    assert sorted(moved) == sorted(before.keys() - FOREIGN.keys())
    assert not list(folder.parent.glob(".*"))


def test_a_folder_that_cannot_be_moved_is_left_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(folder)

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ValueError, match=r"cannot be moved to .*mine\.1 .*cross-device.*choose another --output_dir"):
        make_room(folder, None)
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
