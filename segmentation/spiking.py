"""Semantic FPN's neck and head in spikes, for mmsegmentation.

Sources: the segmentation code of BICLab/Spike-Driven-Transformer-V2 (arXiv 2404.03663) and of bollossom/QSD-Transformer
(arXiv 2501.13492), which differ in the neurons. Every layer reads the spikes of neurons in front of it. Both see one
time step, the mean maps of the backbone.

    custom_imports = dict(imports=["striate.segmentation.mmseg", "striate.segmentation.spiking"], …)
    model = dict(neck=dict(type="SpikeFPN"), decode_head=dict(type="SpikeFPNHead"), …)
"""

from __future__ import annotations

from typing import Any

from mmseg.models.decode_heads import FPNHead
from mmseg.models.necks import FPN
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..detection._spiking import Spikes, behind_spikes, put_behind_spikes
from ..ops import multispike


class IntegerSpikes(nn.Module):
    """Up to `levels` spikes at once, `round(clamp(x, 0, levels))`, of `1 / levels` each."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return multispike(x / self.levels, levels=self.levels)


def _neuron(levels: int) -> nn.Module:
    return Spikes() if levels == 1 else IntegerSpikes(levels)


@MODELS.register_module()
class SpikeFPN(FPN):
    """Feature pyramid whose convolutions read spikes; the arguments are those of mmsegmentation's `FPN`, and more.

    Args:
        levels: 1 for leaky integrate-and-fire neurons (Meta-SpikeFormer), else the most spikes of integer neurons
            (QSD-Transformer).
    """

    def __init__(self, *args: Any, levels: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for convs in (self.lateral_convs, self.fpn_convs):
            put_behind_spikes(convs, lambda: _neuron(levels))


@MODELS.register_module()
class SpikeFPNHead(FPNHead):
    """Semantic FPN's head whose convolutions read spikes; the arguments are those of `FPNHead`, and more.

    Args:
        levels: as for `SpikeFPN`.
    """

    def __init__(self, *args: Any, levels: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for i, (stride, layers) in enumerate(zip(self.feature_strides, self.scale_heads, strict=True)):
            size = 1 if stride == self.feature_strides[0] else 2  # a convolution, and what doubles the map
            steps = [layers[k : k + size] for k in range(0, len(layers), size)]
            self.scale_heads[i] = nn.Sequential(*(behind_spikes(*step, neuron=_neuron(levels)) for step in steps))
        self.decode_lif = _neuron(levels)

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Sum of all levels `(B, channels, H, W)` -> logits `(B, classes, H, W)`."""
        return super().cls_seg(self.decode_lif(feat))
