"""Checkpoints that are damaged, forged or of another run are refused by name, and the one before is taken."""

from __future__ import annotations

import json
import logging
import pickle
import random
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from srlora_dist import SRLoRAConfig, Switcher
from srlora_dist.checkpoint.export import export_checkpoint
from srlora_dist.checkpoint.files import MANIFEST, clean_up, describe
from srlora_dist.checkpoint.format import Checkpoint, find_checkpoint, remove_checkpoints
from srlora_dist.checkpoint.random_state import random_state, restore_random_state
from tests.ranks.engines import make_net
from tests.unit.method.test_switcher import bound, take_steps, unfrozen


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with checkpoints of steps 3 and 6; the ledger of the second has two entries."""
    model, optimizer, switcher = bound(tmp_path, steps=20, target_rank=10)
    parent = tmp_path / "checkpoints"
    take_steps(model, optimizer, switcher, 3)
    switcher.save_checkpoint(parent)
    take_steps(model, optimizer, switcher, 3)
    switcher.save_checkpoint(parent, {"mine": [1, 2.5, None]})
    return parent


def resume(tmp_path: Path, checkpoint: Path, model=None, steps: int = 20, optimizer=None, **options) -> Switcher:
    model = make_net() if model is None else model
    options = {"svd_cache": str(tmp_path / "svd"), "target_rank": 10, **options}
    switcher = Switcher(model, SRLoRAConfig(**options), steps)
    optimizer = optimizer or torch.optim.AdamW
    trained = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert switcher.bind(model, trained, resume_from=checkpoint) is None
    return switcher


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """As somebody would who wants a changed folder to pass."""
    manifest = json.loads((folder / MANIFEST).read_text())
    names = [name for name in manifest["files"] if (folder / name).exists()]
    manifest["files"] = {name: describe(folder / name) for name in names}
    for key, value in changes.items():
        manifest["files" if key == "files" else key] = {**manifest["files"], **value} if key == "files" else value
    (folder / MANIFEST).write_text(json.dumps(manifest))


def cut(folder: Path) -> None:
    path = folder / "moments.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path, name: str = "trainable.safetensors") -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def climb(folder: Path) -> None:
    (folder.parent / "outside.json").write_text("{}")
    rewrite_manifest(folder, files={"../outside.json": describe(folder.parent / "outside.json")})


def absolute(folder: Path) -> None:
    rewrite_manifest(folder, files={"/etc/hosts.json": {"bytes": 1, "sha256": ""}})


def link(folder: Path) -> None:
    path = folder / "trainable.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def link_a_folder(folder: Path) -> None:
    (folder / "ledger").rename(folder.parent / "ledger")
    (folder / "ledger").symlink_to(folder.parent / "ledger")


class Bomb:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("the pickle was loaded",)


def put_a_pickle(folder: Path) -> None:
    (folder / "code.pkl").write_bytes(pickle.dumps(Bomb()))
    rewrite_manifest(folder, files={"code.pkl": describe(folder / "code.pkl")})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "moments.safetensors has"),
    "one bit": (flip, "trainable.safetensors has another checksum"),
    "one bit of the ledger": (lambda f: flip(f, "ledger/switch-00000.safetensors"), "another checksum"),
    "one bit of the state": (lambda f: flip(f, "state.json"), "state.json has another checksum"),
    "a file is missing": (lambda f: (f / "averages.safetensors").unlink(), "averages.safetensors is missing"),
    "an entry is missing": (lambda f: (f / "ledger/switch-00001.safetensors").unlink(), "00001.safetensors is missing"),
    "cut manifest": (lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:-50]), "cannot be read"),
    "empty manifest": (lambda f: (f / MANIFEST).write_bytes(b""), "cannot be read"),
    "binary manifest": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "manifest of something else": (lambda f: (f / MANIFEST).write_text("[1]"), "it has no list of files"),
    "another version": (lambda f: rewrite_manifest(f, format="srlora-checkpoint-9"), "'srlora-checkpoint-9', and this"),
    "climbing path": (climb, "'../outside.json', which is outside"),
    "absolute path": (absolute, "'/etc/hosts.json', which is outside"),
    "link": (link, "is a symbolic link"),
    "link to a folder": (link_a_folder, "is a symbolic link"),
    "pickle": (put_a_pickle, "'code.pkl', which is not one of .safetensors, .json"),
    "no state": (lambda f: ((f / "state.json").unlink(), rewrite_manifest(f)), "does not list state.json"),
    "state of something else": (
        lambda f: ((f / "state.json").write_text("[]"), rewrite_manifest(f)),
        "is not the state of a run",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage: str, saved: Path, caplog) -> None:
    break_, message = DAMAGES[damage]
    break_(saved / "step-6")
    with pytest.raises(ValueError, match="step-6") as refused:
        Checkpoint(saved / "step-6")
    assert message in str(refused.value)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(saved).step == 3
    if "manifest" not in damage:  # else it cannot be known which step it was
        assert message in caplog.text


def test_the_last_one_is_found_by_its_step_not_by_its_name(saved: Path, tmp_path) -> None:
    switcher = resume(tmp_path, saved / "step-6")
    for step in (9, 10):
        switcher.save_checkpoint(saved, step=step)
    assert find_checkpoint(saved).step == 10
    (saved / "step-10").rename(saved / "a copy")
    assert find_checkpoint(saved).step == 10
    remove_checkpoints(saved, set(), newest=2)
    assert sorted(path.name for path in saved.iterdir()) == ["a copy", "step-9"]


def test_a_file_that_the_manifest_does_not_list_is_not_read(saved: Path, tmp_path) -> None:
    entry = saved / "step-6" / "ledger" / "switch-00001.safetensors"
    (entry.parent / "switch-00002.safetensors").write_bytes(entry.read_bytes())
    assert len(Checkpoint(saved / "step-6").ledger) == 2
    assert sum(1 for _ in resume(tmp_path, saved / "step-6").ledger.entries()) == 2


def test_a_step_that_was_not_reported_cannot_be_saved(tmp_path) -> None:
    model, optimizer, switcher = bound(tmp_path, target_rank=10)
    take_steps(model, optimizer, switcher, 1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="call switcher.step\\(\\) before"):
        switcher.save_checkpoint(tmp_path / "checkpoints")


def test_the_ledger_of_the_run_is_replaced_by_that_of_the_checkpoint(saved: Path, tmp_path) -> None:
    folder = tmp_path / "ledger"
    folder.mkdir()
    for number in range(5):
        (folder / f"switch-{number:05d}.safetensors").write_bytes(b"of the future")
    switcher = resume(tmp_path, saved / "step-6", ledger_dir=str(folder))
    assert len([*folder.iterdir()]) == 2
    switcher.save_checkpoint(tmp_path / "again")
    entries = [load_file(path) for path in Checkpoint(tmp_path / "again" / "step-6").ledger]
    expected = [load_file(path) for path in Checkpoint(saved / "step-6").ledger]
    assert all(
        torch.equal(mine[key], theirs[key]) for mine, theirs in zip(entries, expected, strict=True) for key in mine
    )
    with pytest.raises(ValueError, match="is that of the checkpoint"):
        resume(tmp_path, saved / "step-6", ledger_dir=str(saved / "step-6" / "ledger"))


def test_what_a_trained_module_keeps_beside_its_parameters_comes_back(tmp_path) -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(13, 17), torch.nn.BatchNorm1d(17), torch.nn.Linear(17, 3))
        return get_peft_model(net, LoraConfig(r=4, target_modules=["0"], modules_to_save=["1"]))

    model, optimizer, switcher = bound(tmp_path, make(), target_rank=10)
    take_steps(model, optimizer, switcher, 4)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    other = make()
    resume(tmp_path, tmp_path / "checkpoints", other)
    x = torch.randn(5, 13)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_other_groups_of_parameters_are_refused_and_rates_come_back(saved: Path, tmp_path) -> None:
    model = make_net()
    switcher = Switcher(model, SRLoRAConfig(svd_cache=str(tmp_path / "svd"), target_rank=10), 20)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained[:2]}, {"params": trained[2:]}], lr=1e-2)
    with pytest.raises(ValueError, match="had 1 groups of parameters, and this one has 2"):
        switcher.bind(model, optimizer, resume_from=saved)
    model, optimizer, switcher = bound(tmp_path, target_rank=10)
    take_steps(model, optimizer, switcher, 1)
    optimizer.param_groups[0]["lr"] = 3e-3
    switcher.save_checkpoint(tmp_path / "slower")
    assert resume(tmp_path, tmp_path / "slower").storage.optimizer.param_groups[0]["lr"] == 3e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "zero_b"}, "srlora.start pissa, and this one has zero_b: set it back"),
        ({"num_switches": 1}, "srlora.num_switches None, and this one has 1: set it back"),
        ({"fusion_ratio": 0.75}, "srlora.fusion_ratio 0.5, and this one has 0.75: set it back"),
        ({"importance_window": 3}, "srlora.importance_window auto, and this one has 3: set it back"),
    ],
)
def test_other_options_are_refused(saved: Path, tmp_path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, saved / "step-6", **options)
    assert resume(tmp_path, saved / "step-6", agreement_every=2).num_steps == 6


def test_random_numbers_go_on() -> None:
    def draw() -> tuple:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)

    random.gauss(0, 1)
    state = json.loads(json.dumps(random_state()))
    expected = draw()
    restore_random_state(state)
    assert draw() == expected


def test_no_good_checkpoint_is_an_error_not_a_new_start(saved: Path) -> None:
    flip(saved / "step-3")
    flip(saved / "step-6")
    with pytest.raises(ValueError, match="no checkpoint in .* can be used .*--checkpoint.resume never"):
        find_checkpoint(saved)


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    rewrite_manifest(checkpoint)


def without(path: Path, part: str) -> None:
    tensors = {name: tensor for name, tensor in load_file(path).items() if part not in name}
    save_file(tensors, path)
    rewrite_manifest(path.parent if path.parent.name != "ledger" else path.parent.parent)


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle called safetensors": (
        lambda f: forge(f, "trainable.safetensors", pickle.dumps(Bomb())),
        "trainable.safetensors cannot be read as safetensors",
    ),
    "a pickle in the ledger": (
        lambda f: forge(f, "ledger/switch-00000.safetensors", pickle.dumps(Bomb())),
        "switch-00000.safetensors is no ledger entry",
    ),
    "a tensor is missing": (
        lambda f: without(f / "moments.safetensors", "second.lora_B"),
        "moments.safetensors cannot be read as safetensors",
    ),
    "an average is missing": (lambda f: without(f / "averages.safetensors", "first.B"), "averages.safetensors cannot"),
    "no averages": (lambda f: ((f / "averages.safetensors").unlink(), rewrite_manifest(f)), "has no averages"),
    "no ledger": (
        lambda f: ([path.unlink() for path in (f / "ledger").iterdir()], rewrite_manifest(f)),
        "checkpoint has nothing, and the run had made 2 switches",
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_passes_the_manifest_and_lacks_something_is_refused(what: str, saved: Path, tmp_path) -> None:
    break_, message = FORGED[what]
    break_(saved / "step-6")
    with pytest.raises(ValueError, match="checkpoint|step-6") as refused:
        resume(tmp_path, saved / "step-6")
    assert message in str(refused.value)


def edited() -> torch.nn.Module:
    model = make_net()
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight[3, 4] += 1e-3
    return model


OTHERS: dict[str, tuple[dict, str]] = {
    "another rank": ({"model": lambda: make_net(rank=2)}, "has rank 4 at first, and the model 2: set lora.rank"),
    "another scale": ({"model": lambda: make_net(alpha=4)}, "has scale 1.5 at first, and the model 1.0"),
    "another model": ({"model": lambda: make_net(seed=3)}, "has digest .* at first.*load the untouched model"),
    "an edited model": ({"model": edited}, "has digest .* at first.*load the untouched model"),
    "another type": ({"model": lambda: make_net().bfloat16()}, "in float32, and these are in bfloat16"),
    "other layers": ({"model": lambda: _on(["first"])}, "the layer second is adapted in the checkpoint but not in"),
    "more layers": ({"model": lambda: _on(["first", "second", "head"])}, "head is adapted in the model but not in"),
    "frozen head": ({"model": lambda: unfrozen_head()}, "the checkpoint has .*head.* as .3, 11., and .* as None"),
    "another target": ({"target_rank": 8}, "has target_rank 10 at first, and the model 8"),
    "another fusion": ({"fusion": "adapter"}, "has fused_rank 0 at first.*set srlora.fusion"),
    "another length": ({"steps": 30}, "a run of 20 optimizer steps, and this one has 30"),
    "another optimizer": ({"optimizer": torch.optim.RAdam}, "was made with AdamW, and the optimizer is RAdam"),
}


def _on(names: list[str]) -> torch.nn.Module:
    from tests.ranks.engines import Net

    torch.manual_seed(0)
    kept = [] if "head" in names else ["head"]
    return get_peft_model(Net(), LoraConfig(r=4, lora_alpha=6, target_modules=names, modules_to_save=kept or None))


def unfrozen_head() -> torch.nn.Module:
    model = make_net()
    for name, parameter in model.named_parameters():
        if "head" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(what: str, saved: Path, tmp_path) -> None:
    changes, message = OTHERS[what]
    changes = {key: value() if key == "model" else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, saved / "step-6", **changes)


def test_a_refused_checkpoint_leaves_the_ledger_of_the_run_alone(saved: Path, tmp_path) -> None:
    _, _, switcher = bound(tmp_path, ledger_dir=str(tmp_path / "ledger"))
    assert switcher.ledger is not None
    before = [path.read_bytes() for path in (tmp_path / "ledger").iterdir()]
    with pytest.raises(ValueError, match="digest"):
        resume(tmp_path, saved / "step-6", make_net(seed=3), ledger_dir=str(tmp_path / "ledger"))
    assert [path.read_bytes() for path in (tmp_path / "ledger").iterdir()] == before


def test_an_optimizer_that_cannot_be_cut_is_refused(tmp_path) -> None:
    model = make_net()
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, switcher = bound(tmp_path, model, optimizer=optimizer, optimizer_reset="keep")
    take_steps(model, optimizer, switcher, 1)
    with pytest.raises(ValueError, match="the (row|col)_var of Adafactor .* such as AdamW"):
        switcher.save_checkpoint(tmp_path / "checkpoints")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adam])
def test_any_elementwise_optimizer_goes_on(kind: type, tmp_path) -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return kind([p for p in model.parameters() if p.requires_grad], lr=1e-2, **more)

    model = make_net()
    optimizer = make(model)
    model, optimizer, switcher = bound(tmp_path, model, optimizer=optimizer, target_rank=10)
    take_steps(model, optimizer, switcher, 9)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    other = make_net()
    resumed = Switcher(other, SRLoRAConfig(svd_cache=str(tmp_path / "svd"), target_rank=10), 20)
    other_optimizer = make(other)
    resumed.bind(other, other_optimizer, resume_from=tmp_path / "checkpoints" / "step-9")
    assert [len(reports) for reports in (take_steps(model, optimizer, switcher, 6),)] == [1]
    take_steps(other, other_optimizer, resumed, 6)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_full_disk_leaves_the_checkpoints_that_are_there(saved: Path, tmp_path) -> None:
    switcher = resume(tmp_path, saved / "step-6")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # writing beyond fails as it does on a full disk
    try:
        with pytest.raises(ValueError, match="cannot write the checkpoint of step 7 to .*[Ff]ile too large"):
            switcher.save_checkpoint(saved, step=7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in saved.iterdir()) == ["step-3", "step-6"]
    assert find_checkpoint(saved).step == 6
    switcher.save_checkpoint(saved, step=7)
    assert find_checkpoint(saved).step == 7


def test_the_same_step_can_be_saved_again(saved: Path, tmp_path) -> None:
    switcher = resume(tmp_path, saved / "step-6")
    flip(saved / "step-6")
    switcher.save_checkpoint(saved)
    assert find_checkpoint(saved).step == 6
    assert sorted(path.name for path in saved.iterdir()) == ["step-3", "step-6"]


def test_a_kill_between_two_renames_loses_nothing(saved: Path) -> None:
    (saved / "step-6").rename(saved / ".step-6.srlora_old")  # as a kill in write_folder leaves it
    (saved / "step-3").rename(saved / ".step-3.srlora_tmp")
    for name in (".bashrc.old", ".cache.tmp"):
        (saved / name).mkdir()
    assert find_checkpoint(saved) is None  # who only looks changes nothing
    clean_up(saved)
    assert find_checkpoint(saved).step == 6
    for name in (".bashrc.old", ".cache.tmp"):
        (saved / name).rmdir()
    assert sorted(path.name for path in saved.iterdir()) == ["step-6"]


def test_the_newest_and_the_best_are_kept_and_foreign_folders_too(saved: Path, tmp_path) -> None:
    switcher = resume(tmp_path, saved / "step-6")
    for step in (7, 8, 9):
        switcher.save_checkpoint(saved, step=step)
    (saved / "notes").mkdir()
    (saved / "other").mkdir()
    (saved / "other" / MANIFEST).write_text('{"format": "something", "step": 1, "files": {}}')
    remove_checkpoints(saved, set(), newest=9)
    assert len([*saved.iterdir()]) == 7
    remove_checkpoints(saved, keep={3}, newest=2)
    assert sorted(path.name for path in saved.iterdir()) == ["notes", "other", "step-3", "step-8", "step-9"]


def test_the_last_good_one_of_a_folder_is_resumed_with_what_belongs_to_the_loop(saved: Path, tmp_path) -> None:
    switcher = resume(tmp_path, saved)
    assert switcher.num_steps == 6
    assert switcher.resumed["extra"] == {"mine": [1, 2.5, None]}
    flip(saved / "step-6")
    assert resume(tmp_path, saved).num_steps == 3


def test_a_folder_without_checkpoints_is_a_new_start(tmp_path) -> None:
    model = make_net()
    switcher = Switcher(model, SRLoRAConfig(svd_cache=str(tmp_path / "svd"), target_rank=10), 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert switcher.bind(model, optimizer, resume_from=tmp_path / "none").switch == 0
    assert switcher.resumed is None


@pytest.mark.parametrize("fused_rank", [None, 6])
def test_a_checkpoint_exports_what_the_live_model_does(fused_rank: int | None, tmp_path) -> None:
    fusion = {"fusion": "adapter", "fused_rank": fused_rank} if fused_rank else {}
    model, optimizer, switcher = bound(tmp_path, steps=20, target_rank=10, **fusion)
    take_steps(model, optimizer, switcher, 15)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    switcher.export(tmp_path / "live")
    export_checkpoint(Checkpoint(tmp_path / "checkpoints" / "step-15"), tmp_path / "saved")
    live, exported = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("live", "saved"))
    assert live.keys() == exported.keys()
    assert all(torch.equal(live[name], exported[name]) for name in live)
    for name in ("adapter_config.json", "README.md"):
        assert (tmp_path / "live" / name).read_text() == (tmp_path / "saved" / name).read_text()
    with pytest.raises(ValueError, match="max_rank is 0"):
        export_checkpoint(Checkpoint(tmp_path / "checkpoints" / "step-15"), tmp_path / "saved", max_rank=0)


def test_a_checkpoint_holds_no_more_than_it_must(tmp_path) -> None:
    """Factors, two moments, two averages, the ledger; a kilobyte a site and some for the names."""
    torch.manual_seed(0)
    model, optimizer, switcher = bound(tmp_path, _wide(), steps=20, target_rank=16)
    take_wide_steps(model, optimizer, switcher, 9)
    size = switcher.save_checkpoint(tmp_path / "checkpoints")
    pair = 4 * (512 + 384)
    pairs_in_ledger = 4 + 2 * (switcher.sites[0].state.num_taken - 4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = 3 * 4 * trained + 2 * 4 * pair + pairs_in_ledger * pair
    assert switcher.num_switches > 1
    assert expected <= size <= expected + 20_000


def _wide() -> torch.nn.Module:
    from tests.unit.method.test_switcher import wide_net

    return wide_net((512, 384), rank=4)


def take_wide_steps(model: torch.nn.Module, optimizer: object, switcher: Switcher, count: int) -> None:
    for step in range(count):
        x = torch.randn(6, 384, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        switcher.step()


def test_the_head_may_be_frozen_all_along(tmp_path) -> None:
    model = unfrozen(unfrozen_head(), "lora_A.default")
    model, optimizer, switcher = bound(tmp_path, model, target_rank=10)
    take_steps(model, optimizer, switcher, 2)
    switcher.save_checkpoint(tmp_path / "checkpoints")
    switcher.export(tmp_path / "live")
    export_checkpoint(Checkpoint(tmp_path / "checkpoints" / "step-2"), tmp_path / "saved")
    live, exported = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("live", "saved"))
    assert any("head" in name for name in live)
    assert all(torch.equal(live[name], exported[name]) for name in live)
