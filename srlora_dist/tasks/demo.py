"""The task that runs anywhere: is a movie-review sentence positive or negative?

The sentences and their mean ratings, each by at least twenty people, are from C. J. Hutto and E. Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from srlora_dist.config.run import RunConfig
from srlora_dist.tasks.movie_reviews import movie_reviews

if TYPE_CHECKING:
    from srlora_dist.tasks.task import Task

SPLIT_SEED = 2014  # also keeps both copies of a repeated sentence in one split
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def check(config: RunConfig) -> None:
    """Refuse options that the demo cannot honour.

    Raises:
        ValueError: A folder of data is given.
    """
    if config.task.data_dir is not None:
        raise ValueError(f"task.data_dir is {config.task.data_dir!r}, but the demo brings its own data: leave it out")


def load(config: RunConfig) -> Task:
    """Build the demo; it evaluates on the validation split and leaves the test split alone.

    Raises:
        ValueError: The sentences cannot be fetched, or the model cannot be read.
    """
    parts = read_splits()
    from srlora_dist.tasks.metrics import Scorer
    from srlora_dist.tasks.text import text_task

    return text_task(config, parts["train"], parts["validation"], 2, Scorer("accuracy"))


def read_splits() -> dict[str, dict[str, list]]:
    """Split the rated sentences into ``train``, ``validation`` and ``test``, the same in every run.

    Returns:
        For each split the columns ``text`` and ``labels``: 1 for a positive mean rating, 0 for a negative one.
        Sentences rated exactly 0 are left out.

    Raises:
        ValueError: The sentences cannot be fetched.
    """
    rows = [line.split("\t") for line in movie_reviews().decode().split("\r\n") if line]
    rated = [(text.strip(), int(float(rating) > 0)) for _, rating, text in rows if float(rating) != 0]
    random.Random(SPLIT_SEED).shuffle(rated)  # the file is ordered, in part by polarity
    parts, start = {}, 0
    for name, share in SHARES.items():
        stop = len(rated) if name == "test" else start + round(share * len(rated))
        texts, labels = map(list, zip(*rated[start:stop], strict=True))
        parts[name] = {"text": texts, "labels": labels}
        start = stop
    return parts
