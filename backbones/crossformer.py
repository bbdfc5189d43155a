"""CrossFormer (arXiv 2108.00154) and CrossFormer++ (arXiv 2303.06908).

Patches of several sizes, and attention that alternates between windows (short distance) and dilated groups (long
distance) with a position bias computed by a network, so that no parameter depends on the image or group size. ++ adds
group sizes that grow with depth and layers that cool the amplitude of the stream. `convert` reads the authors' files
(https://github.com/cheerss/CrossFormer, MIT).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ..ops import window_attention
from ..ops.partition import Size, pad_map
from ..ops.position import DynamicPositionBias
from ._base import Backbone, Stage
from ._layers import Mlp, channels_last_conv, image_to_map, init_linear
from ._registry import Family, build, register

CROSSFORMER = Family(
    "crossformer", "CrossFormer", "https://arxiv.org/abs/2108.00154", "https://github.com/cheerss/CrossFormer", "MIT"
)
CROSSFORMER_PP = Family(
    "crossformer_pp",
    "CrossFormer++",
    "https://arxiv.org/abs/2303.06908",
    "https://github.com/cheerss/CrossFormer",
    "MIT",
)
PATCH_SIZES = (4, 8, 16, 32)
FIRST_CONVS = tuple(f"patch_embed.projs.{i}" for i in range(len(PATCH_SIZES)))


class CrossScaleEmbed(nn.Module):
    """Patches of 4, 8, 16 and 32 pixels, all at stride 4, concatenated: the larger the patch, the fewer channels."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.projs = nn.ModuleList()
        for i, patch in enumerate(PATCH_SIZES):
            width = dim // 2 ** min(i + 1, len(PATCH_SIZES) - 1)
            self.projs.append(nn.Conv2d(in_chans, width, patch, stride=4, padding=(patch - 4) // 2))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = image_to_map(x, 4)
        return self.norm(torch.cat([channels_last_conv(proj, x) for proj in self.projs], dim=-1))


class PatchMerging(nn.Module):
    """Layer norm, padding to even sizes, then 2x2 and 4x4 convolutions of stride 2 side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reductions = nn.ModuleList(
            nn.Conv2d(dim, dim, patch, stride=2, padding=(patch - 2) // 2) for patch in (2, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(self.norm(x), (2, 2))
        return torch.cat([channels_last_conv(conv, x) for conv in self.reductions], dim=-1)


class GroupAttention(nn.Module):
    """Attention inside windows or dilated groups with a dynamic position bias; padded keys are masked."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pos = DynamicPositionBias(dim // 16, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, group: int, interval: int) -> Tensor:
        x = window_attention(
            self.qkv(x),
            self.bias_table(group),
            num_heads=self.num_heads,
            window=group,
            interval=interval,
            mask_padding=True,
        )
        return self.proj(x)

    def bias_table(self, group: int) -> Tensor:
        """The position bias `((2 * group - 1) ** 2, num_heads)`."""
        return self.pos((group, group))


class Block(nn.Module):
    """Attention and MLP, each after a norm and with a residual; then, with `cooling`, a depthwise convolution and a
    norm that replace the stream."""

    def __init__(
        self, dim: int, num_heads: int, group: int, interval: int, mlp_ratio: float, drop_path: float, cooling: bool,
        dense: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.group, self.interval, self.dense = group, interval, dense
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if cooling else None
        self.ex_ln = nn.LayerNorm(dim) if cooling else None

    def grouping(self, height: int, width: int) -> tuple[int, int]:
        """Group size and interval for a map of this size.

        Where one group holds the map's shorter side there is one kind of attention only, in windows of that side; the
        authors' dense-prediction code takes the longer side, so that one window holds the map.
        """
        if min(height, width) > self.group:
            return self.group, self.interval
        return (max if self.dense else min)(height, width), 1

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), *self.grouping(x.shape[1], x.shape[2])))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.ex_conv is None or self.ex_ln is None:
            return x
        return self.ex_ln(channels_last_conv(self.ex_conv, x))


class CrossFormer(Backbone):
    """CrossFormer and CrossFormer++ for any image size.

    Args:
        dim: width of the first stage; depths, num_heads: of the four stages.
        group_size: tokens per side of a group, per stage.
        interval: distance between the tokens of a long-distance group, per stage.
        cooling: amplitude cooling after every third block (++).
        img_size: size that the configuration describes; nothing depends on it.
        dense: group small maps as the authors' detection code does, see `Block.grouping`; `features_only=True` sets it.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).

    Raises:
        ValueError: for arguments that do not fit together.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        group_size: tuple[int, ...] = (7, 7, 7, 7),
        interval: tuple[int, ...] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        cooling: bool = False,
        img_size: int | Size = 224,
        dense: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        per_stage = dict(depths=depths, num_heads=num_heads, group_size=group_size, interval=interval)
        if len({len(v) for v in per_stage.values()}) > 1 or min(*group_size, *interval) < 1:
            raise ValueError(f"{per_stage}: one positive number for each stage")
        dims = [dim * 2**i for i in range(len(depths))]
        drops = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = CrossScaleEmbed(in_chans, dim)
        self.layers = nn.ModuleList()
        for i, (width, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            blocks = []
            for j in range(depth):
                cool = cooling and (j + 1) % 3 == 0 and j < depth - 1
                distance = interval[i] if j % 2 else 1
                blocks.append(Block(width, heads, group_size[i], distance, mlp_ratio, next(drops), cool, dense))
            self.layers.append(Stage(PatchMerging(width // 2) if i else nn.Identity(), blocks))
        self.norm = nn.LayerNorm(dims[-1])
        self.build_head(dims, [4 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


DERIVED = ("attn.biases", "relative_position_index", "attn_mask")


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> ours: there, `downsample` ends a stage, the classifier is `head`, old files hold tables."""
    ours = any(key.startswith("head.fc.") for key in state) or not any(
        key.startswith("layers.0.downsample.") for key in state
    )
    out = {}
    for key, value in state.items():
        if key.endswith(DERIVED):
            continue
        if not ours:
            key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
        out[re.sub(r"^head\.(?!fc\.)", "head.fc.", key)] = value
    return out


def _build(arch: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    return build(CrossFormer, {**arch, "dense": kwargs.get("features_only", False)}, kwargs)


_SMALL = dict(dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
_BASE = dict(dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
_LARGE = dict(dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
_PP = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), cooling=True)


@register(CROSSFORMER, params=27.8, gmacs=2.9, top1=81.5, first_conv=FIRST_CONVS)
def crossformer_tiny(**kwargs: Any) -> nn.Module:
    """CrossFormer-T."""
    return _build(dict(dim=64, depths=(1, 1, 8, 6), num_heads=(2, 4, 8, 16)), kwargs)


@register(CROSSFORMER, params=30.7, gmacs=4.9, top1=82.5, first_conv=FIRST_CONVS)
def crossformer_small(**kwargs: Any) -> nn.Module:
    """CrossFormer-S."""
    return _build(dict(_SMALL), kwargs)


@register(CROSSFORMER, params=52.0, gmacs=9.2, top1=83.4, first_conv=FIRST_CONVS)
def crossformer_base(**kwargs: Any) -> nn.Module:
    """CrossFormer-B."""
    return _build(dict(_BASE), kwargs)


@register(CROSSFORMER, params=92.0, gmacs=16.1, top1=84.0, first_conv=FIRST_CONVS)
def crossformer_large(**kwargs: Any) -> nn.Module:
    """CrossFormer-L."""
    return _build(dict(_LARGE), kwargs)


@register(CROSSFORMER_PP, params=23.3, gmacs=4.9, top1=83.2, first_conv=FIRST_CONVS)
def crossformer_pp_small(**kwargs: Any) -> nn.Module:
    """CrossFormer++-S."""
    return _build(dict(_PP, dim=64, depths=(2, 2, 18, 2), num_heads=(2, 4, 8, 16)), kwargs)


@register(CROSSFORMER_PP, params=52.0, gmacs=9.5, top1=84.2, first_conv=FIRST_CONVS)
def crossformer_pp_base(**kwargs: Any) -> nn.Module:
    """CrossFormer++-B."""
    return _build(dict(_BASE, **_PP), kwargs)


@register(CROSSFORMER_PP, params=92.0, gmacs=16.6, top1=84.7, first_conv=FIRST_CONVS)
def crossformer_pp_large(**kwargs: Any) -> nn.Module:
    """CrossFormer++-L."""
    return _build(dict(_LARGE, **_PP), kwargs)


@register(CROSSFORMER_PP, params=96.0, gmacs=21.8, top1=84.9, first_conv=FIRST_CONVS)
def crossformer_pp_huge(**kwargs: Any) -> nn.Module:
    """CrossFormer++-H."""
    return _build(dict(_LARGE, depths=(6, 6, 18, 2), **_PP), kwargs)
