"""The feature pyramid of any model, ours or timm's, as detectors want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..hub import create_model


def create_pyramid(name: str, out_indices: Sequence[int], **kwargs: Any) -> nn.Module:
    """`create_model(name, features_only=True)`, with a `feature_info` that tells channels and strides.

    Raises:
        ValueError: for an unknown name, an argument that the model does not take, or `out_indices` that it does not
            have, names twice or not in ascending order.
    """
    out_indices = tuple(out_indices)
    try:
        pyramid = create_model(name, features_only=True, out_indices=out_indices, **kwargs)
    except (IndexError, AssertionError) as error:  # timm's answers to a stage that there is not
        raise ValueError(f"{name} has no stages out_indices={out_indices}: {error}") from error
    info: Any = pyramid.feature_info
    wanted = tuple(i + len(info.info) * (i < 0) for i in out_indices)
    if tuple(info.out_indices) != wanted:
        raise ValueError(f"out_indices={out_indices} of {name}: name each stage once, the finest first")
    return pyramid


def pyramid_maps(pyramid: nn.Module, x: Tensor) -> list[Tensor]:
    """Image `(B, in_chans, H, W)` -> maps `(B, C_i, H / s_i, W / s_i)`, contiguous in that order of dimensions."""
    maps = pyramid(x)
    if str(getattr(pyramid, "output_fmt", "NCHW")).endswith("NHWC"):  # of timm's models
        maps = [m.permute(0, 3, 1, 2) for m in maps]
    return [m.contiguous() for m in maps]
