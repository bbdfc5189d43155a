"""ViG and ViG-H (arXiv 2405.18425): vision transformers with bidirectional gated linear attention.

Not to be confused with Vision GNN, which is also called ViG. Cost and memory are linear in the number of pixels.
`convert` reads the authors' files (https://github.com/hustvl/ViG, MIT).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..ops import gated_linear_attention
from ..ops.partition import Size, to_size
from ..ops.position import resize_grid
from ._base import Backbone, Stage
from ._checkpoint import logger, rename
from ._layers import channels_last_conv, image_to_map, init_linear
from ._registry import Family, build, register

VIG = Family(
    "vig", "ViG (gated linear attention)", "https://arxiv.org/abs/2405.18425", "https://github.com/hustvl/ViG", "MIT"
)
GATE_RANK = 16
GATE_NORMALIZER = 16.0


class GatedLinearAttention(nn.Module):
    """Direction-wise gated linear attention with a gated local branch (2-D gating locality injection).

    Everything, gates included, is computed from a depthwise 3x3 convolution of the input, which is the local branch.

    Args:
        conv_act, out_act: SiLU after the convolution and before the last projection (ViG-T only).
        halve_in_eval: the authors' plain ViG halves the sum of both directions once more in eval mode; only the
            epsilon of the norm that follows sees it.
    """

    def __init__(self, dim: int, num_heads: int, conv_act: bool, out_act: bool, halve_in_eval: bool) -> None:
        super().__init__()
        self.num_heads, self.key_dim = num_heads, dim // 2
        self.conv_act, self.out_act, self.halve_in_eval = conv_act, out_act, halve_in_eval
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.qkv = nn.Linear(dim, 2 * dim, bias=False)
        self.gates = nn.Sequential(nn.Linear(dim, GATE_RANK, bias=False), nn.Linear(GATE_RANK, 2 * self.key_dim))
        self.norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.local_norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.mix = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        local = channels_last_conv(self.conv, x)
        if self.conv_act:
            local = F.silu(local)
        local = local.reshape(b, h * w, c)
        q, k, v = self._heads(*self.qkv(local).split((self.key_dim, self.key_dim, c), -1))
        # log(sigmoid(x)) / 16; softplus takes half the time of logsigmoid on a CPU
        gates = F.softplus(-self.gates(local), threshold=40.0) / -GATE_NORMALIZER
        gate, reverse_gate = self._heads(*gates.chunk(2, -1))
        out = gated_linear_attention(q, k, v, gate, reverse_gate) * (
            0.25 if self.halve_in_eval and not self.training else 0.5
        )
        (local_heads,) = self._heads(local)
        weight = torch.sigmoid(self.mix(local))
        out = torch.lerp(self.local_norm(local_heads).flatten(2), self.norm(out).flatten(2), weight)
        if self.out_act:
            out = F.silu(out)
        return self.proj(out).view(b, h, w, c)

    def _heads(self, *tensors: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (self.num_heads, t.shape[-1] // self.num_heads)) for t in tensors]


class GatedMlp(nn.Module):
    """SwiGLU: `fc2(silu(a) * b)` with a, b the halves of `fc1(x)`."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(a) * b)


class Block(nn.Module):
    """Attention and gated MLP, each after a norm and with a residual."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp: nn.Module, norm: Callable[[int], nn.Module], drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.attn = norm(dim), attn
        self.norm2, self.mlp = norm(dim), mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Image `(B, in_chans, H, W)` -> `(B, H / s, W / s, dim)`: two convolutions with layer norms."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, kernel, stride=stride, padding=1)
        self.norm1 = nn.LayerNorm(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(dim)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = image_to_map(x)
        x = self.act(self.norm1(channels_last_conv(self.conv1, x)))
        return self.norm2(channels_last_conv(self.conv2, x))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and layer norm; odd sizes round up."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(channels_last_conv(self.conv, x))


class ViG(Backbone):
    """Plain ViG: one stage of stride 16 with a learned position embedding, for any image size of at least 24 pixels.

    Args:
        dim, depths, num_heads: width, blocks of the only stage, heads.
        act: SiLU after the convolution and before the last projection of each attention (ViG-T).
        img_size: image size of the position embedding, which is resized (bicubic) to other sizes.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).
    """

    def __init__(
        self,
        dim: int = 192,
        depths: tuple[int, ...] = (12,),
        num_heads: int = 3,
        act: bool = False,
        img_size: int | Size = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != 1:
            raise ValueError(f"depths={depths}: plain ViG has one stage, so one number of blocks")
        height, width = to_size(img_size, "img_size")
        self.grid = _plain_grid(height), _plain_grid(width)
        self.patch_embed = Stem(in_chans, dim, 9, 8, F.silu)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, self.grid[0] * self.grid[1], dim), std=0.02))
        hidden = 256 * math.ceil(int(dim * 8 / 3) / 256)
        drops = calculate_drop_path_rates(drop_path_rate, depths[0])
        blocks = [
            Block(dim, GatedLinearAttention(dim, num_heads, act, act, True), GatedMlp(dim, hidden), _rms_norm, drop)
            for drop in drops
        ]
        self.layers = nn.ModuleList([Stage(nn.Identity(), blocks)])
        self.norm = _rms_norm(dim)
        self.build_head([dim], [16], num_classes, global_pool, drop_rate)
        self.apply(init_linear)
        self.apply(_init_attention)

    def embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return x + resize_grid(self.pos_embed, self.grid, (x.shape[1], x.shape[2])).unflatten(1, x.shape[1:3])

    def adapt(self, key: str, value: Tensor) -> Tensor:
        """Resize a position embedding from another (square) grid."""
        side = math.isqrt(value.shape[1]) if key == "pos_embed" else 0
        if key != "pos_embed" or side * side != value.shape[1]:
            return value
        logger.warning("resized pos_embed from a grid of %dx%d to %dx%d", side, side, *self.grid)
        return resize_grid(value, (side, side), self.grid)

    def feature_norm(self, dim: int) -> nn.Module:
        return _rms_norm(dim)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {**super().group_matcher(coarse), "stem": r"^(?:patch_embed|pos_embed)"}

    def no_weight_decay(self) -> set[str]:
        """The position embedding."""
        return {"pos_embed"}

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


class HierViG(Backbone):
    """ViG-H: four stages of gated linear attention over all tokens, no windows; convolutional, for any image size.

    Args:
        dims, depths, num_heads: of the four stages.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 5, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        drops = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = Stem(in_chans, dims[0], 3, 2, F.gelu)
        self.layers = nn.ModuleList()
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            hidden = 32 * math.ceil(int(dim * 8 / 3) / 32)
            blocks = [
                Block(
                    dim,
                    GatedLinearAttention(dim, heads, False, False, False),
                    GatedMlp(dim, hidden),
                    nn.LayerNorm,
                    next(drops),
                )
                for _ in range(depth)
            ]
            self.layers.append(Stage(Downsample(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.norm = nn.LayerNorm(dims[-1])
        self.build_head(dims, [4 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


def _rms_norm(dim: int) -> nn.Module:
    return nn.RMSNorm(dim, eps=1e-6)


def _plain_grid(length: int) -> int:
    """Side of the plain stem's map: a 9x9 convolution of stride 8, then 3x3 of stride 2, both padded by 1."""
    return ((length - 7) // 8 + 1 - 1) // 2 + 1


def _init_attention(module: nn.Module) -> None:
    if isinstance(module, GatedLinearAttention):
        for layer in (module.conv, module.qkv, module.mix, module.proj, *module.gates):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)


_CONVERT = [
    (r"^patch_embed\.(proj\.)?0\.", "patch_embed.conv1."),
    (r"^patch_embed\.proj\.1\.", "patch_embed.norm1."),
    (r"^patch_embed\.proj\.3\.", "patch_embed.conv2."),
    (r"^patch_embed\.proj\.4\.", "patch_embed.norm2."),
    (r"^patch_embed\.(2|norm)\.", "patch_embed.norm1."),
    (r"^patch_embed\.5\.", "patch_embed.conv2."),
    (r"^patch_embed\.7\.", "patch_embed.norm2."),
    (r"^patch_embed\.proj\.(?=weight|bias)", "patch_embed.conv1."),
    (r"^blocks\.", "layers.0.blocks."),
    (r"\.blocks\.(\d+)\.(norm|ln_1|attn_norm)\.", r".blocks.\1.norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.(op|self_attention)\.", ".attn."),
    (r"\.attn\.in_proj\.0\.", ".attn.conv."),
    (r"\.attn\.qkv_proj\.", ".attn.qkv."),
    (r"\.attn\.gk_proj\.", ".attn.gates."),
    (r"\.attn\.g_norm\.", ".attn.norm."),
    (r"\.attn\.l_norm\.", ".attn.local_norm."),
    (r"\.attn\.g_proj\.", ".attn.mix."),
    (r"\.attn\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^classifier\.norm\.", "norm."),
    (r"^(classifier\.)?head\.(?!fc\.)", "head.fc."),
    (r"^outnorm(\d)\.", r"norms.\1."),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys, new and old -> ours; there, `downsample` ends a stage and 1x1 convolutions may be 4-D."""
    out = {}
    for key, value in state.items():
        key = rename(key, _CONVERT)
        if match := re.match(r"^layers\.(\d+)\.downsample\.([13])\.(.*)", key):
            key = f"layers.{int(match[1]) + 1}.downsample.{'conv' if match[2] == '1' else 'norm'}.{match[3]}"
        if value.ndim == 4 and re.search(r"\.(qkv|gates\.\d|mix|proj|fc1|fc2)\.weight$", key):
            value = value.flatten(1)
        out[key] = value
    return out


_HIER_BASE = dict(dims=(128, 256, 512, 1024), depths=(2, 2, 17, 2), num_heads=(4, 8, 16, 32))


@register(VIG, params=5.8, gmacs=1.26, top1=77.2, first_conv="patch_embed.conv1")
def vig_tiny(**kwargs: Any) -> nn.Module:
    """ViG-T."""
    return build(ViG, dict(act=True), kwargs)


@register(VIG, params=22.6, gmacs=4.7, top1=81.7, first_conv="patch_embed.conv1")
def vig_small(**kwargs: Any) -> nn.Module:
    """ViG-S."""
    return build(ViG, dict(dim=384, num_heads=6), kwargs)


@register(VIG, params=89.0, gmacs=17.9, top1=82.6, first_conv="patch_embed.conv1")
def vig_base(**kwargs: Any) -> nn.Module:
    """ViG-B."""
    return build(ViG, dict(dim=768, num_heads=12), kwargs)


@register(VIG, params=28.6, gmacs=4.7, top1=82.8, first_conv="patch_embed.conv1")
def vig_h_tiny(**kwargs: Any) -> nn.Module:
    """ViG-H-T."""
    return build(HierViG, dict(), kwargs)


@register(VIG, params=50.1, gmacs=9.1, top1=83.8, first_conv="patch_embed.conv1")
def vig_h_small(**kwargs: Any) -> nn.Module:
    """ViG-H-S."""
    return build(HierViG, dict(depths=(2, 2, 17, 2)), kwargs)


@register(VIG, params=88.9, gmacs=16.1, top1=84.2, first_conv="patch_embed.conv1")
def vig_h_base(**kwargs: Any) -> nn.Module:
    """ViG-H-B."""
    return build(HierViG, dict(_HIER_BASE), kwargs)
