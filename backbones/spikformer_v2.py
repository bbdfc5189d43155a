"""Spikformer V2 (arXiv 2401.02020): Spikformer with a deeper, convolutional stem.

No code or weights are published. The blocks are Spikformer's; the stem follows the paper's words, and its kernels are
the ones with which the 16-layer model has the 172 M parameters that the abstract gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ..ops.partition import pad_map
from ._layers import BatchNorm, ConvNorm, init_linear
from ._registry import Family, build, register
from ._spiking import Lif, SpikingBackbone, SpikingStage, conv_norm, each_step, repeat
from .spikformer import Block

SPIKFORMER_V2 = Family(
    "spikformer_v2",
    "Spikformer V2",
    "https://arxiv.org/abs/2401.02020",
    "https://github.com/ZK-Zhou/spikformer",
    "MIT",
)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with four times the channels between them, spikes after each, and a residual."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.conv1, self.lif1 = conv_norm(dim, ratio * dim), Lif()
        self.conv2, self.lif2 = conv_norm(ratio * dim, dim), Lif()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lif2(each_step(self.conv2, self.lif1(each_step(self.conv1, x))))


def _pad_to_even(x: Tensor) -> Tensor:
    return pad_map(x, (2, 2))


class SpikingConvStem(nn.Module):
    """Four times: a 2x2 convolution of stride 2, which replaces max-pooling, spikes, a block of convolutions.

    Maps of odd size are padded on the right and bottom with zeros.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        widths = (in_chans, dim // 8, dim // 4, dim // 2, dim)
        pairs = list(itertools.pairwise(widths))
        self.downs = nn.ModuleList(ConvNorm(nn.Conv2d(a, b, 2, stride=2, bias=False), BatchNorm(b)) for a, b in pairs)
        self.lifs = nn.ModuleList(Lif() for _ in pairs)
        self.blocks = nn.ModuleList(ConvBlock(b) for _, b in pairs)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for i, (down, neurons, block) in enumerate(zip(self.downs, self.lifs, self.blocks, strict=True)):
            x = each_step(down, each_step(_pad_to_even, x))
            x = block(neurons(repeat(x, steps) if i == 0 else x))  # a still image is convolved once
        return x


class SpikformerV2(SpikingBackbone):
    """Spikformer V2: one stage of stride 16, in which the map keeps its size.

    Args:
        in_chans: image channels; event cameras have 2.
        dim: channels, a multiple of 8 and of `num_heads`.
        depths: blocks, one entry.
        timesteps: for which an image is shown.
    """

    stages_name = "stages"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 512,
        depths: Sequence[int] = (8,),
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % 8 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of 8 and of num_heads={num_heads}")
        if len(depths) != 1:
            raise ValueError(f"depths={depths} must have one entry")
        drops = calculate_drop_path_rates(drop_path_rate, depths[0])
        self.patch_embed = SpikingConvStem(in_chans, dim)
        blocks = [Block(dim, num_heads, mlp_ratio, False, drop) for drop in drops]
        self.stages = nn.ModuleList([SpikingStage(nn.Identity(), blocks)])
        self.build_spiking_head([dim], [16], num_classes, global_pool, drop_rate, timesteps)
        self.head.apply(init_linear)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """There are no published keys: ours as they are."""
        return state


_CONV = "patch_embed.downs.0.conv"


@register(SPIKFORMER_V2, params=29.1, gmacs=45.4, first_conv=_CONV)
def spikformer_v2_8_384(**kwargs: Any) -> nn.Module:
    """Spikformer V2-8-384."""
    return build(SpikformerV2, dict(dim=384, num_heads=6), kwargs)


@register(SPIKFORMER_V2, params=51.5, gmacs=80.6, top1=80.38, first_conv=_CONV)
def spikformer_v2_8_512(**kwargs: Any) -> nn.Module:
    """Spikformer V2-8-512."""
    return build(SpikformerV2, dict(), kwargs)


@register(SPIKFORMER_V2, params=172.3, gmacs=56.5, top1=81.10, first_conv=_CONV)
def spikformer_v2_16_768(**kwargs: Any) -> nn.Module:
    """Spikformer V2-16-768, which sees an image for one step; its accuracy is after self-supervised pre-training."""
    return build(SpikformerV2, dict(dim=768, num_heads=12, depths=(16,), timesteps=1), kwargs)
