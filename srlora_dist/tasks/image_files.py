"""Pictures on disk, as IDX files or in a folder per class, and how a batch becomes tensors, without torchvision."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from PIL import Image
    from torch import Tensor
    from transformers import BaseImageProcessor

IDX_SPLITS = ("train", "t10k")
EVALUATION = ("validation", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}
UNSIGNED_BYTES = 8
"""What IDX files call their type."""


def find_splits(data_dir: str) -> list[tuple[Path, Path]] | list[Path]:
    """Where the training and the evaluation split lie.

    Returns:
        Two pairs of IDX files, pictures and labels; or two folders with a folder a class.

    Raises:
        ValueError: The folder has neither, or not all of them.
    """
    root = Path(data_dir).expanduser()
    this = f"task.data_dir is {data_dir!r}"
    if not root.is_dir():
        raise ValueError(f"{this}, but there is no folder {root}: give one of IDX files or with a folder a class")
    if any(root.glob("*-idx*-ubyte*")):
        return [
            (_idx_file(root, f"{s}-images-idx3", this), _idx_file(root, f"{s}-labels-idx1", this)) for s in IDX_SPLITS
        ]
    evaluation = next((root / name for name in EVALUATION if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or evaluation is None:
        raise ValueError(
            f"{this}, which has neither train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            "t10k-labels-idx1-ubyte (with or without .gz), nor the folders train and validation or test"
        )
    return [root / "train", evaluation]


def read_folder(data_dir: str) -> tuple[datasets.Dataset, datasets.Dataset, int]:
    """Read both splits of a folder.

    Returns:
        Training and evaluation rows with columns ``picture`` (the content of a file, or its path: it is opened when
        it is needed) and ``labels``; the number of classes.

    Raises:
        ValueError: A file is broken, a class is empty, or the splits have other classes.
    """
    import datasets

    train, evaluation = find_splits(data_dir)
    if isinstance(train, tuple):
        pairs = [read_idx_pair(*files) for files in (train, evaluation)]
        num_classes = int(pairs[0][1].max()) + 1
        if pairs[1][1].max() >= num_classes:
            raise ValueError(
                f"{evaluation[1]} has the class {pairs[1][1].max()}, but the highest one in {train[1]} is "
                f"{num_classes - 1}: these files do not belong together"
            )
        rows = [_rows_of_arrays(*pair) for pair in pairs]
        return *rows, num_classes
    classes, others = _classes(train), _classes(evaluation)
    if classes != others:
        odd = sorted({*classes} ^ {*others})[0]
        raise ValueError(f"{train} and {evaluation} do not have folders of the same classes: {odd!r} is in one alone")
    rows = [datasets.Dataset.from_dict(_list_files(split, classes)) for split in (train, evaluation)]
    return *rows, len(classes)


def row_name(path: str) -> str:
    """What a picture in a folder of a class is called, wherever the folder lies."""
    return "/".join(Path(path).parts[-2:])


def collator(processor: BaseImageProcessor) -> Callable[[list[dict]], dict[str, Tensor]]:
    """What makes a batch out of rows: RGB, in the size and with the normalisation that the processor knows."""
    import torch

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        batch = dict(processor([_open(row["picture"]) for row in rows], return_tensors="pt"))
        return {"pixel_values": batch["pixel_values"], "labels": torch.tensor([int(row["labels"]) for row in rows])}

    return collate


def _open(picture: object) -> Image.Image:
    """Decode a picture; an error names it."""
    from PIL import Image

    try:
        return decode(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} is no picture that can be read ({error}): replace or remove it") from error


class TooDeepError(ValueError):
    """A picture is whole, but has more than 8 bits a value."""


def decode(picture: object) -> Image.Image:
    """A picture in RGB, all of it read, from a path, the content of a file, or one that is open already.

    Raises:
        TooDeepError: It has more than 8 bits a value.
        Exception: What PIL makes of a file that is broken.
    """
    from PIL import Image

    if isinstance(picture, Image.Image):
        return _in_rgb(picture)
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
        return _in_rgb(opened)


def _in_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # PIL would cut off what is above 255, and make 0 of fractions
        raise TooDeepError(f"mode {picture.mode} has more than 8 bits a value")
    return picture.convert("RGB")


def _idx_file(root: Path, name: str, this: str) -> Path:
    for ending in ("-ubyte", "-ubyte.gz"):
        if (root / f"{name}{ending}").is_file():
            return root / f"{name}{ending}"
    raise ValueError(f"{this}, but there is no file {root / name}-ubyte or {name}-ubyte.gz: the task needs it")


def read_idx_pair(pictures: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, height, width) and their labels (n,), bytes.

    Raises:
        ValueError: A file is broken, or they do not belong together.
    """
    pair = _read_idx(pictures, 3), _read_idx(labels, 1)
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"{pictures} has {len(pair[0])} pictures, but {labels} has {len(pair[1])} labels: fetch both")
    if len(pair[0]) == 0:
        raise ValueError(f"{pictures} has no pictures: fetch it again")
    return pair


def _read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """An IDX file: two zero bytes, the type, the number of dimensions, each as four bytes, then the values."""
    import numpy as np

    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again") from error
    header = 4 + 4 * num_dimensions
    if content[:4] != bytes((0, 0, UNSIGNED_BYTES, num_dimensions)) or len(content) < header:
        raise ValueError(f"{path} is no IDX file of bytes in {num_dimensions} dimensions: fetch it again")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dimensions, offset=4))
    if len(content) - header != int(np.prod(shape)):
        raise ValueError(f"{path} should hold {shape} values, but has {len(content) - header} bytes: fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _rows_of_arrays(pictures: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    import datasets

    # A grey picture in a file is a header and its bytes, and bytes go into a table at once.
    header = b"P5 %d %d 255\n" % (pictures.shape[2], pictures.shape[1])
    files = [header + picture.tobytes() for picture in pictures]
    return datasets.Dataset.from_dict({"picture": files, "labels": labels.astype("int64")})


def _classes(split: Path) -> list[str]:
    names = sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"{split} has {len(names)} folders of classes: make one folder a class, two at least")
    return names


def _list_files(split: Path, classes: list[str]) -> dict[str, list]:
    """The pictures of a split, in an order that mixes the classes and that no other picture has a say in."""
    files = []
    for label, name in enumerate(classes):
        found = [path for path in sorted((split / name).rglob("*")) if path.suffix.lower() in SUFFIXES]
        if not found:
            raise ValueError(f"{split / name} has no pictures ({' '.join(sorted(SUFFIXES))}): add some, or remove it")
        files += [(hashlib.sha256(row_name(str(path)).encode()).digest(), str(path), label) for path in found]
    _, paths, labels = map(list, zip(*sorted(files), strict=True))
    return {"picture": paths, "labels": labels}
