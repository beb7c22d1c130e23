"""Six tasks of GLUE (Wang et al. 2019), from the hub or from a folder in the layout of the official archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.text_files import read_lines

if TYPE_CHECKING:
    from srlora_dist.tasks.task import Task

HUB_NAME = "nyu-mll/glue"
MAX_SCORE = 5.0


@dataclass(frozen=True)
class GlueTask:
    """How one task is laid out and measured.

    Args:
        folder: Its folder in the official layout.
        texts: Columns of the one or two texts.
        label: Column of the answer.
        classes: What the answers are called in the file, by class index; none for a score from 0 to 5.
        metrics: The figures to report, the main one first.
        columns: Names of the columns of a file that has no header of its own.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    columns: tuple[str, ...] = ()


_BINARY, _ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
GLUE = {
    "sst2": GlueTask("SST-2", ("sentence",), "label", _BINARY, ("accuracy",)),
    "cola": GlueTask(
        "CoLA", ("sentence",), "label", _BINARY, ("matthews",), columns=("source", "label", "mark", "sentence")
    ),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, ("f1", "accuracy")),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask("RTE", ("sentence1", "sentence2"), "label", _ENTAILMENT, ("accuracy",)),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
}


def check(config: RunConfig) -> None:
    """Look for the task's files where a folder is given.

    Raises:
        ValueError: The folder or a file is missing.
    """
    if config.task.data_dir is not None:
        split_files(config.task.name, config.task.data_dir)


def load(config: RunConfig) -> Task:
    """Build a GLUE task.

    Raises:
        ValueError: The data or the model cannot be read.
    """
    name, data_dir = config.task.name, config.task.data_dir
    if data_dir is None:
        train, evaluation = read_hub(name)
    else:
        train, evaluation = (read_split(GLUE[name], path) for path in split_files(name, data_dir))
    from srlora_dist.tasks.metrics import Scorer
    from srlora_dist.tasks.text import text_task

    return text_task(config, train, evaluation, len(GLUE[name].classes) or 1, Scorer(*GLUE[name].metrics))


def split_files(name: str, data_dir: str) -> tuple[Path, Path]:
    """Find the training and the evaluation file of a task.

    Raises:
        ValueError: The folder or a file is missing.
    """
    root = Path(data_dir).expanduser()
    folder = root / GLUE[name].folder
    for place in (root, folder):
        if not place.is_dir():
            raise ValueError(
                f"task.data_dir is {data_dir!r}, but there is no folder {place}: give the folder that holds "
                f"{GLUE[name].folder}/train.tsv, or leave data_dir out to load from the hub"
            )
    files = folder / "train.tsv", folder / "dev.tsv"
    for file in files:
        if not file.is_file():
            raise ValueError(f"task.data_dir is {data_dir!r}, but there is no file {file}: the task needs it")
    return files


def read_split(task: GlueTask, path: Path) -> dict[str, list]:
    """Read one file of the official layout.

    Returns:
        Columns ``text``, ``pair`` for a task of two texts, and ``labels``: class indices, or scores.

    Raises:
        ValueError: The file is empty, lacks a column or holds a row that does not belong; the message says which.
    """
    lines = _read_lines(path)
    if not lines:
        raise ValueError(f"{path} is empty: fetch it again")
    header = list(task.columns) or [cell.strip() for cell in lines.pop(0)[1]]
    wanted = (*task.texts, task.label)
    if not set(wanted) <= set(header):
        raise ValueError(f"{path} needs the columns {', '.join(wanted)}, but its first line has: {', '.join(header)}")
    if not lines:
        raise ValueError(f"{path} has a header and no rows: fetch it again")
    places = [header.index(column) for column in wanted]
    rows = []
    for number, cells in lines:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(header)} columns wanted ({', '.join(header)}), {len(cells)} found"
            )
        *texts, label = (cells[place].strip() for place in places)
        rows.append((*texts, _parse_label(task, label, f"{path}, line {number}")))
    names = ("text", "pair")[: len(task.texts)]
    return dict(zip((*names, "labels"), map(list, zip(*rows, strict=True)), strict=True))


def read_hub(name: str) -> tuple[dict[str, list], dict[str, list]]:
    """Load the training and the validation split of a task from the hub, as :func:`read_split` gives them.

    Raises:
        ValueError: The hub cannot be reached and its cache does not hold the task.
    """
    import datasets

    try:
        splits = datasets.load_dataset(HUB_NAME, name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"task.name is {name!r}, but {HUB_NAME} cannot be loaded from the hub ({error}): set task.data_dir to a "
            f"folder in the official GLUE layout that holds {GLUE[name].folder}/train.tsv"
        ) from error
    texts = [column for column in splits["train"].column_names if column not in ("label", "idx")]
    sources = dict(zip(("text", "pair"), texts, strict=False)) | {"labels": "label"}
    return tuple({to: list(splits[split][at]) for to, at in sources.items()} for split in ("train", "validation"))


def _read_lines(path: Path) -> list[tuple[int, list[str]]]:
    # Not the csv module: quotes are text in GLUE.
    lines = enumerate(read_lines(path), start=1)
    return [(number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip()]


def _parse_label(task: GlueTask, value: str, where: str) -> int | float:
    if task.classes:
        if value not in task.classes:
            raise ValueError(f"{where}: the label is {value!r}, but {task.folder} has {', '.join(task.classes)}")
        return task.classes.index(value)
    try:
        score = float(value)
    except ValueError:
        raise ValueError(f"{where}: the score is {value!r}, which is not a number") from None
    if not 0 <= score <= MAX_SCORE:
        raise ValueError(f"{where}: the score is {value}, but {task.folder} has scores from 0 to {MAX_SCORE:g}")
    return score
