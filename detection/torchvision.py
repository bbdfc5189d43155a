"""Torchvision's detectors on any backbone, with a feature pyramid network between them.

>>> from striate.detection.torchvision import maskrcnn
>>> model = maskrcnn("swin_tiny", num_classes=91, backbone=dict(feature_norms=True, drop_path_rate=0.2))
>>> losses = model(images, targets)  # as torchvision's own
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from ._pyramid import create_pyramid, pyramid_maps


class BackboneWithFPN(nn.Module):
    """A backbone and a pyramid network: image `(B, 3, H, W)` -> maps `(B, out_channels, …)` by name, finest first.

    Args:
        name: of a model of ours or timm's, or `hf-hub:org/name`, `local-dir:PATH`.
        out_indices: the stages that the network reads.
        extra: what adds coarser maps.
        out_channels: of every map.
        **kwargs: further arguments of the backbone.

    Attributes:
        body, fpn: the two parts; out_channels: of every map; names: of the maps of `body`.
        strides: of all maps, those that `extra` adds included.
    """

    def __init__(
        self, name: str, out_indices: Sequence[int], extra: ExtraFPNBlock, out_channels: int, **kwargs: Any
    ) -> None:
        super().__init__()
        self.body = create_pyramid(name, out_indices, **kwargs)
        info: Any = self.body.feature_info
        self.fpn = FeaturePyramidNetwork(info.channels(), out_channels, extra)
        strides = list(info.reduction())
        self.names = [str(i) for i in range(len(strides))]
        for _ in range(2 if isinstance(extra, LastLevelP6P7) else 1):
            strides.append(2 * strides[-1])
        self.out_channels, self.strides = out_channels, tuple(strides)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict(zip(self.names, pyramid_maps(self.body, x), strict=True)))


def fasterrcnn(
    name: str,
    num_classes: int = 91,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    backbone: Mapping[str, Any] | None = None,
    channels: int = 256,
    **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN: boxes.

    Args:
        name: of the backbone, as in `striate.create_model`.
        num_classes: with the background, which is class 0.
        out_indices: stages of the backbone that the pyramid is made of.
        backbone: arguments of the backbone: `feature_norms`, `drop_path_rate`, `checkpoint_path`, …
        channels: of the pyramid's maps.
        **kwargs: arguments of `torchvision.models.detection.FasterRCNN`: `min_size`, `image_mean`, …

    Raises:
        ValueError: for an unknown name, a stage or an argument that the backbone does not have.
    """
    body = BackboneWithFPN(name, out_indices, LastLevelMaxPool(), channels, **(backbone or {}))
    return FasterRCNN(body, num_classes, **{**_two_stages(body), **kwargs})


def maskrcnn(
    name: str,
    num_classes: int = 91,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    backbone: Mapping[str, Any] | None = None,
    channels: int = 256,
    **kwargs: Any,
) -> MaskRCNN:
    """Mask R-CNN: boxes and masks; arguments and errors as in `fasterrcnn`."""
    body = BackboneWithFPN(name, out_indices, LastLevelMaxPool(), channels, **(backbone or {}))
    mask_pool = MultiScaleRoIAlign(body.names, output_size=14, sampling_ratio=2)
    return MaskRCNN(body, num_classes, **{**_two_stages(body), "mask_roi_pool": mask_pool, **kwargs})


def retinanet(
    name: str,
    num_classes: int = 91,
    out_indices: Sequence[int] = (1, 2, 3),
    backbone: Mapping[str, Any] | None = None,
    channels: int = 256,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet: boxes, in one stage; arguments and errors as in `fasterrcnn`."""
    body = BackboneWithFPN(name, out_indices, LastLevelP6P7(channels, channels), channels, **(backbone or {}))
    sizes = [[round(4 * stride * 2 ** (third / 3)) for third in range(3)] for stride in body.strides]
    return RetinaNet(body, num_classes, **{"anchor_generator": _anchors(sizes), **kwargs})


def _two_stages(body: BackboneWithFPN) -> dict[str, Any]:
    return dict(
        rpn_anchor_generator=_anchors([[8 * stride] for stride in body.strides]),
        box_roi_pool=MultiScaleRoIAlign(body.names, output_size=7, sampling_ratio=2),
    )


def _anchors(sizes: Sequence[Sequence[int]]) -> AnchorGenerator:
    """Three shapes for every size, and one list of sizes for every map; 32 pixels at stride 4, as torchvision has."""
    return AnchorGenerator(tuple(tuple(level) for level in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
