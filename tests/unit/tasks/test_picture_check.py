"""Pictures are all opened before a run begins, and one that is broken or gone does not cost a run that goes on."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srlora_dist.config.paths import cache_dir
from srlora_dist.tasks import image_files, picture_check
from srlora_dist.tasks.registry import load_task
from srlora_dist.tasks.same_rows import pack_names, put_rows_back_, unpack_names
from tests.unit.tasks.test_images import run_config, vit, write_classes  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_classes(tmp_path / "pictures")
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    for number, ending in enumerate(("png", "jpg", "webp", "gif", "bmp", "tiff")):
        Image.fromarray(noise).save(folder / "train" / "dog" / f"{number + 9}.{ending}")
    return folder


def cut(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_a_cut_picture_is_left_out_by_name_before_anything_is_trained(ending: str, vit: str, folder: Path) -> None:  # noqa: F811
    whole = load_task(run_config(vit, folder))
    path = next((folder / "train" / "dog").glob(f"*.{ending}" if ending != "png" else "9.png"))
    cut(path)
    with pytest.warns(UserWarning, match=rf"1 of 24 pictures cannot be read, and are left out: .*{path.name} \("):
        task = load_task(run_config(vit, folder))
    assert [name for name in whole.names if name != f"dog/{path.name}"] == task.names, "the others keep their order"
    assert [Path(p).name for p in task.train["picture"]] == [name.split("/")[1] for name in task.names]
    task.collate(list(task.train))


def test_other_files_that_are_no_pictures_are_left_out(vit: str, folder: Path) -> None:  # noqa: F811
    (folder / "train" / "cat" / "0.png").write_bytes(b"")
    (folder / "validation" / "cat" / "0.png").write_bytes(b"no picture")
    (folder / "train" / "ant" / "far.jpg").symlink_to("nowhere")
    with pytest.warns(UserWarning, match="3 of 25 pictures cannot be read, and are left out: .*0.png"):
        task = load_task(run_config(vit, folder))
    assert (len(task.train), len(task.eval)) == (17, 5)


def test_a_class_without_a_picture_is_refused(vit: str, folder: Path) -> None:  # noqa: F811
    for path in (folder / "train" / "ant").iterdir():
        path.write_bytes(b"no picture")
    with (
        pytest.warns(UserWarning, match="4 of 24 pictures"),
        pytest.raises(ValueError, match=r"no picture of a class to train on can be read: .*ant/0.png"),
    ):
        load_task(run_config(vit, folder))


@pytest.mark.long
def test_a_second_start_opens_only_what_is_new_or_has_changed(
    vit: str,  # noqa: F811
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = []
    monkeypatch.setattr(
        picture_check, "decode", lambda path: opened.append(Path(path).name) or image_files.decode(path)
    )
    load_task(run_config(vit, folder, max_train_samples=6))
    assert len(opened) == 12, "those that are used"
    load_task(run_config(vit, folder))
    assert len(opened) == 24
    load_task(run_config(vit, folder))
    assert len(opened) == 24
    Image.new("RGB", (20, 20)).save(folder / "train" / "ant" / "1.png")
    (folder / "train" / "cat" / "1.png").write_bytes(b"no picture")
    for _ in range(2):  # what is broken is opened again, for it may be copied anew
        opened.clear()
        with pytest.warns(UserWarning, match="1 of 24 pictures"):
            load_task(run_config(vit, folder))
    assert opened == ["1.png"]
    (list_of_good,) = (cache_dir() / "pictures").glob("*.json")
    assert len(json.loads(list_of_good.read_text())) == 23
    list_of_good.write_text("{")
    with pytest.warns(UserWarning, match="1 of 24 pictures"):
        load_task(run_config(vit, folder))


def test_no_picture_has_a_say_in_the_order_of_the_others(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "pictures", classes=tuple("abcdef"))
    before, _, _ = image_files.read_folder(str(folder))
    (folder / "train" / "c" / "2.png").unlink()
    after, _, _ = image_files.read_folder(str(folder))
    assert [path for path in before["picture"] if not path.endswith("c/2.png")] == list(after["picture"])
    assert sorted(before["labels"]) != list(before["labels"])


# --- a run that goes on


def test_what_is_gone_is_replaced_and_all_else_keeps_its_place(
    vit: str,  # noqa: F811
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = load_task(run_config(vit, folder)).names
    assert unpack_names(pack_names(names)) == names
    gone = random.Random(0).sample(names, 3)
    for name in gone:
        (folder / "train" / name).unlink()
    Image.new("RGB", (20, 20)).save(folder / "train" / "ant" / "new.png")
    task = load_task(run_config(vit, folder))
    with caplog.at_level(logging.WARNING):
        put_rows_back_(task, names)
    got = [image_files.row_name(path) for path in task.train["picture"]]
    assert len(got) == len(names)
    for place, (name, now) in enumerate(zip(names, got, strict=True)):
        following = [other for other in (names * 2)[place:] if other not in gone]
        assert now == (name if name not in gone else following[0])
    assert "3 of 18 training samples are gone since the checkpoint" in caplog.text
    assert all(name in caplog.text for name in gone)
    assert "1 training samples have come since the checkpoint (ant/new.png)" in caplog.text
    assert [["ant", "cat", "dog"].index(name.split("/")[0]) for name in got] == list(task.train["labels"])


def test_other_data_are_refused(vit: str, folder: Path) -> None:  # noqa: F811
    task = load_task(run_config(vit, folder))
    with pytest.raises(ValueError, match="of which 18 are gone, such as a/1.png: resume with the same task.data_dir"):
        put_rows_back_(task, [f"a/{k + 1}.png" for k in range(18)])
