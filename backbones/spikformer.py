"""Spikformer (arXiv 2209.15425): a transformer whose activations are spikes, attention without softmax.

`convert` reads the authors' files (https://github.com/ZK-Zhou/spikformer, MIT), of ImageNet and of CIFAR.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ._checkpoint import rename
from ._layers import init_linear
from ._registry import Family, build, register
from ._spiking import (
    DropPath,
    Lif,
    LinearNorm,
    MaxPool,
    SpikingBackbone,
    SpikingStage,
    conv_norm,
    each_step,
    repeat,
    spike_attention,
)

SPIKFORMER = Family(
    "spikformer", "Spikformer", "https://arxiv.org/abs/2209.15425", "https://github.com/ZK-Zhou/spikformer", "MIT"
)
SCALE = 0.125  # of the attention, in every size


class SpikingPatchEmbed(nn.Module):
    """Spiking patch splitting: four 3x3 convolutions that widen the map, max-pooled spikes, position as a convolution.

    Args:
        pools: after which of the four convolutions the map is halved.
    """

    def __init__(self, in_chans: int, dim: int, pools: Sequence[bool]) -> None:
        super().__init__()
        widths = (in_chans, dim // 8, dim // 4, dim // 2, dim)
        self.convs = nn.ModuleList(conv_norm(a, b) for a, b in itertools.pairwise(widths))
        self.lifs = nn.ModuleList(Lif() for _ in self.convs)
        self.pools = nn.ModuleList(MaxPool() if pool else nn.Identity() for pool in pools)
        self.rpe = conv_norm(dim, dim)
        self.rpe_lif = Lif()

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for i, (conv, neurons, pool) in enumerate(zip(self.convs, self.lifs, self.pools, strict=True)):
            x = each_step(conv, x)
            x = each_step(pool, neurons(repeat(x, steps) if i == 0 else x))  # a still image is convolved once
        return x + self.rpe_lif(each_step(self.rpe, x))


class SpikingSelfAttention(nn.Module):
    """`lif(scale * q (k^T v))` of spikes q, k, v: linear in the number of tokens."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (LinearNorm(dim, dim, bias=qkv_bias) for _ in range(3))
        self.q_lif, self.k_lif, self.v_lif = Lif(), Lif(), Lif()
        self.attn_lif = Lif(threshold=0.5)
        self.proj = LinearNorm(dim, dim, bias=True)
        self.proj_lif = Lif()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = each_step(self.q, x), each_step(self.k, x), each_step(self.v, x)
        y = spike_attention(self.q_lif(q), self.k_lif(k), self.v_lif(v), self.num_heads, SCALE)
        y = self.attn_lif(y)
        return self.proj_lif(each_step(self.proj, y))


class SpikingMlp(nn.Module):
    """Linear, batch norm, spikes; twice."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc1_lif = LinearNorm(dim, hidden_dim, bias=True), Lif()
        self.fc2, self.fc2_lif = LinearNorm(hidden_dim, dim, bias=True), Lif()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2_lif(each_step(self.fc2, self.fc1_lif(each_step(self.fc1, x))))


class Block(nn.Module):
    """Attention and MLP with residuals: the stream counts spikes."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path: float) -> None:
        super().__init__()
        self.attn = SpikingSelfAttention(dim, num_heads, qkv_bias)
        self.mlp = SpikingMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class Spikformer(SpikingBackbone):
    """Spikformer: one stage, in which the map keeps its size.

    Args:
        in_chans: image channels; event cameras have 2.
        dim: channels, a multiple of 8 and of `num_heads`.
        depths: blocks, one entry.
        qkv_bias: of the projections to q, k, v; the CIFAR models have it.
        pools: after which of the stem's four convolutions the map is halved; its stride is 2 to their number.
        timesteps: for which an image is shown.
        drop_path_rate: of the last block; 0 in the authors' code, which builds stochastic depth and does not apply it.
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
        qkv_bias: bool = False,
        pools: Sequence[bool] = (True, True, True, True),
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % 8 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of 8 and of num_heads={num_heads}")
        if len(depths) != 1 or len(pools) != 4:
            raise ValueError(f"depths={depths} must have one entry and pools={pools} four")
        drops = calculate_drop_path_rates(drop_path_rate, depths[0])
        self.patch_embed = SpikingPatchEmbed(in_chans, dim, pools)
        blocks = [Block(dim, num_heads, mlp_ratio, qkv_bias, drop) for drop in drops]
        self.stages = nn.ModuleList([SpikingStage(nn.Identity(), blocks)])
        self.build_spiking_head([dim], [2 ** sum(pools)], num_classes, global_pool, drop_rate, timesteps)
        self.head.apply(init_linear)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


_CONVERT = [
    (r"^block\.", "stages.0.blocks."),
    (r"^patch_embed\.(proj|rpe)_(conv|bn)(\d?)\.", r"patch_embed.\1\3.\2."),
    (r"^patch_embed\.proj\.", "patch_embed.convs.0."),
    (r"^patch_embed\.proj(\d)\.", r"patch_embed.convs.\1."),
    (r"\.(q|k|v|proj|fc1|fc2)_(?:conv|linear)\.", r".\1.linear."),
    (r"\.(q|k|v|proj|fc1|fc2)_bn\.", r".\1.norm."),
    (r"\.bn\.", ".norm."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]
UNUSED = re.compile(r"^block\.\d+\.(?:norm[12]|attn\.talking_heads)\.")  # layers that no forward of the authors runs


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> ours; their 1x1 convolutions are linear layers here.

    Left out are layers that their code builds and never runs.
    """
    converted = {rename(key, _CONVERT): value for key, value in state.items() if not UNUSED.match(key)}
    return {key: value.flatten(1) if key.endswith(".linear.weight") else value for key, value in converted.items()}


@register(SPIKFORMER, params=16.8, gmacs=18.8, first_conv="patch_embed.convs.0.conv")
def spikformer_8_384(**kwargs: Any) -> nn.Module:
    """Spikformer-8-384; its number of heads is not published: 64 channels each, as in the 512-channel one."""
    return build(Spikformer, dict(dim=384, num_heads=6), kwargs)


@register(SPIKFORMER, params=29.7, gmacs=33.2, first_conv="patch_embed.convs.0.conv")
def spikformer_8_512(**kwargs: Any) -> nn.Module:
    """Spikformer-8-512."""
    return build(Spikformer, dict(), kwargs)


@register(SPIKFORMER, params=66.3, gmacs=74.3, top1=74.81, first_conv="patch_embed.convs.0.conv")
def spikformer_8_768(**kwargs: Any) -> nn.Module:
    """Spikformer-8-768; its number of heads is not published: 64 channels each, as in the 512-channel one."""
    return build(Spikformer, dict(dim=768, num_heads=12), kwargs)


_CIFAR = dict(dim=384, num_heads=12, pools=(False, False, True, True))


@register(SPIKFORMER, params=9.7, gmacs=3.7, size=32, crop_pct=1.0, first_conv="patch_embed.convs.0.conv")
def spikformer_4_384_cifar(**kwargs: Any) -> nn.Module:
    """Spikformer-4-384 for images of 32 pixels."""
    return build(Spikformer, dict(_CIFAR, depths=(4,), qkv_bias=True), kwargs)


@register(SPIKFORMER, params=6.1, gmacs=2.8, size=32, crop_pct=1.0, first_conv="patch_embed.convs.0.conv")
def spikformer_2_384_cifar(**kwargs: Any) -> nn.Module:
    """Spikformer-2-384 for images of 32 pixels."""
    return build(Spikformer, dict(_CIFAR, depths=(2,), qkv_bias=True), kwargs)


@register(SPIKFORMER, params=0.8, gmacs=0.05, size=32, crop_pct=1.0, first_conv="patch_embed.convs.0.conv")
def spikformer_nano(**kwargs: Any) -> nn.Module:
    """Our own size for small images."""
    return build(Spikformer, dict(dim=128, depths=(2,), num_heads=4, pools=(True, True, True, False)), kwargs)
