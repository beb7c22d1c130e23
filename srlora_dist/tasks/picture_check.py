"""Opens every picture of a folder before a run begins, so that a broken one is named then and not hours later."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from srlora_dist.config.paths import cache_dir
from srlora_dist.tasks.image_files import TooDeepError, decode

if TYPE_CHECKING:
    import datasets

BAR_AFTER = 2.0
"""Seconds after which the progress is shown."""


def leave_out_broken(
    train: datasets.Dataset, evaluation: datasets.Dataset
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Decode the pictures of both splits, and leave out those that cannot be, with a warning that names them.

    Args:
        train: Columns ``picture``, a path, and ``labels``.
        evaluation: Rows for evaluation, likewise.

    Returns:
        Both with the rows that are left, in their order.

    Raises:
        ValueError: A class has no picture left to train on, there is none to evaluate on, or a picture is whole and
            cannot be used, because it has more than 8 bits a value.
    """
    paths = [*train["picture"], *evaluation["picture"]]
    broken = find_broken(paths)
    if not broken:
        return train, evaluation
    named = "; ".join(f"{path} ({reason})" for path, reason in list(broken.items())[:10])
    more = f"; and {len(broken) - 10} more" if len(broken) > 10 else ""
    warnings.warn(
        f"{len(broken)} of {len(paths)} pictures cannot be read, and are left out: {named}{more}. Fetch them again, or "
        "remove them",
        stacklevel=2,
    )
    left = [
        rows.select([k for k, path in enumerate(rows["picture"]) if path not in broken]) for rows in (train, evaluation)
    ]
    empty = {*train["labels"]} - {*left[0]["labels"]}
    if empty or len(left[1]) == 0:
        what = "of a class to train on" if empty else "to evaluate on"
        raise ValueError(f"no picture {what} can be read: {named}{more}. Fetch them again")
    return left[0], left[1]


def find_broken(paths: list[str]) -> dict[str, str]:
    """Decode pictures on all cores, those that were whole before and did not change since left out.

    The first process of a machine does it while the others wait for its list.

    Returns:
        The reason by the path of each that cannot be read.

    Raises:
        ValueError: One is whole and has more than 8 bits a value.
    """
    if not paths:
        return {}
    root = os.path.commonpath([str(Path(path).resolve()) for path in paths])
    list_of_good = cache_dir() / "pictures" / f"{hashlib.sha256(root.encode()).hexdigest()[:16]}.json"
    list_of_good.parent.mkdir(exist_ok=True)
    with FileLock(f"{list_of_good}.lock"):
        known = _read(list_of_good)
        states = {path: _state(path) for path in paths}
        unknown = [path for path, state in states.items() if state is None or known.get(path) != state]
        broken = _decode_all(unknown)
        new = {path: states[path] for path in unknown if path not in broken}
        if new:
            _write(list_of_good, {path: state for path, state in {**known, **new}.items() if path not in broken})
    return broken


def _decode_all(paths: list[str]) -> dict[str, str]:
    from tqdm import tqdm

    is_first = os.environ.get("RANK", "0") == os.environ.get("LOCAL_RANK", "0")  # of several machines one shows it
    num_threads = min(16, os.cpu_count() or 1, len(paths) or 1)
    broken = {}
    with ThreadPoolExecutor(num_threads) as pool:
        reasons = pool.map(_why_broken, paths)
        bar = tqdm(reasons, total=len(paths), desc="pictures", unit="file", delay=BAR_AFTER, disable=not is_first)
        for path, reason in zip(paths, bar, strict=True):
            if reason is not None:
                broken[path] = reason
    return broken


def _why_broken(path: str) -> str | None:
    try:
        decode(path)
    except TooDeepError as error:
        raise ValueError(f"{path} is no picture that can be read ({error}): convert or remove it") from error
    except Exception as error:  # PIL's readers raise whatever a broken file makes them stumble over
        return " ".join(str(error).replace(path, "it").split()) or type(error).__name__
    return None


def _state(path: str) -> list[int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _read(path: Path) -> dict[str, list[int]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, list[int]]) -> None:
    part = path.with_suffix(".part")
    with contextlib.suppress(OSError):  # it only saves time
        part.write_text(json.dumps(known))
        part.replace(path)
