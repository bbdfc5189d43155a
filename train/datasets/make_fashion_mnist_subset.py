"""Make the embedded subset of Fashion-MNIST: the first images of each class, pixels unchanged.

    python -m striate.train.datasets.make_fashion_mnist_subset --root /usr/share/datasets/fashion-mnist --out FILE.npz

The same input gives the same file. Training images come from the training split, held-out images from the test split.
The arrays: `{train,test}_images` (N, 28, 28) uint8, `{train,test}_labels` (N,) uint8, `{train,test}_indices` (N,)
int32 positions in the full split, `classes` (10,) names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import FASHION_MNIST_CLASSES, SUBSET
from .idx import read_idx_split

TRAIN_PER_CLASS = 500
TEST_PER_CLASS = 100


def first_of_each_class(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Positions of the first `per_class` samples of every class in `labels` (N,), in ascending order.

    Raises:
        ValueError: a class has fewer than `per_class` samples.
    """
    chosen = []
    for label, name in enumerate(FASHION_MNIST_CLASSES):
        positions = np.flatnonzero(labels == label)
        if len(positions) < per_class:
            raise ValueError(
                f"class {label} ({name}) has {len(positions)} images, fewer than the {per_class} asked for"
            )
        chosen.append(positions[:per_class])
    return np.sort(np.concatenate(chosen)).astype(np.int32)


def make_subset(
    root: str | Path, train_per_class: int = TRAIN_PER_CLASS, test_per_class: int = TEST_PER_CLASS
) -> dict[str, np.ndarray]:
    """The arrays of the subset, from the folder with the four idx files.

    Raises:
        ValueError: a file is damaged, or a class has too few images.
        FileNotFoundError: the folder lacks a file.
    """
    arrays: dict[str, np.ndarray] = {}
    for split, per_class in (("train", train_per_class), ("test", test_per_class)):
        images, labels = read_idx_split(root, split)
        indices = first_of_each_class(labels, per_class)
        arrays |= {f"{split}_images": images[indices], f"{split}_labels": labels[indices], f"{split}_indices": indices}
    arrays["classes"] = np.array(FASHION_MNIST_CLASSES)
    return arrays


def write_npz(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` to a compressed `.npz`; an existing file stays until the new one is whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m striate.train.datasets.make_fashion_mnist_subset", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--root", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=SUBSET)
    parser.add_argument("--train-per-class", type=int, default=TRAIN_PER_CLASS)
    parser.add_argument("--test-per-class", type=int, default=TEST_PER_CLASS)
    args = parser.parse_args(argv)
    try:
        arrays = make_subset(args.root, args.train_per_class, args.test_per_class)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    write_npz(args.out, arrays)
    print(
        f"{args.out}: {len(arrays['train_labels'])} + {len(arrays['test_labels'])} images, {args.out.stat().st_size} B"
    )


if __name__ == "__main__":
    main()
