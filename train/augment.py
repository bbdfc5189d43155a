"""Image transforms from timm."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor

from .config import AugmentConfig

Transform = Callable[[Image.Image], Tensor]

PREPROCESS_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def train_transform(config: AugmentConfig, preprocess: dict[str, Any]) -> Transform:
    """timm's training transform: crop, flip, colour or policy, normalisation, erasing.

    Raises:
        ValueError: an option or a policy that timm does not know.
    """
    known = set(inspect.signature(create_transform).parameters)
    ours = {"input_size", "is_training", "scale", "hflip", "color_jitter", "auto_augment", "re_prob", *PREPROCESS_KEYS}
    fixed = {"use_prefetcher", "normalize", "separate", "naflex", "patchify", "tf_preprocessing"}
    for key in config.options:
        if key not in known - ours - fixed:
            raise ValueError(
                f"augment.options has the unknown key {key!r}; see the arguments of timm's create_transform"
            )
    options = {"re_mode": "pixel", **config.options}
    try:
        transform = create_transform(
            is_training=True,
            scale=config.scale,
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            re_prob=config.erasing,
            **{key: value for key, value in preprocess.items() if key != "crop_border_pixels"},
            **options,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"augment cannot be built (auto_augment {config.auto_augment!r}): {error}") from error
    _repair_posterize(transform)
    return transform


class TransformSchedule:
    """The training transform of every epoch, counted from 0: at the size of `preprocess`, then at `image_sizes`.

    Args:
        image_sizes: side of the images from an epoch on, see schedule.image_sizes.

    Raises:
        ValueError: see `train_transform`.
    """

    def __init__(self, config: AugmentConfig, preprocess: dict[str, Any], image_sizes: Mapping[int, int]) -> None:
        chans = preprocess["input_size"][0]
        sizes = {0: preprocess["input_size"]} | {start: (chans, side, side) for start, side in image_sizes.items()}
        self._from = {start: train_transform(config, {**preprocess, "input_size": sizes[start]}) for start in sizes}

    def __call__(self, epoch: int) -> Transform:
        return self._from[max(start for start in self._from if start <= epoch)]


def eval_transform(preprocess: dict[str, Any]) -> Transform:
    """timm's evaluation transform: resize, centre crop, normalisation."""
    return create_transform(is_training=False, **preprocess)


def _repair_posterize(transform: Any) -> None:
    """Make posterize work at full strength, 0 bits: Pillow 13 refuses it, earlier ones gave a black image.

    Policies such as rand-m9-mstd0.5-inc1 reach it for about 1 image of 650.
    """
    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)


def _operations(transform: Any) -> Iterator[Any]:
    """The single operations inside timm's policies, however they are nested."""
    if isinstance(transform, auto_augment.AugmentOp):
        yield transform
    for inner in ("transforms", "ops", "policy"):
        yield from _operations_of(getattr(transform, inner, ()))


def _operations_of(items: Any) -> Iterator[Any]:
    for item in items:
        yield from _operations_of(item) if isinstance(item, (list, tuple)) else _operations(item)
