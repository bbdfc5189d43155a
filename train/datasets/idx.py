"""Reading the idx files of MNIST-like data sets (Fashion-MNIST, KMNIST, …), gzipped or plain.

The format: two zero bytes, a type byte (8 = uint8), the number of dimensions, each dimension as a big-endian uint32,
then the values in row-major order (http://yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np

_UINT8 = 8


def read_idx(path: str | Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, e.g. `(N, H, W)` images or `(N,)` labels.

    Raises:
        ValueError: the file is not idx, not uint8, or shorter or longer than its header says.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UINT8:
        raise ValueError(f"{path} does not begin like an idx file of unsigned bytes: {data[:4]!r}; fetch it again")
    num_dims = data[3]
    start = 4 + 4 * num_dims
    shape = struct.unpack(f">{num_dims}I", data[4:start]) if len(data) >= start else ()
    if not shape or len(data) - start != math.prod(shape):
        raise ValueError(f"{path} holds {len(data)} bytes, which does not fit its header {shape}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_idx_split(root: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read `(N, H, W)` uint8 images and `(N,)` uint8 labels of split "train" or "test" of an MNIST-like folder.

    The files are `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, …, with or without `.gz`.

    Raises:
        ValueError: an unknown split, or images and labels of different number.
        FileNotFoundError: the folder lacks one of the files.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ValueError(f"split {split!r} is not in this data set; choose one of {', '.join(prefixes)}")
    images = read_idx(_find(root, f"{prefixes[split]}-images-idx3-ubyte"))
    labels = read_idx(_find(root, f"{prefixes[split]}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{root} has images {images.shape} but labels {labels.shape} in split {split!r}")
    return images, labels


def _find(root: str | Path, name: str) -> Path:
    for path in (Path(root) / f"{name}.gz", Path(root) / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{root} has neither {name}.gz nor {name}; install the package dataset-fashion-mnist")
