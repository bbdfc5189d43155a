"""Mask R-CNN's neck and heads in spikes, for mmdetection.

Source: "Spike-driven Transformer V2" (arXiv 2404.03663), the detector of BICLab/Spike-Driven-Transformer-V2. Every
layer reads the spikes of neurons in front of it, but for the last linear ones of the boxes. The authors' heads can
iterate over time steps; their published detectors have one, and so have these: a backbone of several gives mean maps.

    custom_imports = dict(imports=["striate.detection.mmdet", "striate.detection.spiking"], allow_failed_imports=False)
    model = dict(neck=dict(type="SpikeFPN"), rpn_head=dict(type="SpikeRPNHead"), …)
"""

from __future__ import annotations

from typing import Any

from mmdet.models.dense_heads import RPNHead
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import MODELS
from torch import Tensor, nn

from ._spiking import behind_spikes, put_behind_spikes


@MODELS.register_module()
class SpikeFPN(FPN):
    """Feature pyramid whose convolutions read spikes; the arguments are those of mmdetection's `FPN`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        put_behind_spikes(self.lateral_convs)
        put_behind_spikes(self.fpn_convs)


@MODELS.register_module()
class SpikeRPNHead(RPNHead):
    """Region proposals out of spikes; the arguments are those of mmdetection's `RPNHead`."""

    rpn_conv: nn.Module
    rpn_cls: nn.Module
    rpn_reg: nn.Module

    def _init_layers(self) -> None:
        super()._init_layers()
        convs = self.rpn_conv if isinstance(self.rpn_conv, nn.Sequential) else [self.rpn_conv]
        behind = [behind_spikes(conv) for conv in convs]
        self.rpn_conv = nn.Sequential(*behind) if len(behind) > 1 else behind[0]
        self.rpn_cls, self.rpn_reg = behind_spikes(self.rpn_cls), behind_spikes(self.rpn_reg)

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(B, C, H, W)` -> scores `(B, anchors, H, W)` and boxes `(B, 4 * anchors, H, W)`."""
        x = self.rpn_conv(x)
        return self.rpn_cls(x), self.rpn_reg(x)


@MODELS.register_module()
class SharedSpike2FCBBoxHead(Shared2FCBBoxHead):
    """Classes and boxes of regions out of spikes; the arguments are those of mmdetection's `Shared2FCBBoxHead`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        put_behind_spikes(self.shared_fcs)
        self.relu = nn.Identity()


@MODELS.register_module()
class SpikeFCNMaskHead(FCNMaskHead):
    """Masks of regions out of spikes; the arguments are those of mmdetection's `FCNMaskHead`."""

    upsample: nn.Module | None
    conv_logits: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        put_behind_spikes(self.convs)
        if self.upsample is not None:
            self.upsample = behind_spikes(self.upsample)
        self.conv_logits = behind_spikes(self.conv_logits)
        self.relu = nn.Identity()
