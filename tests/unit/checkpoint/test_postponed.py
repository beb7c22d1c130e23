"""What a full disk refuses is written later, in order and whole; what was there before stays until then."""

from __future__ import annotations

from pathlib import Path

import pytest

from srlora_dist.checkpoint.files import write_files
from srlora_dist.checkpoint.postponed import Postponed
from tests.unit.checkpoint.test_ledger import assert_same_tensors, full_disk, start
from tests.unit.method.test_switcher import take_steps


def files(letter: str) -> dict:
    return {name: lambda path: path.write_text(letter * 300) for name in ("weights", "config")}


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path) -> None:
    write_files(tmp_path, files("a"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_files(tmp_path, files("b") | {"config": fail})
    assert content(tmp_path) == {"weights": "a" * 300, "config": "a" * 300}


def test_a_kill_between_two_renames_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch) -> None:
    write_files(tmp_path, files("a"))
    replace, calls = Path.replace, iter(range(9))

    def killed(self: Path, target: Path) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, files("b"))
    assert content(tmp_path) == {"weights": "b" * 300}


def test_what_waits_is_written_when_there_is_room(tmp_path, caplog) -> None:
    postponed = Postponed(goes_on=True)
    log, adapter = tmp_path / "metrics.jsonl", tmp_path / "adapter"
    postponed.append(log, "first\n")
    postponed.put(adapter, files("a"))
    with full_disk(10):
        for letter in "bc":
            postponed.append(log, f"{letter}\n" * 3)
            postponed.put(adapter, files(letter))
        assert log.read_text() == "first\n"
        assert content(adapter) == {"weights": "a" * 300, "config": "a" * 300}
        assert postponed.waits_for(adapter)
        with pytest.raises(ValueError, match="adapter, .*metrics.jsonl cannot be written and what is there is older"):
            postponed.require_written()
    assert "going on with 6 lines" in caplog.text
    assert "going on with the files of" in caplog.text
    postponed.require_written()
    assert not postponed.waits_for(adapter)
    assert log.read_text() == "first\n" + "b\n" * 3 + "c\n" * 3
    assert content(adapter) == {"weights": "c" * 300, "config": "c" * 300}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "metrics.jsonl"]


def test_a_run_that_stops_is_told_at_once(tmp_path) -> None:
    postponed = Postponed(goes_on=False)
    with full_disk(10), pytest.raises(OSError, match="[Ff]ile too large"):
        postponed.put(tmp_path / "adapter", files("a"))
    with full_disk(10), pytest.raises(OSError, match="[Ff]ile too large"):
        postponed.append(tmp_path / "log", "more than ten bytes\n")
    postponed.require_written()
    assert content(tmp_path / "adapter") == {}
    assert (tmp_path / "log").read_text() == ""


def test_an_adapter_that_waits_is_that_of_its_step_and_the_one_before_stays_whole(tmp_path) -> None:
    model, optimizer, switcher = start(tmp_path, "ledger", "go_on")
    switcher.export(tmp_path / "adapter", is_last=False)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    before = {name: (tmp_path / "adapter" / name).read_bytes() for name in names}
    take_steps(model, optimizer, switcher, 7)
    switcher.export(tmp_path / "expected", is_last=False)
    postponed = Postponed(goes_on=True)
    with full_disk():
        with pytest.raises(ValueError, match="cannot write the adapter to"):
            switcher.export(tmp_path / "adapter", is_last=False)
        switcher.export(tmp_path / "adapter", is_last=False, put=postponed.put)
        take_steps(model, optimizer, switcher, 9)
        with pytest.raises(ValueError, match="cannot write the ledger"):
            switcher.write_ledger()
        assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == names
        assert {name: (tmp_path / "adapter" / name).read_bytes() for name in names} == before
    postponed.require_written()
    switcher.write_ledger()
    assert_same_tensors(tmp_path / "adapter", tmp_path / "expected", "*.safetensors")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == names
    for name in names[:2]:
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert len([*(tmp_path / "ledger").iterdir()]) == switcher.num_switches == 3
