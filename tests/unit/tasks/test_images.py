"""Pictures: what the task reads and refuses, and an adapter with its head that PEFT loads on the untouched model."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from srlora_dist import Switcher
from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.config.run import LoRAOptions, ModelOptions, RunConfig, TaskOptions
from srlora_dist.layers.discovery import find_sites, keep_payloads_
from srlora_dist.tasks import image_files, sources
from srlora_dist.tasks.registry import check_task, load_task
from srlora_dist.training.adapter import adapt

NUM_CLASSES = 3


def write_vit(folder: Path, size: int = 12, made: int | None = None) -> str:
    """A body without a head, as the paper's model is, whose inputs are made in another size if told so."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ViTModel(ViTConfig(image_size=size, patch_size=4, **sizes)).save_pretrained(folder)
    made = {"height": made or size, "width": made or size}
    ViTImageProcessorPil(size=made, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_vit(tmp_path_factory.mktemp("vit"))


def write_idx(folder: Path, counts: tuple[int, int] = (20, 9), ending: str = "") -> Path:
    """Squares whose brightness tells the class."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for split, count in zip(("train", "t10k"), counts, strict=True):
        labels = np.arange(count) % NUM_CLASSES
        values = (draw.integers(0, 80, (count, 12, 10)) + 80 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (("images-idx3", values), ("labels-idx1", labels.astype(np.uint8))):
            header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = header + array.tobytes()
            path = folder / f"{split}-{kind}-ubyte{ending}"
            path.write_bytes(gzip.compress(content) if ending else content)
    return folder


def write_classes(
    folder: Path, classes: tuple[str, ...] = ("cat", "ant", "dog"), evaluation: str = "validation"
) -> Path:
    for split, count in (("train", 4), (evaluation, 2)):
        for shade, name in enumerate(sorted(classes)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                mode, color = (("RGB", (60 * shade, number, 0)), ("RGBA", (60 * shade, number, 0, 9)))[number % 2]
                Image.new(mode, (9, 14), color).save(folder / split / name / f"{number}.png")
    return folder


def run_config(
    model: str, data_dir: Path | None, name: str = "images", quantization: str = "none", **task
) -> RunConfig:
    return RunConfig(
        model=ModelOptions(name_or_path=model, quantization=quantization),
        task=TaskOptions(name=name, data_dir=data_dir and str(data_dir), **task),
        lora=LoRAOptions(rank=4, alpha=4),
    )


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_become_batches_as_the_processor_wants_them(ending: str, vit: str, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", ending=ending)
    task = load_task(run_config(vit, folder, name="mnist", max_train_samples=7))
    assert (len(task.train), len(task.eval), task.model.config.num_labels) == (7, 9, NUM_CLASSES)
    batch = task.collate([task.train[k] for k in range(4)])
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    content = np.frombuffer(
        image_files._read_idx(folder / f"train-images-idx3-ubyte{ending}", 3)[1].tobytes(), np.uint8
    )
    resized = np.asarray(Image.fromarray(content.reshape(12, 10)).resize((12, 12), Image.Resampling.BILINEAR)) / 255
    for channel, (mean, deviation) in enumerate(((0.5, 0.2), (0.4, 0.3), (0.3, 0.4))):
        torch.testing.assert_close(
            batch["pixel_values"][1, channel], torch.tensor((resized - mean) / deviation).float(), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("evaluation", ["validation", "test"])
def test_a_folder_a_class_is_read_in_a_mixed_order(evaluation: str, vit: str, tmp_path: Path) -> None:
    config = run_config(vit, write_classes(tmp_path / "pictures", evaluation=evaluation))
    check_task(config)
    task = load_task(config)
    assert (len(task.train), len(task.eval)) == (12, 6)
    names = [Path(path).parent.name for path in task.train["picture"]]
    assert [["ant", "cat", "dog"].index(name) for name in names] == list(task.train["labels"]), "sorted names"
    part = load_task(replace(config, task=replace(config.task, max_train_samples=8)))
    assert set(part.train["labels"]) == {0, 1, 2}, "the first samples are not all of one class"
    batch = task.collate([task.train[k] for k in range(12)])
    assert batch["pixel_values"].shape == (12, 3, 12, 12)
    red = batch["pixel_values"][:, 0, 0, 0] * 0.2 + 0.5
    torch.testing.assert_close(red, batch["labels"] * 60 / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sources.HUB)
def test_the_hub_has_other_names_for_columns(name: str, vit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = sources.HUB[name]

    def load_dataset(path: str, split: str) -> datasets.Dataset:
        assert path == there.name
        kinds = {there.picture: datasets.Image(), there.label: datasets.ClassLabel(names=["a", "b", "c"])}
        columns = {there.picture: [Image.new("L", (8, 8))] * 3, there.label: [2, 0, 1], "extra": [0, 0, 0]}
        kinds["extra"] = datasets.Value("int64")
        assert split in ("train", "test")
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(run_config(vit, None, name=name, max_eval_samples=2))
    batch = task.collate([task.eval[0], task.eval[1]])
    assert (batch["labels"].tolist(), batch["pixel_values"].shape) == ([2, 0], (2, 3, 12, 12))


@pytest.mark.long
def test_without_a_hub_the_remedy_is_a_folder(vit: str) -> None:
    with pytest.raises(ValueError, match="uoft-cs/cifar100 cannot be loaded .*set task.data_dir"):
        load_task(run_config(vit, None, name="cifar100"))
    with pytest.raises(ValueError, match="task images needs task.data_dir"):
        check_task(run_config(vit, None))


def test_a_folder_that_is_not_complete_is_refused_before_anything_is_loaded(vit: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        check_task(run_config(vit, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="neither train-images-idx3-ubyte.*nor the folders train and validation"):
        check_task(run_config(vit, tmp_path))
    (write_idx(tmp_path / "idx") / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="no file .*t10k-labels-idx1-ubyte"):
        check_task(run_config(vit, tmp_path / "idx"))


def break_idx(folder: Path, how: str) -> str:
    """Break one of the files; gives what the message has to say."""
    path = folder / "train-images-idx3-ubyte"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
        return "train-images-idx3-ubyte should hold .* but has 2395 bytes"
    if how == "foreign":
        path.write_bytes(b"PK" + path.read_bytes())
        return "train-images-idx3-ubyte is no IDX file"
    if how == "cut gzip":
        path.unlink()
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(b"0" * 999)[:-9])
        return "train-images-idx3-ubyte.gz cannot be read"
    labels = folder / ("train-labels-idx1-ubyte" if how == "few labels" else "t10k-labels-idx1-ubyte")
    values = [0, 1] if how == "few labels" else [9] * 9
    labels.write_bytes(bytes((0, 0, 8, 1)) + len(values).to_bytes(4, "big") + bytes(values))
    return "20 pictures, but .* has 2 labels" if how == "few labels" else "has the class 9, but the highest one"


@pytest.mark.parametrize("how", ["cut", "foreign", "cut gzip", "few labels", "another class"])
def test_a_broken_idx_file_is_named(how: str, tmp_path: Path) -> None:
    message = break_idx(write_idx(tmp_path / "idx"), how)
    with pytest.raises(ValueError, match=message):
        image_files.read_folder(str(tmp_path / "idx"))


def test_classes_have_to_be_the_same_and_not_empty(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "pictures")
    (folder / "validation" / "bee").mkdir()
    with pytest.raises(ValueError, match="the same classes: 'bee' is in one alone"):
        image_files.read_folder(str(folder))
    (folder / "train" / "bee").mkdir()
    with pytest.raises(ValueError, match="bee has no pictures"):
        image_files.read_folder(str(folder))


def test_a_picture_that_breaks_later_is_named_when_it_is_opened(vit: str, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "pictures")
    task = load_task(run_config(vit, folder))
    (folder / "train" / "ant" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"ant/0.png is no picture that can be read"):
        task.collate([task.train[k] for k in range(12)])


@pytest.mark.parametrize("values", ["uint16", "int32", "float32"])
def test_more_than_8_bits_a_value_are_refused(values: str, vit: str, tmp_path: Path) -> None:
    """PIL makes 255 of all that is above, so that such a picture would be white."""
    folder = write_classes(tmp_path / "pictures")
    deep = Image.fromarray(np.full((9, 14), 300).astype(values))
    deep.save(folder / "train" / "ant" / "0.tif")
    with pytest.raises(ValueError, match=r"ant/0.tif is no picture that can be read \(mode .* has more than 8 bits"):
        load_task(run_config(vit, folder))
    (folder / "train" / "ant" / "0.tif").unlink()
    task = load_task(run_config(vit, folder))
    with pytest.raises(ValueError, match="has more than 8 bits"):
        task.collate([{"picture": deep, "labels": 0}])  # as the hub gives them


def test_another_size_than_the_model_has_positions_for_is_refused(tmp_path: Path) -> None:
    config = run_config(write_vit(tmp_path / "vit", size=12, made=16), write_idx(tmp_path / "idx"))
    with pytest.raises(ValueError, match="takes pictures of 12 x 12, but its preprocessor_config.json makes 16 x 16"):
        load_task(config)


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_exported_adapter_brings_its_head(quantization: str, vit: str, tmp_path: Path) -> None:
    """Trained over two switches; PEFT alone gives the same logits on the untouched model."""
    config = run_config(vit, write_idx(tmp_path / "idx"), quantization=quantization)
    task = load_task(config)
    assert (task.heads, task.peft_type, task.main_metric) == (("classifier",), None, "accuracy")
    model = adapt(config, task.model, task.peft_type, task.heads)
    names = {site.name for site in find_sites(model, "default")}
    assert len(names) == 12, "six linear layers in each of two layers"
    assert not any("classifier" in name or "projection" in name for name in names)
    switcher = Switcher(model, SRLoRAConfig(target_rank=8, svd_cache=str(tmp_path / "svd")), num_training_steps=6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    keep_payloads_(model)
    switcher.bind(model, optimizer)
    first = None
    for step in range(6):
        loss = model(**task.collate([task.train[k] for k in range(step, step + 8)])).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        switcher.step()
        optimizer.zero_grad()
    assert len(switcher.due_steps) > 0
    assert loss.item() < first
    switcher.export(tmp_path / "adapter")
    batch = task.collate([task.eval[k] for k in range(5)])
    with torch.no_grad():
        expected = model(pixel_values=batch["pixel_values"]).logits
    base = load_task(config).model
    torch.nn.init.ones_(base.classifier.weight)  # whatever head the untouched model has
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    keep_payloads_(again)
    assert type(base) is type(AutoModelForImageClassification.from_config(base.config))
    with torch.no_grad():
        got = again(pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
