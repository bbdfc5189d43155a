"""BiViT (arXiv 2211.07091): vision transformers whose attention and MLPs have binary weights and activations.

The authors publish the binary modules (https://github.com/ThisisBillhe/BiViT, Apache-2.0), not the models around them.
Here these modules stand in a standard DeiT and a standard Swin Transformer; the composition is ours. Patch embedding,
norms, residual stream and classifier stay in full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ..ops import binary_sign, softmax_aware
from ..ops.partition import Size, crop, group_mask, merge, pad_map, padded_size, split
from ..ops.position import expand_bias
from ._base import Stage
from ._binary import BinaryBackbone, BinaryLinear
from ._checkpoint import rename
from ._layers import gelu, init_linear
from ._registry import Family, build, register
from ._tokens import TokenBackbone, TokenEmbed
from .swin import Swin
from .swin import convert as convert_swin

BIVIT = Family(
    "bivit",
    "BiViT",
    "https://arxiv.org/abs/2211.07091",
    "https://github.com/ThisisBillhe/BiViT",
    "Apache-2.0",
)


class _Positive(torch.autograd.Function):
    """1 where `x > 0`, else 0; the gradient passes where `|x| < 1`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)


class BinaryAttention(nn.Module):
    """Attention of binary q, k, v over a map of zeros and ones: `(B, N, C)` -> `(B, N, C)`.

    The map is that of softmax-aware binarisation, or without `softmax_aware` 1 for positive scores. What a query gets
    is the sum of the values that it attends to.
    """

    binary_products = True  # of queries and keys, of weights and values

    def __init__(self, dim: int, num_heads: int, softmax_aware: bool) -> None:
        super().__init__()
        self.num_heads, self.softmax_aware = num_heads, softmax_aware
        self.qkv = BinaryLinear(dim, 3 * dim, learned_scale=softmax_aware)
        self.proj = BinaryLinear(dim, dim, learned_scale=softmax_aware)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """Groups of tokens `(..., N, 3 * C)` -> `(..., N, C)`; `bias` is added to the scores `(..., heads, N, N)`."""
        q, k, v = binary_sign(qkv).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        weights = softmax_aware(scores) if self.softmax_aware else _Positive.apply(scores)
        return (weights.to(v.dtype) @ v).transpose(-3, -2).flatten(-2)


class BinaryWindowAttention(BinaryAttention):
    """The same inside the windows of a map `(B, H, W, C)`, with Swin's position bias and mask."""

    def __init__(self, dim: int, num_heads: int, softmax_aware: bool, window: Size) -> None:
        super().__init__(dim, num_heads, softmax_aware)
        self.window = window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, num_heads), std=0.02))

    def forward(self, x: Tensor, shift: Size) -> Tensor:  # type: ignore[override]
        _, h, w, _ = x.shape
        groups = split(pad_map(self.qkv(x), self.window, self.qkv.bias), self.window, shift)
        bias = expand_bias(self.relative_position_bias_table, self.window)
        if shift != (0, 0):
            bias = bias + group_mask((h, w), self.window, shift, device=x.device)[:, None].to(bias.dtype)
        x = merge(self.attend(groups, bias), padded_size((h, w), self.window), self.window, shift)
        return self.proj(crop(x, (h, w)))


class BinaryMlp(nn.Module):
    """Binary linear, GELU, binary linear; with 32 bits the activations stay real and the scales are learned."""

    def __init__(self, dim: int, hidden_dim: int, activation_bits: int) -> None:
        super().__init__()
        real = activation_bits == 32
        self.fc1 = BinaryLinear(dim, hidden_dim, binary_input=not real, learned_scale=real)
        self.fc2 = BinaryLinear(hidden_dim, dim, binary_input=not real, learned_scale=real)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """A DeiT block: attention and MLP, each normalised before and with a residual."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, softmax_aware: bool, activation_bits: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = BinaryAttention(dim, num_heads, softmax_aware)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = BinaryMlp(dim, int(dim * mlp_ratio), activation_bits)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiViT(BinaryBackbone, TokenBackbone):
    """A DeiT with binary attention and MLPs.

    Args:
        dim: channels; depths: blocks, one entry; patch_size: stride of the only stage.
        img_size: native image size, whose positions are learned; other sizes resample them.
        softmax_aware: binarise attention as the paper proposes, with learned scales; else the baseline.
        mlp_activation_bits: 1, or 32 for real activations in the MLPs.
        packed: with bits for weights, for inference; see `pack`.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).

    Raises:
        ValueError: for arguments that do not fit together.
    """

    def __init__(
        self,
        dim: int = 192,
        depths: Sequence[int] = (12,),
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int | Size = 224,
        softmax_aware: bool = True,
        mlp_activation_bits: int = 1,
        packed: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != 1 or dim % num_heads:
            raise ValueError(
                f"depths={depths} must have one entry, and dim={dim} be a multiple of num_heads={num_heads}"
            )
        check_bits(mlp_activation_bits)
        self.patch_embed = TokenEmbed(in_chans, dim, patch_size, img_size)
        drops = calculate_drop_path_rates(drop_path_rate, depths[0])
        blocks = [Block(dim, num_heads, mlp_ratio, softmax_aware, mlp_activation_bits, drop) for drop in drops]
        self.layers = nn.ModuleList([Stage(nn.Identity(), blocks)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.build_token_head(dim, num_classes, global_pool, drop_rate)
        self.apply(_init_weights)
        self.finish(packed)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


class BiViTSwin(BinaryBackbone, Swin):
    """A Swin Transformer with binary attention and MLPs; patch merging stays in full precision.

    Args:
        softmax_aware, mlp_activation_bits, packed: see `BiViT`.
        **kwargs: see `Swin`; version 1.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    def __init__(
        self, softmax_aware: bool = True, mlp_activation_bits: int = 1, packed: bool = False, **kwargs: Any
    ) -> None:
        if kwargs.get("version", 1) != 1:
            raise ValueError(f"version={kwargs['version']}: binary attention is that of version 1")
        check_bits(mlp_activation_bits)
        super().__init__(**kwargs)
        for stage in self.layers:
            for block in stage.blocks:  # type: ignore[union-attr]
                attn, hidden_dim = block.attn, block.mlp.fc1.out_features
                dim = attn.proj.in_features
                block.attn = BinaryWindowAttention(dim, attn.num_heads, softmax_aware, attn.window)
                block.mlp = BinaryMlp(dim, hidden_dim, mlp_activation_bits)
        self.apply(_init_weights)
        self.finish(packed)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys of a Swin Transformer; see `swin.convert`."""
        return convert_swin(state)


def check_bits(bits: int) -> None:
    """Raise a ValueError unless activations can have as many bits."""
    if bits not in (1, 32):
        raise ValueError(f"mlp_activation_bits={bits}: use 1 for signs or 32 for real numbers")


def _init_weights(module: nn.Module) -> None:
    if not (isinstance(module, BinaryLinear) and module.scaling_factor is not None):  # those come initialised
        init_linear(module)


_CONVERT = [
    (r"^(?=cls_token$|pos_embed$)", "patch_embed."),
    (r"^blocks\.", "layers.0.blocks."),
    (r"^head\.(?=weight$|bias$)", "head.fc."),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of a DeiT -> ours."""
    return {rename(key, _CONVERT): value for key, value in state.items()}


@register(BIVIT, params=5.7, gmacs=1.25)
def bivit_deit_tiny(**kwargs: Any) -> nn.Module:
    """DeiT-T."""
    return build(BiViT, dict(), kwargs)


@register(BIVIT, params=22.1, gmacs=4.6)
def bivit_deit_small(**kwargs: Any) -> nn.Module:
    """DeiT-S."""
    return build(BiViT, dict(dim=384, num_heads=6), kwargs)


@register(BIVIT, params=86.6, gmacs=17.6)
def bivit_deit_base(**kwargs: Any) -> nn.Module:
    """DeiT-B."""
    return build(BiViT, dict(dim=768, num_heads=12), kwargs)


@register(BIVIT, params=28.3, gmacs=4.5, top1=70.8, crop_pct=0.9)
def bivit_swin_tiny(**kwargs: Any) -> nn.Module:
    """Swin-T: the paper's headline; the accuracy is that of its abstract."""
    return build(BiViTSwin, dict(dense=kwargs.get("features_only", False)), kwargs)


@register(BIVIT, params=1.1, gmacs=0.02, size=32, crop_pct=1.0)
def bivit_nano(**kwargs: Any) -> nn.Module:
    """Our own size for small images: two stages of a Swin Transformer."""
    arch = dict(dim=64, depths=(2, 4), num_heads=(2, 4), window=4, img_size=32)
    return build(BiViTSwin, {**arch, "dense": kwargs.get("features_only", False)}, kwargs)
