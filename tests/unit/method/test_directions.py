"""Directions: signs, fallbacks, the file and its damage."""

from __future__ import annotations

import errno
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import srlora_dist.method.directions
from srlora_dist import SRLoRAConfig
from srlora_dist.layers.digest import digest_span
from srlora_dist.layers.discovery import find_sites
from srlora_dist.method.budget import clamp_target_ranks
from srlora_dist.method.directions import Directions
from srlora_dist.method.svd import compute_directions
from srlora_dist.storage.find import find_storage
from tests import reference
from tests.ranks.engines import make_net
from tests.unit.method.test_switcher import bound, take_steps


def directions_of(folder, scale: float = 1.0, target: int = 6) -> Directions:
    model = make_net()
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight.mul_(scale)
    sites = find_sites(model)
    clamp_target_ranks(sites, target)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return Directions(find_storage(model, optimizer, sites), SRLoRAConfig(svd_cache=str(folder)))


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_directions_equal_the_reference(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    left, values, right = compute_directions(weight, 4)
    expected = reference.directions(weight)
    torch.testing.assert_close((left, values, right), (expected[0][:, :4], expected[1][:4], expected[2][:4]))
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())


def test_a_failing_driver_is_retried_in_float64(monkeypatch) -> None:
    weight = torch.randn(6, 5)
    expected = compute_directions(weight, 3)

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    torch.testing.assert_close(compute_directions(weight, 3), expected, rtol=1e-4, atol=1e-5)


def test_a_site_that_cannot_be_factored_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot factor first: the weight holds NaN"):
        directions_of(tmp_path, scale=float("nan")).prepare()


def test_the_file_is_reused_and_read_back(tmp_path, monkeypatch) -> None:
    first = directions_of(tmp_path)
    first.prepare()
    whole = compute_directions(first.storage.sites[0].weight.detach(), 6)
    monkeypatch.setattr(srlora_dist.method.directions, "compute_directions", None)  # a second computation would fail
    second = directions_of(tmp_path)
    second.prepare()
    assert second.path == first.path
    (left, values, right), (_, more, _) = second.take([(0, [1, 2]), (1, [0, 1, 2, 3, 4, 5])], {})
    torch.testing.assert_close((left, values, right), (whole[0][:, 1:3], whole[1][1:3], whole[2][1:3]))
    assert more.shape == (6,)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_noticed_and_rebuilt(tmp_path, damage: str) -> None:
    directions = directions_of(tmp_path)
    directions.prepare()
    good = directions.path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(directions.path).items()}
    flipped = good[:-7] + bytes([good[-7] ^ 1]) + good[-6:]
    directions.path.write_bytes({"flip": flipped, "truncate": good[:-9], "empty": b""}[damage])
    with pytest.warns(UserWarning, match="damaged and will be computed again"):
        directions_of(tmp_path).prepare()
    rebuilt = load_file(directions.path)
    assert all(torch.equal(rebuilt[name], tensors[name]) for name in tensors)


def test_other_weights_or_ranks_get_another_file(tmp_path) -> None:
    paths = set()
    for options in ({}, {"scale": 1 + 1e-6}, {"target": 5}):
        directions = directions_of(tmp_path, **options)
        directions.prepare()
        paths.add(directions.path)
    assert len(paths) == 3


def test_an_unwritable_cache_is_an_error_with_the_option(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="srlora.svd_cache"):
        directions_of(tmp_path / "file" / "below").prepare()


HARMS = {
    "removed": lambda path: shutil.rmtree(path.parent),
    "truncated": lambda path: path.write_bytes(b""),
    "overwritten": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "replaced": lambda path: (path.unlink(), path.write_bytes(b"something else")),
}


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("harm", HARMS)
def test_what_happens_to_the_file_during_a_run_does_not_matter(tmp_path, monkeypatch, harm, found, room) -> None:
    if not room:
        monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    directions = directions_of(tmp_path / "svd")
    if found:
        directions_of(tmp_path / "svd").prepare()
    directions.prepare()
    wanted = [(0, [1, 2]), (1, [0, 3])]
    before = [[part.clone() for part in triplet] for triplet in directions.take(wanted, {})]
    monkeypatch.chdir(tmp_path)  # whose folder may be relative
    HARMS[harm](directions.path)
    for triplet, expected in zip(directions.take(wanted, {}), before, strict=True):
        assert all(torch.equal(part, known) for part, known in zip(triplet, expected, strict=True))
    assert len(directions.singular_values()["first"]) == 6


def no_room(*_: object, dir: Path, **__: object) -> None:  # noqa: A002 (tempfile's name)
    """For a copy: ``require_writable`` still finds room."""
    if sys._getframe(1).f_code.co_name == "_copied":
        raise OSError(errno.ENOSPC, "No space left on device")
    return tempfile.NamedTemporaryFile(dir=dir)


def test_a_switch_needs_no_cache_any_more(tmp_path) -> None:
    weights = []
    for removed in (False, True):
        model, optimizer, switcher = bound(tmp_path, target_rank=10)
        if removed:
            shutil.rmtree(tmp_path / "svd")
        reports = take_steps(model, optimizer, switcher, 20)
        assert len(reports) == 2
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*weights, strict=True))


def test_a_failed_write_leaves_nothing(tmp_path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # writing beyond fails as it does on a full disk
    try:
        with pytest.raises(ValueError, match="cannot write the directions .srlora.svd_cache.*[Ff]ile too large"):
            directions_of(tmp_path).prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_removed_and_what_is_being_written_is_not(tmp_path) -> None:
    program = """
import os, sys, time
from pathlib import Path
from srlora_dist.checkpoint.files import write_whole

def write(path):
    path.write_bytes(b"half")
    print("here", flush=True)
    sys.stdin.read()

write_whole(Path(sys.argv[1]) / "some.safetensors", write)
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"here\n"
    writers[0].kill()
    writers[0].wait()
    assert len([*tmp_path.iterdir()]) == 2
    directions = directions_of(tmp_path)
    directions.prepare()
    assert len([*tmp_path.iterdir()]) == 2
    writers[1].communicate()
    assert {path.name for path in tmp_path.iterdir()} == {directions.path.name, "some.safetensors"}


def test_the_digest_adds_up_over_runs_and_sees_every_element() -> None:
    whole = torch.randn(101)
    digest = digest_span(whole)
    assert (digest_span(whole[:37]) + digest_span(whole[37:], 37)) % 2**64 == digest
    for i in range(101):
        changed = whole.clone()
        changed[i] = torch.nextafter(changed[i], torch.tensor(9.0))
        assert digest_span(changed) != digest
    assert digest_span(whole.flip(0)) != digest
