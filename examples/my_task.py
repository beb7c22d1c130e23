"""Does a sentence ask or tell? Lines of a sentence, a tab and the answer, in train.tsv and test.tsv."""

from pathlib import Path

from srlora_dist.config import RunConfig
from srlora_dist.tasks import Task

ANSWERS = ["tells", "asks"]


def check(config: RunConfig) -> None:
    """Refuse what cannot work before anything is loaded; may be left out."""
    for name in ("train.tsv", "test.tsv"):
        if not Path(config.task.data_dir or ".", name).is_file():
            raise ValueError(f"task.data_dir is {config.task.data_dir!r}, which has no {name}")


def load(config: RunConfig) -> Task:
    """Called in every process, and has to give the same in each."""
    from srlora_dist.tasks.metrics import Scorer
    from srlora_dist.tasks.text import text_task

    splits = []
    for name in ("train.tsv", "test.tsv"):
        lines = Path(config.task.data_dir or ".", name).read_text(encoding="utf-8").splitlines()
        texts, answers = zip(*(line.split("\t") for line in lines), strict=True)
        splits.append({"text": list(texts), "labels": [ANSWERS.index(answer) for answer in answers]})
    return text_task(config, *splits, num_labels=len(ANSWERS), scorer=Scorer("accuracy", "f1"))
