"""MaxViT (arXiv 2204.01697): MBConv, attention inside windows, attention over a grid, in every block.

The TensorFlow originals as timm ported them (`maxvit_*_tf_*`), whose parameter names these are; source
https://github.com/google-research/maxvit (Apache-2.0). timm's own variants (`maxvit_*_rw_*`, `maxvit_rmlp_*`) come from
timm through the factory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..ops import window_attention
from ..ops.partition import Size, pad_map, to_size
from ._base import Backbone, Stage
from ._checkpoint import logger
from ._layers import BatchNorm, Mlp, PooledNormHead, gelu, image_to_map
from ._registry import Family, build, register

MAXVIT = Family(
    "maxvit", "MaxViT", "https://arxiv.org/abs/2204.01697", "https://github.com/google-research/maxvit", "Apache-2.0"
)
HEAD_DIM = 32


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution of `(…, C)`."""

    def __init__(self, dim: int, out_dim: int, bias: bool = True) -> None:
        super().__init__(dim, out_dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class SameConv(nn.Conv2d):
    """A 3x3 convolution of `(B, H, W, C)` padded as TensorFlow's `SAME`: with stride 2, on the bottom and right alone.
    Odd maps, which the authors do not support, are first padded there to even ones."""

    def __init__(self, dim: int, out_dim: int, stride: int, groups: int = 1, bias: bool = True) -> None:
        super().__init__(dim, out_dim, 3, stride=stride, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with other weights."""
        padding = (1, 1)
        if self.stride[0] == 2:
            x, padding = F.pad(pad_map(x, (2, 2)), (0, 0, 0, 1, 0, 1)), (0, 0)
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, self.stride, padding, groups=self.groups)
        return x.permute(0, 2, 3, 1)


class Stem(nn.Module):
    """Image `(B, in_chans, H, W)` -> `(B, H / 2, W / 2, dim)`: two 3x3 convolutions."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = SameConv(in_chans, dim, 2)
        self.norm1 = _batch_norm(dim)
        self.conv2 = SameConv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = image_to_map(x)
        return self.conv2(gelu(self.norm1(self.conv1(x)), "tanh"))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate of their means."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Conv1x1(dim, hidden_dim)
        self.fc2 = Conv1x1(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((1, 2), keepdim=True)))))


class Shortcut(nn.Module):
    """The residual of an MBConv: pooled by 2 with a stride, projected if the width changes."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.expand = Conv1x1(dim, out_dim) if dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            x = F.avg_pool2d(pad_map(x, (2, 2)).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return self.expand(x)


class MBConv(nn.Module):
    """Inverted bottleneck with pre-norm, squeeze-and-excite and the stride in the depthwise convolution."""

    def __init__(self, dim: int, out_dim: int, stride: int, drop_path: float) -> None:
        super().__init__()
        hidden = 4 * out_dim
        self.shortcut = Shortcut(dim, out_dim, stride)
        self.pre_norm = _batch_norm(dim)
        self.conv1_1x1 = Conv1x1(dim, hidden, bias=False)
        self.norm1 = _batch_norm(hidden)
        self.conv2_kxk = SameConv(hidden, hidden, stride, groups=hidden, bias=False)
        self.norm2 = _batch_norm(hidden)
        self.se = SqueezeExcite(hidden, out_dim // 4)
        self.conv3_1x1 = Conv1x1(hidden, out_dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = gelu(self.norm1(self.conv1_1x1(self.pre_norm(x))), "tanh")
        hidden = gelu(self.norm2(self.conv2_kxk(hidden)), "tanh")
        return self.shortcut(x) + self.drop_path(self.conv3_1x1(self.se(hidden)))


class RelativeBias(nn.Module):
    """Position bias stored as TensorFlow does: `(heads, 2 * window_h - 1, 2 * window_w - 1)` by key - query."""

    def __init__(self, num_heads: int, window: Size) -> None:
        super().__init__()
        self.window = window
        shape = num_heads, 2 * window[0] - 1, 2 * window[1] - 1
        self.relative_position_bias_table = nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.02))

    def forward(self) -> Tensor:
        """The table `(rows, heads)` by query - key."""
        return self.relative_position_bias_table.flip((1, 2)).flatten(1).t()


class Attention(nn.Module):
    """Multi-head attention in windows or over a grid, with a relative position bias."""

    def __init__(self, dim: int, window: Size, grid: bool) -> None:
        super().__init__()
        self.num_heads, self.window, self.grid = dim // HEAD_DIM, window, grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_pos = RelativeBias(self.num_heads, window)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = window_attention(
            self.qkv(x),
            self.rel_pos(),
            num_heads=self.num_heads,
            window=self.window,
            grid=self.grid,
            pad=self.qkv.bias,
        )
        return self.proj(x)


class AttentionBlock(nn.Module):
    """Attention and MLP, each after a layer norm and with a residual."""

    def __init__(self, dim: int, window: Size, grid: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, window, grid)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, approximate="tanh")
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Block(nn.Module):
    """MBConv, window attention, grid attention."""

    def __init__(self, dim: int, out_dim: int, stride: int, window: Size, drop_path: float) -> None:
        super().__init__()
        self.conv = MBConv(dim, out_dim, stride, drop_path)
        self.attn_block = AttentionBlock(out_dim, window, False, drop_path)
        self.attn_grid = AttentionBlock(out_dim, window, True, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn_grid(self.attn_block(self.conv(x)))


class MaxViT(Backbone):
    """MaxViT. The pyramid has five levels: the stem (stride 2) and four stages.

    Args:
        stem_dim, dims, depths: width of the stem, widths and blocks of the four stages.
        img_size: native size; window and grid are `img_size / 32` tokens per side, as published. Maps of other sizes
            are padded on the right and bottom to whole windows, padded tokens holding the projection's bias.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (rises linearly and would
            be reached one block after the last, as published).

    Raises:
        ValueError: if `img_size` is no multiple of 32.
    """

    stem_name, stages_name = "stem", "stages"
    stem_stride = 2

    def __init__(
        self,
        stem_dim: int = 64,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 5, 2),
        img_size: int | Size = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        size = to_size(img_size, "img_size")
        if size[0] % 32 or size[1] % 32:
            raise ValueError(f"img_size={img_size} must be a multiple of 32: the window is a 32nd of it")
        window = size[0] // 32, size[1] // 32
        drops = iter(drop_path_rate * i / sum(depths) for i in range(sum(depths)))
        self.stem = Stem(in_chans, stem_dim)
        self.stages = nn.ModuleList()
        width = stem_dim
        for dim, depth in zip(dims, depths, strict=True):
            blocks = []
            for i in range(depth):
                blocks.append(Block(width, dim, 1 if i else 2, window, next(drops)))
                width = dim
            self.stages.append(Stage(nn.Identity(), blocks))
        self.norm = nn.Identity()  # the classifier normalises after pooling
        head = PooledNormHead(dims[-1], num_classes, dims[-1], global_pool, drop_rate)
        strides = [2 * 2**i for i in range(len(dims) + 1)]
        self.build_head((stem_dim, *dims), strides, num_classes, global_pool, drop_rate, head)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def adapt(self, key: str, value: Tensor) -> Tensor:
        """Resize a bias table from another window: bilinear, as the authors do between image sizes."""
        if not key.endswith("relative_position_bias_table"):
            return value
        height, width = self.get_submodule(key.rpartition(".")[0]).window  # type: ignore[misc]
        logger.warning("resized %s from %s to window %dx%d", key, tuple(value.shape), height, width)
        size = 2 * height - 1, 2 * width - 1
        return F.interpolate(value[None].float(), size=size, mode="bilinear", align_corners=False)[0].to(value.dtype)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's names are ours."""
        return dict(state)


def _batch_norm(dim: int) -> BatchNorm:
    return BatchNorm(dim, eps=1e-3, momentum=0.01)


_WIDE = (96, 192, 384, 768)
_DEEP = (2, 6, 14, 2)


@register(MAXVIT, params=30.9, gmacs=5.6, top1=83.62, crop_pct=0.95, first_conv="stem.conv1")
def maxvit_tiny(**kwargs: Any) -> nn.Module:
    """MaxViT-T."""
    return build(MaxViT, dict(), kwargs)


@register(MAXVIT, params=68.9, gmacs=11.7, top1=84.45, crop_pct=0.95, first_conv="stem.conv1")
def maxvit_small(**kwargs: Any) -> nn.Module:
    """MaxViT-S."""
    return build(MaxViT, dict(dims=_WIDE), kwargs)


@register(MAXVIT, params=119.5, gmacs=24.2, top1=84.95, crop_pct=0.95, first_conv="stem.conv1")
def maxvit_base(**kwargs: Any) -> nn.Module:
    """MaxViT-B."""
    return build(MaxViT, dict(dims=_WIDE, depths=_DEEP), kwargs)


@register(MAXVIT, params=211.8, gmacs=43.9, top1=85.17, crop_pct=0.95, first_conv="stem.conv1")
def maxvit_large(**kwargs: Any) -> nn.Module:
    """MaxViT-L."""
    return build(MaxViT, dict(stem_dim=128, dims=(128, 256, 512, 1024), depths=_DEEP), kwargs)


@register(MAXVIT, params=475.0, gmacs=97.8, crop_pct=0.95, first_conv="stem.conv1")
def maxvit_xlarge(**kwargs: Any) -> nn.Module:
    """MaxViT-XL; published after pre-training on ImageNet-21k only."""
    return build(MaxViT, dict(stem_dim=192, dims=(192, 384, 768, 1536), depths=_DEEP), kwargs)
