"""BinaryViT (arXiv 2306.16678): a pyramid of binary attention and MLPs that borrows from binary convolutional networks.

Every binary layer is followed by batch norm, a shortcut and a learnable activation; blocks end in average pooling
branches. ReActDeiT is where the paper starts from: the same layers in a DeiT. `convert` reads the authors' files
(https://github.com/Phuoc-Hoan-Le/BinaryViT, no licence stated).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..ops import binary_projection, binary_sign
from ..ops.partition import Size, pad_map, to_size
from ._base import Stage
from ._binary import BinaryBackbone, BinaryLinear
from ._checkpoint import CheckpointError, rename
from ._layers import BatchNorm, affine, channels_last_conv, image_to_map
from ._registry import Family, build, register
from ._tokens import TokenBackbone, TokenEmbed, adapt_positions, positions

BINARYVIT = Family(
    "binaryvit",
    "BinaryViT",
    "https://arxiv.org/abs/2306.16678",
    "https://github.com/Phuoc-Hoan-Le/BinaryViT",
    "unknown",
)
REACTDEIT = Family("reactdeit", "ReActDeiT", BINARYVIT.paper, BINARYVIT.source, BINARYVIT.licence)
POOLS = {"h3": (3, 1), "w3": (1, 3), "h5": (5, 1), "w5": (1, 5)}  # windows of the pooling branches, in order


class Norm(BatchNorm):
    """Batch normalisation of the channels of maps `(B, H, W, C)` or tokens `(B, N, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 4 else super().forward(x[:, :, None])[:, :, 0]


class RPReLU(nn.Module):
    """PReLU with a slope per channel between two learned shifts (ReActNet, arXiv 2003.03488)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.move1, self.move2 = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.weight = nn.Parameter(torch.full((dim,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.move1
        return F.prelu(x.movedim(-1, 1), self.weight).movedim(1, -1) + self.move2


class LayerScale(nn.Module):
    """`alpha * x + move` for each channel."""

    def __init__(self, dim: int, alpha: float) -> None:
        super().__init__()
        self.alpha, self.move = nn.Parameter(torch.full((dim,), alpha)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.move


class BinaryProjection(nn.Module):
    """Shift (if `shifted`), binary linear layer, batch norm, shortcut, RPReLU.

    In evaluation without gradients the norm is folded into the scale.
    """

    binary_products = True
    move: nn.Parameter | None

    def __init__(self, dim: int, out_dim: int, centred: bool = True, shifted: bool = True) -> None:
        super().__init__()
        self.register_parameter("move", nn.Parameter(torch.zeros(dim)) if shifted else None)
        self.linear = BinaryLinear(dim, out_dim, bias=False, estimator="polynomial", direct=True, centred=centred)
        self.norm = Norm(out_dim)
        self.rprelu = RPReLU(out_dim)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """`shortcut` `(..., C)` is repeated to `out_dim` channels."""
        x = x if self.move is None else x + self.move
        if self.training or torch.is_grad_enabled():
            repeats = self.linear.out_features // shortcut.shape[-1]
            shortcut = torch.cat([shortcut] * repeats, -1) if repeats > 1 else shortcut
            return self.rprelu(self.norm(self.linear(x)) + shortcut)
        signs, scale = self.linear.binary_weight()
        scale, bias = self._folded(scale)
        y = F.linear(binary_sign(x), signs) * scale + bias
        y = y + torch.cat([shortcut] * (y.shape[-1] // shortcut.shape[-1]), -1)
        return F.prelu(y.flatten(0, -2), self.rprelu.weight).view_as(y) + self.rprelu.move2

    def _folded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and bias `(out_dim,)` of weights with `scale`, the norm and the first shift of the activation."""
        factor, offset = affine(self.norm)
        return scale * factor, offset - self.rprelu.move1

    @torch.no_grad()
    def packed(self, name: str) -> PackedProjection:
        """The same of packed weights; see `BinaryLinear.words` for `name` and errors."""
        words, folded = self.linear.words(f"{name}.linear"), self._folded(self.linear.weight_scale())
        return PackedProjection(words, *folded, self.rprelu.weight, self.rprelu.move2, self.move)


class PackedProjection(nn.Module):
    """A `BinaryProjection` in evaluation, for inference; see `striate.ops.binary_projection`."""

    words: Tensor
    scale: Tensor
    bias: Tensor
    slope: Tensor
    offset: Tensor
    move: Tensor | None

    def __init__(
        self, words: Tensor, scale: Tensor, bias: Tensor, slope: Tensor, offset: Tensor, move: Tensor | None
    ) -> None:
        super().__init__()
        self.register_buffer("words", words)
        vectors = dict(scale=scale, bias=bias, slope=slope, offset=offset, move=move)
        for name, vector in vectors.items():
            self.register_buffer(name, None if vector is None else vector.detach().clone())

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        scale, bias, slope, offset = (t.to(x.dtype) for t in (self.scale, self.bias, self.slope, self.offset))
        return binary_projection(x, self.words, scale, bias, shortcut.to(x.dtype), slope, offset, self.move)


class _Clip(torch.autograd.Function):
    """`clip * clamp(round(p / clip), 0, 1)`, halves to 0, with straight-through gradients inside the range."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, clip: Tensor) -> Tensor:
        return (p / clip).round().clamp(0, 1) * clip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        p, clip = ctx.saved_tensors
        u = p / clip
        inside = (u >= 0) & (u <= 1)
        slope = torch.where(inside, u.round() - u, (u > 1).to(u.dtype))
        return grad * inside, (grad * slope).sum()


class BinaryAttention(nn.Module):
    """Attention of binary q, k, v with weights of 0 or `clip`; keys and values of a map pooled by `reduction`."""

    binary_products = True  # of queries and keys, of weights and values

    def __init__(self, dim: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        self.num_heads, self.reduction = num_heads, reduction
        self.reduce = BinaryProjection(dim, dim) if reduction > 1 else None
        self.q, self.k, self.v = (BinaryProjection(dim, dim) for _ in range(3))
        self.q_move, self.k_move, self.v_move = (nn.Parameter(torch.zeros(dim)) for _ in range(3))
        self.clip = nn.Parameter(torch.tensor(0.005))
        self.norm = Norm(dim)
        self.rprelu = RPReLU(dim)
        self.proj = BinaryProjection(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x, x)
        if self.reduce is not None:
            x = pool(x, self.reduction)
            x = self.reduce(x, x)
        k, v = self.k(x, x), self.v(x, x)
        query, key, value = (
            binary_sign(t + move, "polynomial").flatten(1, -2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t, move in ((q, self.q_move), (k, self.k_move), (v, self.v_move))
        )
        weights = ((query @ key.mT) * query.shape[-1] ** -0.5).softmax(-1)
        y = (_Clip.apply(weights, self.clip).to(value.dtype) @ value).transpose(1, 2).reshape(q.shape)
        y = self.rprelu(self.norm(y) + q + self._unpooled(k, q) + self._unpooled(v, q))
        return self.proj(y, y)

    def _unpooled(self, x: Tensor, like: Tensor) -> Tensor:
        if self.reduce is None:
            return x
        for axis in (1, 2):
            x = x.index_select(axis, torch.arange(like.shape[axis], device=x.device) // self.reduction)
        return x


def pool(x: Tensor, side: int) -> Tensor:
    """Means of `side` x `side` pixels of a map `(B, H, W, C)`; sizes are rounded up, edges average what is there."""
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), side, ceil_mode=True, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


class Block(nn.Module):
    """Binary attention and MLP; their shortcuts tile or average channels, and pooling branches follow the MLP."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: int, reduction: int, scaled: bool, pools: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = BinaryAttention(dim, num_heads, reduction)
        self.ls1 = LayerScale(dim, 0.1) if scaled else nn.Identity()
        self.norm2 = Norm(dim)
        self.fc1 = BinaryProjection(dim, dim * mlp_ratio)
        self.fc2 = BinaryProjection(dim * mlp_ratio, dim)
        self.ls2 = LayerScale(dim, 0.1) if scaled else nn.Identity()
        self.pools = nn.ModuleDict({name: LayerScale(dim, 0.0) for name in POOLS} if pools else {})
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp_ratio = mlp_ratio

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        y = self.norm2(x)
        x = x + self.drop_path(self.ls2(self._mlp(y)))
        for name, scale in self.pools.items():
            window = POOLS[name]
            padding = window[0] // 2, window[1] // 2
            pooled = F.avg_pool2d(y.permute(0, 3, 1, 2), window, 1, padding).permute(0, 2, 3, 1)  # borders hold zeros
            x = x + self.drop_path(scale(pooled))
        return x

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x, x)
        return self.fc2(hidden, hidden.unflatten(-1, (-1, self.mlp_ratio)).mean(-1))


class PatchEmbed(nn.Module):
    """Non-overlapping 4x4 patches in full precision, batch norm, positions."""

    def __init__(self, in_chans: int, dim: int, size: Size) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = Norm(dim)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, size[0] * size[1], dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return add_positions(self.norm(channels_last_conv(self.proj, image_to_map(x, 4))), self.pos_embed, self.size)


def add_positions(x: Tensor, table: Tensor, native: Size) -> Tensor:
    """Add positions `(1, N, C)` of a map of size `native` to a map `(B, H, W, C)`."""
    _, h, w, _ = x.shape
    return x + positions(table, native, (h, w)).unflatten(1, (h, w))


def neighbours(x: Tensor) -> Tensor:
    """2x2 pixels side by side: `(B, H, W, C)` -> `(B, H / 2, W / 2, 4 * C)`; odd maps get a row or column of zeros."""
    x = pad_map(x, (2, 2))
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).flatten(3)


class Downsample(nn.Module):
    """2x2 convolution of stride 2 between batch norms, positions; binary with a shortcut, or in full precision."""

    def __init__(self, dim: int, size: Size, binary: bool) -> None:
        super().__init__()
        self.size, self.binary = size, binary
        self.norm0 = Norm(dim)
        if binary:  # shifted channel by channel, whatever their place in the 2x2 pixels
            self.move = nn.Parameter(torch.zeros(dim))
            self.proj = BinaryProjection(4 * dim, 2 * dim, centred=False, shifted=False)
        else:
            self.linear = nn.Linear(4 * dim, 2 * dim, bias=False)
            self.norm = Norm(2 * dim)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, size[0] * size[1], 2 * dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(x)
        x = self.proj(neighbours(x + self.move), pool(x, 2)) if self.binary else self.norm(self.linear(neighbours(x)))
        return add_positions(x, self.pos_embed, self.size)


class BinaryViT(BinaryBackbone):
    """BinaryViT, for images of any size: maps are rounded up, positions resampled.

    Args:
        dim: channels of the first stage, doubled by every other; heads have 64.
        depths, mlp_ratios, reductions: of all stages; keys and values are pooled by `reductions`.
        img_size: native image size.
        binary_downsample: binarise the convolutions between stages.
        packed: with bits for weights, for inference; see `pack`.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).

    Raises:
        ValueError: for arguments that do not fit together.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 8, 4),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 1, 1),
        head_dim: int = 64,
        img_size: int | Size = 224,
        binary_downsample: bool = True,
        packed: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(mlp_ratios) == len(reductions):
            raise ValueError(
                f"depths={depths}, mlp_ratios={mlp_ratios}, reductions={reductions}: one number of each per stage"
            )
        if dim % head_dim:
            raise ValueError(f"dim={dim} must be a multiple of head_dim={head_dim}")
        height, width = to_size(img_size, "img_size")
        dims, strides = [dim * 2**i for i in range(len(depths))], [4 * 2**i for i in range(len(depths))]
        sizes = [(-(-height // stride), -(-width // stride)) for stride in strides]
        drops = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = PatchEmbed(in_chans, dim, sizes[0])
        self.layers = nn.ModuleList()
        for i, (channels, depth) in enumerate(zip(dims, depths, strict=True)):
            downsample = Downsample(channels // 2, sizes[i], binary_downsample) if i else nn.Identity()
            shape = channels, channels // head_dim, mlp_ratios[i], reductions[i]
            blocks = [Block(*shape, scaled=True, pools=True, drop_path=next(drops)) for _ in range(depth)]
            self.layers.append(Stage(downsample, blocks))
        self.norm = Norm(dims[-1])
        self.build_head(dims, strides, num_classes, global_pool, drop_rate)
        self.finish(packed)

    def adapt(self, key: str, value: Tensor) -> Tensor:
        """Resample the positions of another (square) image size."""
        if not key.endswith("pos_embed"):
            return value
        size: Size = self.get_submodule(key.rpartition(".")[0]).size  # type: ignore[assignment]
        return adapt_positions(key, value, size)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


class ReActDeiT(BinaryBackbone, TokenBackbone):
    """A DeiT of the same layers, without scales and pooling branches: the paper's starting point.

    Args:
        dim: channels; depths: blocks, one entry; heads have 64 channels.
        img_size, packed, …: see `BinaryViT`; global_pool: of the class token, unless told otherwise.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    def __init__(
        self,
        dim: int = 384,
        depths: Sequence[int] = (12,),
        num_heads: int = 6,
        mlp_ratio: int = 4,
        patch_size: int = 16,
        img_size: int | Size = 224,
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
        self.patch_embed = TokenEmbed(in_chans, dim, patch_size, img_size)
        drops = calculate_drop_path_rates(drop_path_rate, depths[0])
        blocks = [Block(dim, num_heads, mlp_ratio, 1, scaled=False, pools=False, drop_path=drop) for drop in drops]
        self.layers = nn.ModuleList([Stage(nn.Identity(), blocks)])
        self.norm = Norm(dim)
        self.build_token_head(dim, num_classes, global_pool, drop_rate)
        self.finish(packed)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


_SMALL_DEPTHS = (3, 4, 8, 4)  # the authors number the blocks of all stages in one list
_CONVERT = [
    (r"^vit\.embeddings\.position_embeddings$", "patch_embed.pos_embed"),
    (r"^vit\.embeddings\.cls_token$", "patch_embed.cls_token"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^vit\.encoder\.patch_embed(\d)\.", r"layers.\1.downsample."),
    (r"\.position_embeddings$", ".pos_embed"),
    (r"(downsample)\.proj\.", r"\1.linear."),
    (r"(downsample)\.(linear|norm|rprelu)\.", r"\1.proj.\2."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
    (r"\.attention\.attention\.att_prob_clip$", ".attn.clip"),
    (r"\.attention\.attention\.move([qkv])2$", r".attn.\1_move"),
    (r"\.attention\.attention\.move([qkvr])$", r".attn.\1.move"),
    (r"\.attention\.attention\.(q)uery\.", r".attn.\1.linear."),
    (r"\.attention\.attention\.(k)ey\.", r".attn.\1.linear."),
    (r"\.attention\.attention\.(v)alue\.", r".attn.\1.linear."),
    (r"\.attention\.attention\.(r)eduction\.", r".attn.\1.linear."),
    (r"\.attention\.attention\.norm_?([qkvr])\.", r".attn.\1.norm."),
    (r"\.attention\.attention\.rprelu([qkvr])\.", r".attn.\1.rprelu."),
    (r"\.attention\.attention\.(norm|rprelu)_context\.", r".attn.\1."),
    (r"\.attn\.r\.", ".attn.reduce."),
    (r"\.attention\.output\.layerscale\.", ".ls1."),
    (r"\.attention\.output\.", ".attn.proj."),
    (r"\.intermediate\.", ".fc1."),
    (r"\.output\.layerscale\.", ".ls2."),
    (r"\.output\.", ".fc2."),
    (r"\.dense\.", ".linear."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layerscale_([hw][35])\.", r".pools.\1."),
    (r"\.prelu\.weight$", ".weight"),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> ours; their 2x2 convolutions are linear layers here, and a shift has no axes of size 1."""
    if not any(key.startswith("vit.") for key in state):
        return state
    pyramid = any(key.startswith("vit.encoder.patch_embed") for key in state)
    out = {}
    for key, value in state.items():
        if match := LAYER.match(key):
            stage, block = _place(int(match[1])) if pyramid else (0, int(match[1]))
            key = f"layers.{stage}.blocks.{block}.{key[match.end() :]}"
        elif value.ndim == 4 and key.endswith(".proj.weight") and key.startswith("vit.encoder."):
            value = value.permute(0, 2, 3, 1).flatten(1)
        elif key.startswith("vit.encoder.patch_embed") and key.endswith(".move"):
            value = value.flatten()
        out[rename(key, _CONVERT)] = value
    if pyramid and not any(key.endswith("downsample.move") for key in out):  # in full precision
        out = {key.replace(".downsample.proj.", ".downsample."): value for key, value in out.items()}
    return out


LAYER = re.compile(r"^vit\.encoder\.layer\.(\d+)\.")


def _place(number: int) -> tuple[int, int]:
    """Stage of a block, and its number there."""
    for stage, depth in enumerate(_SMALL_DEPTHS):
        if number < depth:
            return stage, number
        number -= depth
    raise CheckpointError(f"a BinaryViT has {sum(_SMALL_DEPTHS)} blocks; the file has more, so it is another size")


@register(BINARYVIT, params=22.5, gmacs=3.8)
def binaryvit_small(**kwargs: Any) -> nn.Module:
    """BinaryViT-S, all of it binary but stem and classifier."""
    return build(BinaryViT, dict(), kwargs)


@register(BINARYVIT, params=22.5, gmacs=3.8)
def binaryvit_small_full_precision_downsample(**kwargs: Any) -> nn.Module:
    """BinaryViT-S with downsampling in full precision."""
    return build(BinaryViT, dict(binary_downsample=False), kwargs)


@register(REACTDEIT, params=22.3, gmacs=4.6)
def reactdeit_small(**kwargs: Any) -> nn.Module:
    """ReActDeiT-S: a DeiT-S of binary layers as in ReActNet."""
    return build(ReActDeiT, dict(), kwargs)
