"""The ledger on disk: shared with checkpoints, owned by one run, and complete also where the disk was full."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import srlora_dist.checkpoint.files
import srlora_dist.checkpoint.ledger_files
from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.export import export_checkpoint
from srlora_dist.checkpoint.format import Checkpoint
from tests.ranks.engines import make_batch, make_net
from tests.unit.checkpoint.test_folder_lock import HOLD
from tests.unit.checkpoint.test_save import flip, resume
from tests.unit.method.test_switcher import bound, take_steps

NUM_STEPS = 20


def start(tmp_path: Path, name: str, if_disk_full: str = "stop"):
    """A run whose switches come after steps 6 and 12, with its ledger in a folder."""
    model = make_net()
    config = SRLoRAConfig(svd_cache=str(tmp_path / "svd"), target_rank=10, ledger_dir=str(tmp_path / name))
    switcher = Switcher(model, config, NUM_STEPS, if_disk_full=if_disk_full)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    switcher.bind(model, optimizer)
    return model, optimizer, switcher


@contextlib.contextmanager
def full_disk(most: int = 100) -> Iterator[None]:
    """Writing fails beyond so many bytes a file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_same_tensors(folder: Path, expected: Path, pattern: str) -> None:
    names = sorted(path.name for path in folder.glob(pattern))
    assert names == sorted(path.name for path in expected.glob(pattern)) != []
    for name in names:
        mine, theirs = load_file(folder / name), load_file(expected / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_checkpoints_share_the_entries_and_hash_each_once(tmp_path, monkeypatch) -> None:
    hashed: list[Path] = []

    def note(path: Path) -> dict[str, object]:
        hashed.append(path)
        return describe(path)

    describe = srlora_dist.checkpoint.files.describe
    model, optimizer, switcher = start(tmp_path, "ledger")
    take_steps(model, optimizer, switcher, 7)
    for module in (srlora_dist.checkpoint.files, srlora_dist.checkpoint.ledger_files):
        monkeypatch.setattr(module, "describe", note)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    assert {path.name for path in hashed} >= {"trainable.safetensors", "state.json"}
    assert not [path for path in hashed if path.name.startswith("switch-")]
    take_steps(model, optimizer, switcher, 6)
    assert len([path for path in hashed if path.name.startswith("switch-")]) == 1
    switcher.save_checkpoint(tmp_path / "checkpoints")
    assert len([path for path in hashed if path.name.startswith("switch-")]) == 1
    for name in ("switch-00000.safetensors", "switch-00001.safetensors"):
        places = [tmp_path / "ledger", *(tmp_path / "checkpoints" / f"step-{n}" / "ledger" for n in (7, 13))]
        assert len({(place / name).stat().st_ino for place in places}) == 1
    hashed.clear()
    resumed = resume(tmp_path, tmp_path / "checkpoints" / "step-13", ledger_dir=str(tmp_path / "ledger"))
    assert len([path for path in hashed if path.name.startswith("switch-")]) == 3  # all are compared
    resumed.save_checkpoint(tmp_path / "again")
    assert len([path for path in hashed if path.name.startswith("switch-")]) == 3
    assert (tmp_path / "again/step-13/ledger/switch-00002.safetensors").stat().st_nlink == 3


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_where_links_are_refused_the_entries_are_copied(tmp_path, monkeypatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    model, optimizer, switcher = start(tmp_path, "ledger")
    take_steps(model, optimizer, switcher, 7)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    saved = tmp_path / "checkpoints" / "step-7"
    assert (saved / "ledger/switch-00001.safetensors").stat().st_nlink == 1
    assert resume(tmp_path, saved, ledger_dir=str(tmp_path / "other")).num_switches == 2
    assert_same_tensors(tmp_path / "other", tmp_path / "ledger", "*")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system")
def test_checkpoints_may_lie_on_another_file_system(tmp_path) -> None:
    model, optimizer, switcher = start(tmp_path, "ledger")
    take_steps(model, optimizer, switcher, 7)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        switcher.save_checkpoint(other)
        assert resume(tmp_path, Path(other)).num_switches == 2
        switcher.close()


def test_damage_of_a_shared_entry_is_noticed_by_whoever_reads_it(tmp_path) -> None:
    model, optimizer, switcher = start(tmp_path, "ledger")
    take_steps(model, optimizer, switcher, 7)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    flip(tmp_path / "ledger", "switch-00000.safetensors")
    with pytest.raises(ValueError, match="switch-00000.safetensors has another checksum"):
        Checkpoint(tmp_path / "checkpoints" / "step-7")
    for write in (
        lambda: switcher.export(tmp_path / "adapter", is_last=False),
        lambda: switcher.save_checkpoint(tmp_path / "more"),
    ):
        with pytest.raises(ValueError, match="switch-00000.safetensors of the ledger was changed since"):
            write()
    assert not (tmp_path / "adapter").exists()
    assert list((tmp_path / "more").iterdir()) == []
    (tmp_path / "ledger" / "switch-00000.safetensors").unlink()
    with pytest.raises(ValueError, match="00000.safetensors: was it removed"):
        switcher.save_checkpoint(tmp_path / "more")


def test_an_entry_that_is_only_touched_is_still_the_same(tmp_path) -> None:
    model, optimizer, switcher = start(tmp_path, "ledger")
    os.utime(tmp_path / "ledger" / "switch-00000.safetensors", (1, 1))
    switcher.save_checkpoint(tmp_path / "checkpoints")
    assert Checkpoint(tmp_path / "checkpoints" / "step-0").step == 0


@pytest.mark.parametrize("if_disk_full", ["stop", "go_on"])
def test_an_entry_that_cannot_be_written_is_kept_and_written_later(tmp_path, caplog, if_disk_full: str) -> None:
    """Also where the loop catches the error and goes on."""
    whole = start(tmp_path, "whole")
    take_steps(*whole, NUM_STEPS)
    whole[2].export(tmp_path / "expected")
    model, optimizer, switcher = start(tmp_path, "ledger", if_disk_full)
    take_steps(model, optimizer, switcher, 5)
    stops = pytest.raises(ValueError, match="cannot append switch 1 to the ledger: .*[Ff]ile too large")
    with full_disk(), stops if if_disk_full == "stop" else contextlib.nullcontext():
        one_step(model, optimizer, switcher, 5)
    if if_disk_full == "go_on":
        assert "going on with 1 entries of the ledger in memory" in caplog.text
    assert switcher.num_switches == 2
    assert [path.name for path in (tmp_path / "ledger").iterdir()] == ["switch-00000.safetensors"]
    with full_disk(1 << 20):
        switcher.ledger.folder.rename(tmp_path / "away")  # and it stays away while a checkpoint is written elsewhere
        (tmp_path / "ledger").touch()
        with pytest.raises(ValueError, match="was it removed"):
            switcher.save_checkpoint(tmp_path / "checkpoints")
        (tmp_path / "ledger").unlink()
        (tmp_path / "away").rename(tmp_path / "ledger")
    for step in range(6, NUM_STEPS):
        one_step(model, optimizer, switcher, step)
    switcher.export(tmp_path / "adapter")
    assert_same_tensors(tmp_path / "adapter", tmp_path / "expected", "*.safetensors")
    assert_same_tensors(tmp_path / "ledger", tmp_path / "whole", "*")


def one_step(model, optimizer, switcher, step: int) -> None:
    x, y = make_batch(step)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    switcher.step()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_on_a_really_full_file_system_nothing_is_lost(tmp_path) -> None:
    (tmp_path / "small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "small"], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        whole = start(tmp_path, "whole")
        take_steps(*whole, NUM_STEPS)
        whole[2].export(tmp_path / "expected")
        model, optimizer, switcher = start(tmp_path, "small/ledger", "go_on")
        with (tmp_path / "small" / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        take_steps(model, optimizer, switcher, NUM_STEPS)
        switcher.save_checkpoint(tmp_path / "checkpoints")  # on another disk: there it is whole
        switcher.export(tmp_path / "adapter")
        assert_same_tensors(tmp_path / "adapter", tmp_path / "expected", "*.safetensors")
        saved = Checkpoint(tmp_path / "checkpoints" / "step-20")
        assert_same_tensors(saved.folder / "ledger", tmp_path / "whole", "*")
        export_checkpoint(saved, tmp_path / "saved")
        assert_same_tensors(tmp_path / "saved", tmp_path / "expected", "*.safetensors")
        with pytest.raises(ValueError, match="cannot write the checkpoint of step 20 to"):
            switcher.save_checkpoint(tmp_path / "small" / "checkpoints")
        left = [path.name for path in (tmp_path / "small").rglob("*") if not path.name.endswith("srlora_lock")]
        assert sorted(left) == ["checkpoints", "filling", "ledger", "switch-00000.safetensors"]
        (tmp_path / "small" / "filling").unlink()
        switcher.save_checkpoint(tmp_path / "small" / "checkpoints")
        assert_same_tensors(tmp_path / "small" / "ledger", tmp_path / "whole", "*")
        switcher.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path / "small"], check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_checkpoints_that_can_only_be_read_are_resumed(tmp_path) -> None:
    (tmp_path / "readable").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "readable"]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        model, optimizer, switcher = start(tmp_path, "ledger")
        take_steps(model, optimizer, switcher, 7)
        switcher.save_checkpoint(tmp_path / "readable")
        (tmp_path / "readable" / ".step-9.srlora_tmp").mkdir()  # that cannot be removed
        switcher.close()
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "readable"], check=True)
        resumed = resume(tmp_path, tmp_path / "readable", ledger_dir=str(tmp_path / "other"))
        assert resumed.num_switches == 2
        with pytest.raises(ValueError, match="cannot write the checkpoint of step 7 to .*Read-only"):
            resumed.save_checkpoint(tmp_path / "readable")
        resumed.save_checkpoint(tmp_path / "checkpoints")
        assert Checkpoint(tmp_path / "checkpoints" / "step-7").step == 7
    finally:
        subprocess.run(["umount", "-l", tmp_path / "readable"], check=False)


def test_what_another_run_writes_is_left_alone(tmp_path) -> None:
    """Its ledger, which a resume would have removed, and its checkpoints."""
    model, optimizer, switcher = start(tmp_path, "mine")
    switcher.save_checkpoint(tmp_path / "checkpoints")
    switcher.close()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "switch-00000.safetensors").write_bytes(b"theirs")
    (tmp_path / "checkpoints" / ".step-9.srlora_tmp").mkdir()  # being written
    code = HOLD.replace("print", "more = module.FolderLock(sys.argv[2], 'checkpoints', '', 0)\nprint")
    code = code.replace("exec(sys.argv[2])", "")
    program = [sys.executable, "-c", code, str(tmp_path / "theirs"), str(tmp_path / "checkpoints")]
    other = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    who = f"is in use by process {other.pid} on host"
    with pytest.raises(ValueError, match=f"theirs {who}.*choose another srlora.ledger_dir"):
        bound(tmp_path, target_rank=10, ledger_dir=str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match=f"theirs {who}"):
        resume(tmp_path, tmp_path / "checkpoints" / "step-0", ledger_dir=str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match=f"checkpoints {who}.*name one checkpoint"):
        resume(tmp_path, tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=f"checkpoints {who}.*choose another one"):
        switcher.save_checkpoint(tmp_path / "checkpoints")
    assert (tmp_path / "theirs" / "switch-00000.safetensors").read_bytes() == b"theirs"
    assert (tmp_path / "checkpoints" / ".step-9.srlora_tmp").exists()
    other.communicate()
    assert resume(tmp_path, tmp_path / "checkpoints").num_switches == 1
    assert not (tmp_path / "checkpoints" / ".step-9.srlora_tmp").exists()


def test_the_folder_may_be_relative_and_the_process_move(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer, switcher = bound(Path(), target_rank=10, ledger_dir="ledger")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    take_steps(model, optimizer, switcher, 20)
    switcher.export(tmp_path / "adapter")
    assert len([*(tmp_path / "ledger").iterdir()]) == 3
    assert [*(tmp_path / "elsewhere").iterdir()] == []
