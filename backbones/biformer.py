"""BiFormer (arXiv 2303.08810): vision transformer with bi-level routing attention.

The map is cut into a fixed number of regions; every region attends to the few regions most like it. Stages 1 to 3 are
routed, stage 4 attends to everything. `convert` reads the authors' files (https://github.com/rayleizhu/BiFormer, MIT).
"""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ..ops import route_regions, routing_attention
from ..ops.partition import Size, crop, pad_map, to_size
from ._base import Backbone, Stage
from ._checkpoint import rename
from ._layers import BatchNorm, ConvNorm, Mlp, channels_last_conv, image_to_map, init_linear
from ._registry import Family, build, register

BIFORMER = Family(
    "biformer", "BiFormer", "https://arxiv.org/abs/2303.08810", "https://github.com/rayleizhu/BiFormer", "MIT"
)
FULL = 0  # top-k of a stage that attends to everything


class BiLevelRoutingAttention(nn.Module):
    """Attention to the top-k regions, plus a depthwise 5x5 convolution of the values (LePE).

    The map is padded before the projection, so that padded tokens hold its bias, enter the region means and can be
    attended to; regions are `1 / num_regions` of the padded map. With `exact_means` (the authors' refactored code) it
    is padded with zeros after the projection, regions have `H // num_regions` tokens, and means skip the padding.
    """

    def __init__(self, dim: int, num_heads: int, num_regions: Size, topk: int, exact_means: bool) -> None:
        super().__init__()
        self.num_heads, self.num_regions, self.topk, self.exact_means = num_heads, num_regions, topk, exact_means
        self.scale = dim**-0.5  # of the whole width, not of a head
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, c = x.shape
        qkv, region = self.project(x)
        routes = route_regions(qkv, region=region, topk=self.topk, scale=self.scale)
        out = routing_attention(qkv, routes, num_heads=self.num_heads, region=region, scale=self.scale)
        out = out + channels_last_conv(self.lepe, qkv[..., 2 * c :])
        return self.proj(crop(out, (h, w)))

    def project(self, x: Tensor) -> tuple[Tensor, Size]:
        """q, k, v of the (padded) map and the size of a region."""
        qkv = self.qkv(x)
        if self.exact_means:
            h, w = x.shape[1:3]
            if h < self.num_regions[0] or w < self.num_regions[1]:
                raise ValueError(
                    f"a {h}x{w} map cannot be cut into num_regions={self.num_regions};"
                    " pass fewer regions or a larger image"
                )
            return qkv, (h // self.num_regions[0], w // self.num_regions[1])
        qkv = pad_map(qkv, self.num_regions, self.qkv.bias)
        return qkv, (qkv.shape[1] // self.num_regions[0], qkv.shape[2] // self.num_regions[1])

    def routes(self, x: Tensor) -> Tensor:
        """The regions each region of the map `(B, H, W, C)` is routed to: `(B, R, topk)` int64."""
        qkv, region = self.project(x)
        return route_regions(qkv, region=region, topk=self.topk, scale=self.scale)


class FullAttention(nn.Module):
    """Attention of all tokens to all, plus a depthwise 5x5 convolution of the input (`lepe_values`: of the values)."""

    def __init__(self, dim: int, num_heads: int, lepe_values: bool) -> None:
        super().__init__()
        self.num_heads, self.lepe_values = num_heads, lepe_values
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.view(b, h * w, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c)
        lepe = channels_last_conv(self.lepe, qkv[..., 2 * c :] if self.lepe_values else x)
        return self.proj(out + lepe)


class Block(nn.Module):
    """Depthwise 3x3 position embedding (not in the STL models), attention and MLP, each with a residual."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, pos_embed: bool) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + channels_last_conv(self.pos_embed, x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiFormer(Backbone):
    """BiFormer for any image size.

    Args:
        dims, depths: width and number of blocks of the four stages.
        topks: regions each region attends to, per stage; 0 for full attention.
        num_regions: regions per side of the map (the authors' `n_win`), one number or (height, width). No parameter
            depends on it: the authors use 7 at 224x224, 8 for segmentation at 512x512, 16 for detection at 800x1333.
        mlp_ratio: hidden width of the MLP over its width.
        swin_layout: the STL models: 4x4 patches, 2x2 downsampling, no position embedding.
        exact_means: the authors' refactored attention (`biformer_stl_nchw`): see `BiLevelRoutingAttention`.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).

    Raises:
        ValueError: for arguments that do not fit together.
    """

    stem_name, stages_name = "stem", "stages"

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        topks: tuple[int, ...] = (1, 4, 16, FULL),
        num_regions: int | Size = 7,
        mlp_ratio: float = 3.0,
        head_dim: int = 32,
        swin_layout: bool = False,
        exact_means: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        regions = to_size(num_regions, "num_regions")
        if not len(dims) == len(depths) == len(topks):
            raise ValueError(f"dims={dims}, depths={depths}, topks={topks} must have one entry per stage")
        if wrong := [dim for dim, topk in zip(dims, topks, strict=True) if topk != FULL and dim % head_dim]:
            raise ValueError(
                f"dims={dims}: {wrong[0]} is no multiple of head_dim={head_dim}; pass a head_dim that fits"
            )
        if max(topks) > regions[0] * regions[1]:
            raise ValueError(f"topks={topks} exceed the {regions[0]}x{regions[1]} regions; pass a larger num_regions")
        drops = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stem = Stem(in_chans, dims[0], swin_layout)
        self.stages = nn.ModuleList()
        for i, (dim, depth, topk) in enumerate(zip(dims, depths, topks, strict=True)):
            blocks = []
            for _ in range(depth):
                attn = (
                    FullAttention(dim, 8, lepe_values=exact_means)
                    if topk == FULL
                    else BiLevelRoutingAttention(dim, dim // head_dim, regions, topk, exact_means)
                )
                blocks.append(Block(dim, attn, mlp_ratio, next(drops), pos_embed=not swin_layout))
            self.stages.append(Stage(_downsample(dims[i - 1], dim, swin_layout) if i else nn.Identity(), blocks))
        self.norm = BatchNorm(dims[-1])
        self.build_head(dims, [4 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def feature_norm(self, dim: int) -> nn.Module:
        """The authors' `extra_norms`."""
        return nn.LayerNorm(dim, eps=1e-6)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


class Stem(nn.Module):
    """Image `(B, in_chans, H, W)` -> `(B, H / 4, W / 4, dim)`: two 3x3 convolutions, or one of 4x4 patches."""

    def __init__(self, in_chans: int, dim: int, swin_layout: bool) -> None:
        super().__init__()
        self.conv1 = (
            ConvNorm(nn.Conv2d(in_chans, dim, 4, stride=4), BatchNorm(dim))
            if swin_layout
            else ConvNorm(nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), BatchNorm(dim // 2))
        )
        self.conv2 = None if swin_layout else ConvNorm(nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1), BatchNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(image_to_map(x))
        return x if self.conv2 is None else self.conv2(F.gelu(x))


def _downsample(dim: int, out_dim: int, swin_layout: bool) -> ConvNorm:
    if swin_layout:
        return ConvNorm(nn.Conv2d(dim, out_dim, 2, stride=2), BatchNorm(dim), norm_first=True)
    return ConvNorm(nn.Conv2d(dim, out_dim, 3, stride=2, padding=1), BatchNorm(out_dim))


_CONVERT = [
    (r"^downsample_layers\.0\.0\.", "stem.conv1.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.conv1.norm."),
    (r"^downsample_layers\.0\.3\.", "stem.conv2.conv."),
    (r"^downsample_layers\.0\.4\.", "stem.conv2.norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^extra_norms\.", "norms."),
    (r"^head\.(?!fc\.)", "head.fc."),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> ours; 1x1 convolutions of the refactored code become linear layers."""
    order = {}  # of the two layers of each downsampling: the STL models normalise first
    for i in range(1, 9):
        first = state.get(f"downsample_layers.{i}.0.weight")
        if first is not None:
            order[str(i)] = ("norm", "conv") if first.ndim == 1 else ("conv", "norm")
    out = {}
    for key, value in state.items():
        key = rename(key, _CONVERT)
        if match := re.match(r"^downsample_layers\.(\d+)\.([01])\.(.*)", key):
            key = f"stages.{match[1]}.downsample.{order[match[1]][int(match[2])]}.{match[3]}"
        if key.endswith((".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight")):
            value = value.flatten(1)
        out[key] = value
    return out


_SMALL = dict(depths=(4, 4, 18, 4))
_STL = dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), mlp_ratio=4.0, swin_layout=True)


@register(BIFORMER, params=2.1, gmacs=0.03, size=64, first_conv="stem.conv1.conv")
def biformer_nano(**kwargs: Any) -> nn.Module:
    """Our own size for small images: 4x4 regions at 64x64."""
    return build(
        BiFormer, dict(dims=(32, 64, 128, 256), depths=(1, 1, 4, 1), topks=(1, 2, 4, FULL), num_regions=4), kwargs
    )


@register(BIFORMER, params=13.1, gmacs=2.2, top1=81.4, first_conv="stem.conv1.conv")
def biformer_tiny(**kwargs: Any) -> nn.Module:
    """BiFormer-T."""
    return build(BiFormer, dict(), kwargs)


@register(BIFORMER, params=25.5, gmacs=4.5, top1=83.8, first_conv="stem.conv1.conv")
def biformer_small(**kwargs: Any) -> nn.Module:
    """BiFormer-S."""
    return build(BiFormer, dict(_SMALL), kwargs)


@register(BIFORMER, params=56.8, gmacs=9.8, top1=84.3, first_conv="stem.conv1.conv")
def biformer_base(**kwargs: Any) -> nn.Module:
    """BiFormer-B."""
    return build(BiFormer, dict(_SMALL, dims=(96, 192, 384, 768)), kwargs)


@register(BIFORMER, params=28.4, gmacs=4.6, top1=82.7, first_conv="stem.conv1.conv")
def biformer_stl(**kwargs: Any) -> nn.Module:
    """BiFormer-STL: routing attention in Swin-T's layout."""
    return build(BiFormer, dict(_STL), kwargs)


@register(BIFORMER, params=28.4, gmacs=4.6, top1=82.7, first_conv="stem.conv1.conv")
def biformer_stl_nchw(**kwargs: Any) -> nn.Module:
    """BiFormer-STL as the authors refactored it; equal to it only in shape."""
    return build(BiFormer, dict(_STL, exact_means=True), kwargs)
