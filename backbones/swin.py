"""Swin Transformer (arXiv 2103.14030) and Swin Transformer V2 (arXiv 2111.09883).

Attention inside windows that shift by half their size in every other block, over a pyramid that halves the map and
doubles the width between stages. Parameter names are timm's; `convert` reads Microsoft's and the detection
repository's files (https://github.com/microsoft/Swin-Transformer, MIT).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..ops import window_attention
from ..ops.partition import Size, pad_map, to_size
from ..ops.position import log_coordinates, resize_bias_table
from ._base import Backbone, Stage
from ._checkpoint import logger
from ._layers import Mlp, channels_last_conv, image_to_map, init_linear
from ._registry import Family, build, register

V1 = Family(
    "swin",
    "Swin Transformer",
    "https://arxiv.org/abs/2103.14030",
    "https://github.com/microsoft/Swin-Transformer",
    "MIT",
)
V2 = Family(
    "swinv2",
    "Swin Transformer V2",
    "https://arxiv.org/abs/2111.09883",
    "https://github.com/microsoft/Swin-Transformer",
    "MIT",
)


class PatchEmbed(nn.Module):
    """Non-overlapping 4x4 patches; the image is padded to multiples of 4."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(channels_last_conv(self.proj, image_to_map(x, 4)))


class PatchMerging(nn.Module):
    """2x2 neighbours concatenated and projected to twice the width; odd maps are padded by a row or column of zeros."""

    def __init__(self, dim: int, norm_after: bool) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if norm_after else 4 * dim)
        self.norm_after = norm_after

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, (2, 2))
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.norm(self.reduction(x)) if self.norm_after else self.reduction(self.norm(x))


class WindowAttention(nn.Module):
    """Scaled dot-product attention with a learned relative position bias."""

    def __init__(self, dim: int, num_heads: int, window: Size) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.relative_position_bias_table = nn.Parameter(
            trunc_normal_(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), num_heads), std=0.02)
        )
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, shift: Size) -> Tensor:
        x = window_attention(
            self.qkv(x),
            self.relative_position_bias_table,
            num_heads=self.num_heads,
            window=self.window,
            shift=shift,
            pad=self.qkv.bias,
        )
        return self.proj(x)


class CosineWindowAttention(nn.Module):
    """Scaled cosine attention with a log-spaced continuous position bias."""

    relative_coords_table: Tensor

    def __init__(self, dim: int, num_heads: int, window: Size, pretrained_window: Size | None) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        table = log_coordinates(window, pretrained_window)
        self.register_buffer("relative_coords_table", table, persistent=False)

    def forward(self, x: Tensor, shift: Size) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        x = window_attention(
            F.linear(x, self.qkv.weight, bias),
            self.bias_table(),
            num_heads=self.num_heads,
            window=self.window,
            shift=shift,
            scale=self.logit_scale.clamp(max=math.log(100)).exp().flatten(),
            cosine=True,
            pad=bias,
        )
        return self.proj(x)

    def bias_table(self) -> Tensor:
        """The position bias `(rows, num_heads)`, between 0 and 16."""
        return 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table.to(self.qkv.weight.dtype)))


class Block(nn.Module):
    """Window attention and MLP, each with a residual; V1 normalises before, V2 after."""

    def __init__(
        self, dim: int, attn: WindowAttention | CosineWindowAttention, mlp_ratio: float, shifted: bool, dense: bool,
        drop_path: float, post_norm: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shifted, self.dense, self.post_norm = shifted, dense, post_norm

    def shift(self, height: int, width: int) -> Size:
        """Half a window in every other block. The classification code does not shift a map that is a single window
        high or wide; the dense-prediction code always does."""
        window = self.attn.window
        if not self.shifted or not (self.dense or (height > window[0] and width > window[1])):
            return 0, 0
        return window[0] // 2, window[1] // 2

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        shift = self.shift(h, w)
        if self.post_norm:
            x = x + self.drop_path(self.norm1(self.attn(x, shift)))
            return x + self.drop_path(self.norm2(self.mlp(x)))
        x = x + self.drop_path(self.attn(self.norm1(x), shift))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Swin(Backbone):
    """Swin Transformer, V1 or V2.

    Any image size works: maps are padded to whole windows, then shifted, as in the authors' detection code. At its
    native size the classifier computes what the authors' classification code does.

    Args:
        dim: width of the first stage; depths, num_heads: of the four stages.
        window: tokens per window, one number or (height, width).
        img_size: native image size. A stage whose native map is smaller than the window gets a window of the map's
            size, as published; other image sizes still work, with these windows.
        version: 1, or 2 for cosine attention, post-norm and continuous position bias.
        pretrained_window: V2: window of each stage during pre-training (0 or None: the window itself), which scales
            the coordinates of the bias network.
        dense: always shift, as the detection code does; the default follows the classification code, and
            `features_only=True` sets it.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).

    Raises:
        ValueError: for arguments that do not fit together.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int | Size = 7,
        img_size: int | Size = 224,
        version: int = 1,
        pretrained_window: tuple[int, ...] | None = None,
        mlp_ratio: float = 4.0,
        dense: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads) or version not in (1, 2):
            raise ValueError(
                f"depths={depths}, num_heads={num_heads}, version={version}: one number of heads per stage, 1 or 2"
            )
        window, size = to_size(window, "window"), to_size(img_size, "img_size")
        dims = [dim * 2**i for i in range(len(depths))]
        strides = [4 * 2**i for i in range(len(depths))]
        drops = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = PatchEmbed(in_chans, dim)
        self.layers = nn.ModuleList()
        for i, (width, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            stage_window = native_window(window, (math.ceil(size[0] / strides[i]), math.ceil(size[1] / strides[i])))
            trained = (
                to_size(pretrained_window[i], "pretrained_window")
                if pretrained_window and pretrained_window[i]
                else None
            )
            blocks = []
            for j in range(depth):
                attn = (
                    WindowAttention(width, heads, stage_window)
                    if version == 1
                    else CosineWindowAttention(width, heads, stage_window, trained)
                )
                blocks.append(Block(width, attn, mlp_ratio, j % 2 == 1, dense, next(drops), version == 2))
            self.layers.append(Stage(PatchMerging(width // 2, version == 2) if i else nn.Identity(), blocks))
        self.norm = nn.LayerNorm(dims[-1])
        self.build_head(dims, strides, num_classes, global_pool, drop_rate)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        init_linear(module)
        if isinstance(module, Block) and module.post_norm:  # V2 blocks start as identities
            nn.init.zeros_(module.norm1.weight)
            nn.init.zeros_(module.norm2.weight)

    def no_weight_decay(self) -> set[str]:
        """Position biases, and the logit scale of V2."""
        words = ("relative_position_bias_table", "cpb_mlp", "logit_scale")
        return {name for name, _ in self.named_parameters() if any(word in name for word in words)}

    def adapt(self, key: str, value: Tensor) -> Tensor:
        """Resize a bias table from another (square) window."""
        if not key.endswith("relative_position_bias_table"):
            return value
        old = (math.isqrt(value.shape[0]) + 1) // 2
        window: Size = self.get_submodule(key.rpartition(".")[0]).window  # type: ignore[assignment]
        logger.warning("resized %s from window %d to %dx%d", key, old, *window)
        return resize_bias_table(value, (old, old), window)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


def native_window(window: Size, map_size: Size) -> Size:
    """The window of a stage whose native map is `map_size`: no larger than the map, and square if `window` is."""
    if window[0] == window[1]:
        side = min(window[0], *map_size)
        return side, side
    return min(window[0], map_size[0]), min(window[1], map_size[1])


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the classification and detection repositories -> timm's and ours.

    There, `downsample` ends a stage, the classifier is `head`, output norms are `norm0` to `norm3`, and index tables,
    coordinates and masks are saved although they follow from the configuration.
    """
    if any(key.startswith("head.fc.") or key.startswith("layers.1.downsample.norm") for key in state) and not any(
        key.startswith("layers.0.downsample.") for key in state
    ):
        return {k: v for k, v in state.items() if not k.endswith(DERIVED)}
    out = {}
    for key, value in state.items():
        if key.endswith(DERIVED):
            continue
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
        key = re.sub(r"^norm(\d)\.", r"norms.\1.", key)
        out[re.sub(r"^head\.(?!fc\.)", "head.fc.", key)] = value
    return out


DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")


def _build(arch: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    return build(Swin, {**arch, "dense": kwargs.get("features_only", False)}, kwargs)


_TINY = dict(dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
_SMALL = dict(dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
_BASE = dict(dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
_LARGE = dict(dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))


@register(V1, params=28.3, gmacs=4.5, top1=81.2, crop_pct=0.9)
def swin_tiny(**kwargs: Any) -> nn.Module:
    """Swin-T: window 7 at 224x224."""
    return _build(dict(_TINY), kwargs)


@register(V1, params=49.6, gmacs=8.7, top1=83.2, crop_pct=0.9)
def swin_small(**kwargs: Any) -> nn.Module:
    """Swin-S: window 7 at 224x224."""
    return _build(dict(_SMALL), kwargs)


@register(V1, params=87.8, gmacs=15.4, top1=83.5, crop_pct=0.9)
def swin_base(**kwargs: Any) -> nn.Module:
    """Swin-B: window 7 at 224x224."""
    return _build(dict(_BASE), kwargs)


@register(V1, params=196.5, gmacs=34.5, top1=86.3, crop_pct=0.9, pretraining="ImageNet-22k")
def swin_large(**kwargs: Any) -> nn.Module:
    """Swin-L: window 7 at 224x224."""
    return _build(dict(_LARGE), kwargs)


@register(V1, params=87.9, gmacs=47.1, top1=84.5, size=384, crop_pct=1.0)
def swin_base_window12_384(**kwargs: Any) -> nn.Module:
    """Swin-B: window 12 at 384x384."""
    return _build(dict(_BASE, window=12, img_size=384), kwargs)


@register(V1, params=196.7, gmacs=103.9, top1=87.3, size=384, crop_pct=1.0, pretraining="ImageNet-22k")
def swin_large_window12_384(**kwargs: Any) -> nn.Module:
    """Swin-L: window 12 at 384x384."""
    return _build(dict(_LARGE, window=12, img_size=384), kwargs)


@register(V2, params=28.3, gmacs=5.9, top1=81.8, size=256, crop_pct=0.9)
def swinv2_tiny_window8_256(**kwargs: Any) -> nn.Module:
    """SwinV2-T: window 8 at 256x256."""
    return _build(dict(_TINY, window=8, img_size=256, version=2), kwargs)


@register(V2, params=28.3, gmacs=6.6, top1=82.8, size=256, crop_pct=0.9)
def swinv2_tiny_window16_256(**kwargs: Any) -> nn.Module:
    """SwinV2-T: window 16 at 256x256."""
    return _build(dict(_TINY, window=16, img_size=256, version=2), kwargs)


@register(V2, params=49.7, gmacs=11.5, top1=83.7, size=256, crop_pct=0.9)
def swinv2_small_window8_256(**kwargs: Any) -> nn.Module:
    """SwinV2-S: window 8 at 256x256."""
    return _build(dict(_SMALL, window=8, img_size=256, version=2), kwargs)


@register(V2, params=49.7, gmacs=12.6, top1=84.1, size=256, crop_pct=0.9)
def swinv2_small_window16_256(**kwargs: Any) -> nn.Module:
    """SwinV2-S: window 16 at 256x256."""
    return _build(dict(_SMALL, window=16, img_size=256, version=2), kwargs)


@register(V2, params=87.9, gmacs=20.3, top1=84.2, size=256, crop_pct=0.9)
def swinv2_base_window8_256(**kwargs: Any) -> nn.Module:
    """SwinV2-B: window 8 at 256x256."""
    return _build(dict(_BASE, window=8, img_size=256, version=2), kwargs)


@register(V2, params=87.9, gmacs=21.8, top1=84.6, size=256, crop_pct=0.9)
def swinv2_base_window16_256(**kwargs: Any) -> nn.Module:
    """SwinV2-B: window 16 at 256x256."""
    return _build(dict(_BASE, window=16, img_size=256, version=2), kwargs)
