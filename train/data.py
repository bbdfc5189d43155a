"""Data sets, transforms and loaders.

The embedded set, `.npz` files and MNIST-like idx folders are read here; everything else through timm.data
(image folders, tar files, `torch/…`, `hfds/…`) or, for WebDataset shards, train/readers.py. Only data sets with an
index can be resumed to the step, so the streaming readers (`hfids/`, `tfds/`) are refused. docs/data.md has an example
of each.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, resolve_data_config
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .augment import PREPROCESS_KEYS, Transform
from .config import DataConfig
from .datasets import FASHION_MNIST_CLASSES, SUBSET
from .datasets.idx import read_idx_split
from .readers import ShardReader
from .sampler import SampleKey, TrainingOrder
from .seeding import derive_seed, seed_all

_HELD_OUT = {"test", "val", "valid", "validation", "eval"}
_STREAMS = ("hfids/", "tfds/")
_LISTED = 20  # broken images in an error message
_TRIES = 20  # an image to replace a broken one is found at the first or second, unless most are broken
_IMAGE_MODES = {1: "L", 3: "RGB"}


def image_mode(in_chans: int) -> str:
    """PIL's name for images of that many channels.

    Raises:
        ValueError: neither 1 nor 3.
    """
    if in_chans not in _IMAGE_MODES:
        raise ValueError(f"model.in_chans is {in_chans}, but images have 3 (RGB) or 1 (grey)")
    return _IMAGE_MODES[in_chans]


class LabelledImages(Protocol):
    """What every reader gives: a PIL image and a class number per index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]: ...


class ArrayImages:
    """Images `(N, H, W)` or `(N, H, W, 3)` uint8 and labels `(N,)` held in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None) -> None:
        self.images, self.labels = images, labels
        self.classes = list(classes) if classes is not None else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class ReaderImages:
    """Images of a timm reader as they are, where timm's own data set reads the next one in place of a broken one."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.class_to_idx = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        file, label = self.reader[index][:2]
        with file:
            image = Image.open(file)
            image.load()
        return image, label

    def filename(self, index: int) -> str | None:
        """Where the image comes from; None for one that has no name of its own."""
        return self.reader.filename(index, absolute=True)


class BrokenImage(NamedTuple):
    """An image that could not be read: its number in the data set, its file, and why."""

    number: int
    path: str
    reason: str


class Batch(NamedTuple):
    """Images `(B, C, H, W)` float32, class numbers `(B,)` int64, and the broken ones that some of them replace."""

    images: Tensor
    labels: Tensor
    broken: Sequence[BrokenImage]


class BrokenDataError(RuntimeError):
    """More images could not be read than data.broken_limit allows."""


class BrokenImages:
    """The distinct training images that were seen to be broken in the course of a run.

    Args:
        limit: part of `num_images` that may be broken.
    """

    def __init__(self, limit: float, num_images: int) -> None:
        self.limit, self.num_images = limit, num_images
        self._found: dict[int, BrokenImage] = {}

    def add(self, broken: Iterable[BrokenImage]) -> list[BrokenImage]:
        """Take note of images, and return those that are new.

        Raises:
            BrokenDataError: there are too many; lists the first of them.
        """
        new = {image.number: image for image in broken if image.number not in self._found}
        self._found |= new
        if len(self._found) > self.limit * self.num_images:
            listed = "; ".join(f"{image.path} ({image.reason})" for image in list(self._found.values())[:_LISTED])
            more = f"; and {len(self._found) - _LISTED} more" if len(self._found) > _LISTED else ""
            raise BrokenDataError(
                f"{len(self._found)} of {self.num_images} training images cannot be read, which is more than "
                f"data.broken_limit {self.limit:g} of them: {listed}{more}. Replace or remove these files, or raise "
                "data.broken_limit"
            )
        return list(new.values())

    def state(self) -> list[list[Any]]:
        """The images as lists of plain values, for `load`."""
        return [list(image) for image in self._found.values()]

    def load(self, state: Iterable[Sequence[Any]]) -> None:
        """Take up where `state` was made."""
        self._found = {values[0]: BrokenImage(*values) for values in state}


class TrainImages(Dataset[Any]):
    """Augmented images; each is a function of (seed, epoch, image, copy), in whatever process it is made.

    One that cannot be read is replaced by another, which is drawn with the sample's seed.

    Args:
        images: see `LabelledImages`.
        transform_at: the transform of an epoch, counted from 0.
        mode: PIL's name of the kind of image that the transform gets.
        seed: of the run.
    """

    def __init__(self, images: LabelledImages, transform_at: Callable[[int], Transform], mode: str, seed: int) -> None:
        self.images, self.transform_at, self.mode, self.seed = images, transform_at, mode, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int, tuple[BrokenImage, ...]]:
        seed_all(derive_seed(self.seed, "sample", key.epoch, key.image, key.copy))
        broken: list[BrokenImage] = []
        index = key.image
        for _ in range(_TRIES):
            try:
                image, label = read_image(self.images, index, self.mode)
            except UnreadableImageError as error:
                broken.append(error.image)
                index = random.randrange(len(self))
            else:
                return self.transform_at(key.epoch)(image), label, tuple(broken)
        last = broken[-1]
        raise BrokenDataError(
            f"{_TRIES} training images drawn one after the other cannot be read, the last of them {last.path} "
            f"({last.reason}); see that data.name and data.root are right"
        )


class EvalImages(Dataset[Any]):
    """Images resized and cropped without randomness. One that cannot be read is an error: counts are exact."""

    def __init__(self, images: LabelledImages, transform: Transform, mode: str) -> None:
        self.images, self.transform, self.mode = images, transform, mode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = read_image(self.images, index, self.mode)
        return self.transform(image), label


class UnreadableImageError(OSError):
    """`image` says which image cannot be read, where it is and why."""

    def __init__(self, message: str, image: BrokenImage | None = None) -> None:
        # A loader process hands on the message alone.
        super().__init__(message)
        self.image = image or BrokenImage(-1, "", message)


def read_image(images: LabelledImages, index: int, mode: str) -> tuple[Image.Image, int]:
    """An image in a PIL mode, and its class number.

    Raises:
        UnreadableImageError: it cannot be read or decoded.
    """
    try:
        image, label = images[index]
        return image.convert(mode), -1 if label is None else int(label)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything: OSError, SyntaxError, struct.error, …
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        broken = BrokenImage(index, _path(images, index), reason)
        raise UnreadableImageError(f"image {index} ({broken.path}) cannot be read: {reason}", broken) from error


def _path(images: LabelledImages, index: int) -> str:
    path = images.filename(index) if isinstance(images, ReaderImages) else None
    return path or f"image {index}"


@dataclass
class Source:
    """One opened split: its images, its class names where they are known, and the number of classes."""

    images: LabelledImages
    classes: list[str] | None

    @property
    def num_classes(self) -> int | None:
        return len(self.classes) if self.classes else None


def open_sources(config: DataConfig, in_chans: int) -> tuple[Source, Source]:
    """Open the training and the evaluation split.

    Raises:
        ValueError: an unknown data set, split or option, a stream, or a damaged file.
        FileNotFoundError: a file or folder is missing.
    """
    train = open_source(config, config.train_split, in_chans)
    return train, open_source(config, config.eval_split, in_chans, _class_to_idx(train.images))


def open_source(config: DataConfig, split: str, in_chans: int, class_to_idx: dict[str, int] | None = None) -> Source:
    """Open one split. `class_to_idx` makes a folder with fewer classes keep the numbering of the training split.

    Raises:
        ValueError: an unknown data set, split or option, a stream, or a damaged file.
        FileNotFoundError: a file or folder is missing.
    """
    if config.name in ("fashion-mnist-subset", "fashion-mnist", "npz"):
        if config.options:
            raise ValueError(f"data.options {config.options} do not apply to data.name {config.name}")
        arrays = _open_arrays(config, split)
        return Source(arrays, arrays.classes)
    if config.name.lower().startswith(_STREAMS):
        raise ValueError(f"data.name {config.name} is a stream without an index, which cannot be resumed; use hfds/…")
    images = _open_timm(config, split, in_chans, class_to_idx)
    return Source(images, _class_names(images))


def _open_arrays(config: DataConfig, split: str) -> ArrayImages:
    if split != "train" and split not in _HELD_OUT:
        raise ValueError(f"split {split!r} is not in {config.name}; choose train or validation")
    split = "train" if split == "train" else "test"
    if config.name == "fashion-mnist":
        if config.root is None:
            raise ValueError("data.root is needed: the folder with the four idx files of Fashion-MNIST")
        return ArrayImages(*read_idx_split(config.root, split), classes=FASHION_MNIST_CLASSES)
    if config.name == "npz" and config.root is None:
        raise ValueError("data.root is needed: the .npz file with train_images, train_labels, test_images, test_labels")
    path = SUBSET if config.root is None or config.name != "npz" else Path(config.root)
    return _read_npz(path, split)


def _read_npz(path: Path, split: str) -> ArrayImages:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    except (KeyError, zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not a .npz with {split}_images and {split}_labels: {error}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: {split}_images is {images.dtype} {images.shape} and {split}_labels {labels.shape}; "
            "they must be uint8 (N, H, W) or (N, H, W, 3), and (N,)"
        )
    return ArrayImages(images, labels, classes)


def _open_timm(config: DataConfig, split: str, in_chans: int, class_to_idx: dict[str, int] | None) -> LabelledImages:
    options = dict(config.options)
    if config.name in ("folder", "tar") and class_to_idx is not None:
        options.setdefault("class_map", class_to_idx)
    try:
        if config.name == "tar":
            # Without open files, because processes that share one move each other's place in it.
            return ReaderImages(ReaderImageInTar(str(_tar_path(config.root, split)), cache_tarfiles=False, **options))
        if config.name.partition("/")[0] == "wds":
            return ReaderImages(ShardReader(_existing(config.root), split, **options))
        name, root = ("", _split_root(config.root, split)) if config.name == "folder" else (config.name, config.root)
        images = create_dataset(name, root=root, split=split, input_img_mode=image_mode(in_chans), **options)
    except (AssertionError, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"data.name {config.name}, root {config.root}, split {split!r}: {error}") from error
    if config.name == "folder" and Path(images.reader.root) == Path(config.root or ""):
        # timm falls back to the whole root, which would put the images of every split into this one.
        raise ValueError(f"data.root {config.root} has no folder for the split {split!r}; name the splits in data.*")
    return ReaderImages(images.reader) if isinstance(images, ImageDataset) else images


def _existing(root: str | None) -> Path:
    if root is None or not Path(root).exists():
        raise FileNotFoundError(f"data.root {root} does not exist; give the folder that holds the images")
    return Path(root)


def _split_root(root: str | None, split: str) -> str:
    if not _existing(root).is_dir():
        raise ValueError(f"data.root {root} is a file; give the folder above {split}/class/, or use data.name tar")
    return str(root)


def _tar_path(root: str | None, split: str) -> Path:
    """The split's tar file, of class folders or of a tar file per class, or its folder of a tar file per class."""
    for path in (_existing(root) / f"{split}.tar", _existing(root) / split):
        if path.exists():
            return path
    raise FileNotFoundError(f"data.root {root} has neither {split}.tar nor a folder {split}; name the splits in data.*")


def _class_to_idx(images: LabelledImages) -> dict[str, int] | None:
    mapping = getattr(images, "class_to_idx", None)
    return dict(mapping) if mapping else None


def _class_names(images: LabelledImages) -> list[str] | None:
    mapping = _class_to_idx(images)
    if mapping:
        names = {index: name for name, index in mapping.items()}
        return [names.get(index, str(index)) for index in range(max(names) + 1)]
    classes = getattr(images, "classes", None)
    return list(map(str, classes)) if classes else None


def resolve_preprocess(config: DataConfig, in_chans: int, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """How an image becomes an input: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.

    What data.* leaves open comes from the model's `pretrained_cfg`.

    Raises:
        ValueError: an unknown key in data.preprocess, or a mean or std of the wrong length.
    """
    unknown = sorted(set(config.preprocess) - set(PREPROCESS_KEYS))
    if unknown:
        raise ValueError(
            f"data.preprocess has the unknown key {unknown[0]!r}; the keys are {', '.join(PREPROCESS_KEYS)}"
        )
    size = config.image_size or tuple(pretrained_cfg.get("input_size") or (in_chans, 224, 224))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    values = {"input_size": (in_chans, height, width), **config.preprocess}
    for key in ("mean", "std"):
        own = np.atleast_1d(values.get(key) or pretrained_cfg.get(key) or {"mean": 0.5, "std": 0.5}[key])
        if key in config.preprocess and len(own) not in (1, in_chans):
            raise ValueError(f"data.preprocess {key} has {len(own)} values for {in_chans} channels")
        values[key] = tuple(float(value) for value in (own if len(own) == in_chans else [own.mean()] * in_chans))
    return dict(resolve_data_config(values, pretrained_cfg=pretrained_cfg))


def train_loader(images: TrainImages, order: TrainingOrder, workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches in the given order to its end, on the CPU."""
    return iter(
        DataLoader(
            images,
            batch_sampler=order,
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
        )
    )


def _collate(samples: list[tuple[Tensor, int, tuple[BrokenImage, ...]]]) -> Batch:
    images, labels = default_collate([sample[:2] for sample in samples])
    return Batch(images, labels, tuple(itertools.chain.from_iterable(broken for _, _, broken in samples)))


def eval_loader(
    images: EvalImages, batch_size: int, workers: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Every image once, in order: process `rank` of `world_size` gets every world_size-th one, none twice."""
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=range(rank, len(images), world_size),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Keep a loader process alive when Ctrl-C or SIGTERM reach the whole process group, so that the step can end.

    SIGTERM from the parent still ends it: that is how torch and multiprocessing clean up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_only_the_parent, args=(os.getppid(),), daemon=True).start()


def _obey_only_the_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
