"""mmcv's operators without a compiler: torchvision's where a Mask R-CNN needs them, else an error at the call."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms, roi_align


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return nms(boxes, scores, iou_threshold)


def _pool(
    features: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    return roi_align(features, rois, size, spatial_scale, sampling_ratio or -1, aligned)


def _roi_align_forward(
    features: Tensor, rois: Tensor, output: Tensor, *_: Tensor, aligned_height: int, aligned_width: int, **options: Any
) -> None:
    if options.pop("pool_mode") != 1:
        raise NotImplementedError("the stand-in for mmcv.ops.RoIAlign pools by averages only")
    output.copy_(_pool(features, rois, (aligned_height, aligned_width), **options))


def _roi_align_backward(
    gradient: Tensor, rois: Tensor, *rest: Tensor, aligned_height: int, aligned_width: int, **options: Any
) -> None:
    options.pop("pool_mode")
    into = rest[-1]
    features = torch.zeros_like(into, requires_grad=True)
    with torch.enable_grad():
        pooled = _pool(features, rois, (aligned_height, aligned_width), **options)
    into.copy_(torch.autograd.grad(pooled, features, gradient)[0])


class _Operators(ModuleType):
    """A module that has an operator of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"mmcv's operator {name} has no stand-in here; install a compiled mmcv")

        return missing


def install() -> None:
    """Put the operators where `mmcv.ops` looks for them; read checkpoints, the tests' own, as PyTorch used to."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    module = _Operators("mmcv._ext")
    module.__spec__ = ModuleSpec("mmcv._ext", None)  # mmcv looks for it before it imports it
    module.nms = _nms  # type: ignore[attr-defined]
    module.roi_align_forward = _roi_align_forward  # type: ignore[attr-defined]
    module.roi_align_backward = _roi_align_backward  # type: ignore[attr-defined]
    sys.modules["mmcv._ext"] = module
