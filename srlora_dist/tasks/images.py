"""Classification of pictures: four public sets from the hub, a folder of IDX files, or a folder per class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks import image_files
from srlora_dist.tasks.sources import HUB

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

    from srlora_dist.tasks.task import Task


def check(config: RunConfig) -> None:
    """Look for the pictures where a folder is given.

    Raises:
        ValueError: The folder is not given where it is needed, or something in it is missing.
    """
    task = config.task
    if task.data_dir is not None:
        image_files.find_splits(task.data_dir)
    elif task.name not in HUB:
        raise ValueError(f"task {task.name} needs task.data_dir: a folder of pictures; see docs/tasks.md for layouts")


def load(config: RunConfig) -> Task:
    """Build the task; the pictures of a folder are all opened once, and made ready batch by batch.

    Raises:
        ValueError: The pictures or the model cannot be read, or do not fit each other.
    """
    from transformers import AutoModelForImageClassification

    from srlora_dist.tasks.heads import heads_of
    from srlora_dist.tasks.loading import load_image_model, quiet
    from srlora_dist.tasks.metrics import Scorer
    from srlora_dist.tasks.picture_check import leave_out_broken
    from srlora_dist.tasks.task import Task
    from srlora_dist.tasks.text import classification_loss, logits_and_labels

    task = config.task
    with quiet():
        train, evaluation, num_classes = _read(config)
        model, processor = load_image_model(config, AutoModelForImageClassification, num_labels=num_classes)
    _require_size(model, processor)
    train = train.select(range(min(len(train), task.max_train_samples or len(train))))
    evaluation = evaluation.select(range(min(len(evaluation), task.max_eval_samples or len(evaluation))))
    are_files = getattr(train.features["picture"], "dtype", None) == "string"
    if are_files:
        train, evaluation = leave_out_broken(train, evaluation)
    return Task(
        model,
        processor,
        train,
        evaluation,
        collate=image_files.collator(processor),
        answers=logits_and_labels,
        loss=classification_loss,
        metrics=Scorer("accuracy"),
        main_metric="accuracy",
        peft_type=None,  # PEFT has none for pictures
        heads=heads_of(model),
        names=[image_files.row_name(path) for path in train["picture"]] if are_files else None,
    )


def _read(config: RunConfig) -> tuple:
    """Training rows, evaluation rows with columns ``picture`` and ``labels``, and the number of classes."""
    task = config.task
    if task.data_dir is not None:
        return image_files.read_folder(task.data_dir)
    import datasets

    there = HUB[task.name]
    try:
        splits = [datasets.load_dataset(there.name, split=split) for split in ("train", "test")]
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"task.name is {task.name!r}, but {there.name} cannot be loaded from the hub ({error}): set task.data_dir "
            "to a folder of IDX files or with a folder a class"
        ) from error
    columns = {there.picture: "picture", there.label: "labels"}
    train, evaluation = (split.select_columns(list(columns)).rename_columns(columns) for split in splits)
    return train, evaluation, train.features["labels"].num_classes


def _require_size(model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Stop where the processor makes pictures of another size than the model has positions for."""
    from PIL import Image

    wanted = getattr(model.config, "image_size", None)
    wanted = [wanted, wanted] if isinstance(wanted, int) else list(wanted or ())
    made = list(processor([Image.new("RGB", (40, 30))], return_tensors="pt")["pixel_values"].shape[-2:])
    has_positions = any("position_embeddings" in name for name, _ in model.named_parameters())
    if wanted and made != wanted and has_positions:
        raise ValueError(
            f"model.name_or_path is {model.name_or_path!r}, which takes pictures of {wanted[0]} x {wanted[1]}, but its "
            f"preprocessor_config.json makes {made[0]} x {made[1]}: make them agree"
        )
