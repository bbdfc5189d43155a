"""DaViT (arXiv 2204.03645): dual attention vision transformer.

Blocks come in pairs: attention between the tokens of a window, then attention between groups of channels over all
tokens. Parameter names are timm's; `convert` reads the authors' files (https://github.com/dingmyu/davit, MIT).
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ..ops import channel_attention, window_attention
from ..ops.partition import Size, pad_map, to_size
from ._base import Backbone, Stage
from ._checkpoint import rename
from ._layers import Mlp, PooledNormHead, channels_last_conv, image_to_map, init_linear
from ._registry import Family, build, register

DAVIT = Family("davit", "DaViT", "https://arxiv.org/abs/2204.03645", "https://github.com/dingmyu/davit", "MIT")


class Stem(nn.Module):
    """Image padded to multiples of 4, overlapping 7x7 patches of stride 4, layer norm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(channels_last_conv(self.conv, image_to_map(x, 4)))


class Downsample(nn.Module):
    """Layer norm, padding to even sizes with zeros, 2x2 convolution of stride 2."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last_conv(self.conv, pad_map(self.norm(x), (2, 2)))


class ConvPosEnc(nn.Module):
    """Depthwise 3x3 convolution with a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + channels_last_conv(self.proj, x)


class WindowAttention(nn.Module):
    """Attention inside windows, without shift or position bias; padded tokens hold the projection's bias."""

    def __init__(self, dim: int, num_heads: int, window: Size) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(window_attention(self.qkv(x), num_heads=self.num_heads, window=self.window, pad=self.qkv.bias))


class ChannelAttention(nn.Module):
    """Attention between the channels of each head."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(channel_attention(self.qkv(x).flatten(1, 2), num_heads=self.num_heads)).view_as(x)


class Block(nn.Module):
    """Position encoding, attention, position encoding, MLP."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.cpe1 = ConvPosEnc(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.cpe2 = ConvPosEnc(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.cpe2(x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DaViT(Backbone):
    """DaViT for any image size.

    Args:
        dims, depths, num_heads: width, pairs of blocks and heads (and channel groups) of the four stages.
        window: tokens per window, one number or (height, width).
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).

    Raises:
        ValueError: for arguments that do not fit together.
    """

    stem_name, stages_name = "stem", "stages"

    def __init__(
        self,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (1, 1, 3, 1),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int | Size = 7,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        window = to_size(window, "window")
        if not len(dims) == len(depths) == len(num_heads):
            raise ValueError(f"dims={dims}, depths={depths}, num_heads={num_heads} must have one entry per stage")
        drops = iter(calculate_drop_path_rates(drop_path_rate, 2 * sum(depths)))
        self.stem = Stem(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            pairs = [
                nn.Sequential(
                    Block(dim, WindowAttention(dim, heads, window), mlp_ratio, next(drops)),
                    Block(dim, ChannelAttention(dim, heads), mlp_ratio, next(drops)),
                )
                for _ in range(depth)
            ]
            self.stages.append(Stage(Downsample(dims[i - 1], dim) if i else nn.Identity(), pairs))
        self.norm = nn.Identity()  # the classifier normalises after pooling
        strides = [4 * 2**i for i in range(len(dims))]
        head = PooledNormHead(dims[-1], num_classes, None, global_pool, drop_rate)
        self.build_head(dims, strides, num_classes, global_pool, drop_rate, head)
        self.apply(init_linear)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


_CONVERT = [
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^norms\.(?=weight|bias)", "head.norm."),
    (r"^head\.(?=weight|bias)", "head.fc."),
    (r"^norm(\d)\.", r"norms.\1."),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> timm's and ours."""
    return {rename(key, _CONVERT): value for key, value in state.items()}


_LARGE = dict(dims=(192, 384, 768, 1536), depths=(1, 1, 9, 1), num_heads=(6, 12, 24, 48))


@register(DAVIT, params=28.4, gmacs=4.5, top1=82.8, crop_pct=0.9, first_conv="stem.conv")
def davit_tiny(**kwargs: Any) -> nn.Module:
    """DaViT-T."""
    return build(DaViT, dict(), kwargs)


@register(DAVIT, params=49.7, gmacs=8.8, top1=84.2, crop_pct=0.9, first_conv="stem.conv")
def davit_small(**kwargs: Any) -> nn.Module:
    """DaViT-S."""
    return build(DaViT, dict(depths=(1, 1, 9, 1)), kwargs)


@register(DAVIT, params=88.0, gmacs=15.5, top1=84.6, crop_pct=0.9, first_conv="stem.conv")
def davit_base(**kwargs: Any) -> nn.Module:
    """DaViT-B."""
    arch = dict(dims=(128, 256, 512, 1024), depths=(1, 1, 9, 1), num_heads=(4, 8, 16, 32))
    return build(DaViT, arch, kwargs)


@register(DAVIT, params=196.8, gmacs=34.6, crop_pct=0.9, first_conv="stem.conv")
def davit_large(**kwargs: Any) -> nn.Module:
    """DaViT-L; no weights are published."""
    return build(DaViT, dict(_LARGE), kwargs)


@register(DAVIT, params=196.8, gmacs=103.0, size=384, crop_pct=1.0, first_conv="stem.conv")
def davit_large_window12_384(**kwargs: Any) -> nn.Module:
    """DaViT-L with window 12 at 384x384."""
    return build(DaViT, dict(_LARGE, window=12), kwargs)


@register(DAVIT, params=348.9, gmacs=61.2, crop_pct=0.9, first_conv="stem.conv")
def davit_huge(**kwargs: Any) -> nn.Module:
    """DaViT-H; no weights are published."""
    arch = dict(dims=(256, 512, 1024, 2048), depths=(1, 1, 9, 1), num_heads=(8, 16, 32, 64))
    return build(DaViT, arch, kwargs)


@register(DAVIT, params=1406.5, gmacs=192.7, crop_pct=0.9, first_conv="stem.conv")
def davit_giant(**kwargs: Any) -> nn.Module:
    """DaViT-G; no weights are published."""
    arch = dict(dims=(384, 768, 1536, 3072), depths=(1, 1, 12, 3), num_heads=(12, 24, 48, 96))
    return build(DaViT, arch, kwargs)
