"""The training rows of a run that goes on: the same at the same places, whatever has happened to a file since."""

from __future__ import annotations

import base64
import logging
import zlib
from typing import TYPE_CHECKING

from srlora_dist.errors import shorten_list

if TYPE_CHECKING:
    from srlora_dist.tasks.task import Task

logger = logging.getLogger(__name__)


def pack_names(names: list[str]) -> str:
    """Names of rows as short text, for a checkpoint."""
    return base64.b85encode(zlib.compress("\0".join(names).encode())).decode()


def unpack_names(text: str) -> list[str]:
    """What :func:`pack_names` was given."""
    return zlib.decompress(base64.b85decode(text)).decode().split("\0")


def put_rows_back_(task: Task, names: list[str]) -> None:
    """Give a task the rows of an earlier start, by their names and in their order.

    The next one that is there takes the place of one that is gone, so that all others come at the steps at which they
    would have come, and the run has as many steps. What has come since is left out. Both are told.

    Args:
        task: With ``names``; ``train`` and ``num_targets`` are changed in place.
        names: Names of the rows of the earlier start.

    Raises:
        ValueError: More than half of them are gone, so that these are other data.
    """
    place_of = {name: place for place, name in enumerate(task.names)}
    gone, added = [name for name in names if name not in place_of], place_of.keys() - set(names)
    if names == task.names:
        return
    if 2 * len(gone) > len(names):
        raise ValueError(
            f"the checkpoint is of a run on {len(names)} training samples, of which {len(gone)} are gone, such as "
            f"{gone[0]}: resume with the same task.data_dir"
        )
    chosen, following = [], next(place_of[name] for name in names if name in place_of)
    for name in reversed(names):
        following = place_of.get(name, following)
        chosen.append(following)
    if gone:
        logger.warning(
            "%d of %d training samples are gone since the checkpoint (%s): others take their places, and the run has "
            "the same steps and the same order",
            *(len(gone), len(names), shorten_list(gone)),
        )
    if added:
        logger.warning(
            "%d training samples have come since the checkpoint (%s), and are left out of this run",
            *(len(added), shorten_list(sorted(added))),
        )
    chosen.reverse()
    task.train = task.train.select(chosen)
    if task.num_targets is not None:
        task.num_targets = [task.num_targets[place] for place in chosen]
