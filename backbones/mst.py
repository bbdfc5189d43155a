"""Masked Spiking Transformer (arXiv 2210.01208): a Swin Transformer trained with quantised activations, run as spikes.

As trained, it is an ANN: every activation is a `Qcfs`. `spiking=True` or `MST.set_spiking` runs the same weights with
integrate-and-fire neurons in their place. `convert` reads the authors' files
(https://github.com/bic-L/Masked-Spiking-Transformer, no licence stated).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..ops import lif
from ..ops.partition import Size, crop, group_mask, merge, pad_map, padded_size, split, to_size
from ..ops.position import expand_bias
from ._layers import BatchNorm, channels_last_conv, init_linear
from ._registry import Family, build, register
from ._spiking import DropPath, SpikingBackbone, SpikingStage, each_step, repeat
from .swin import Swin, native_window
from .swin import convert as convert_swin

MST_FAMILY = Family(
    "mst",
    "Masked Spiking Transformer",
    "https://arxiv.org/abs/2210.01208",
    "https://github.com/bic-L/Masked-Spiking-Transformer",
    "unknown",
)


def quantise(x: Tensor, up: Tensor, levels: int) -> Tensor:
    """`clamp(floor(x / up * levels + 1 / 2) / levels, 0, 1) * up` in the dtype of `x`; `up` is `(1,)`."""
    y = (x / up).mul_(levels).add_(0.5).floor_().div_(levels)
    return y.clamp(0, 1).mul_(up).to(x.dtype)


class _Quantise(torch.autograd.Function):
    """`quantise` with a straight-through floor and a clamp that passes gradients where it changes nothing.

    Written out because PyTorch's clamp passes them at its ends too, as here and for the authors, only before 2.14; and
    to save `x` alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, up: Tensor, levels: int) -> Tensor:
        return quantise(x, up, levels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        x, up, ctx.levels = inputs
        ctx.save_for_backward(x, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, up = ctx.saved_tensors
        z = x / up
        y = z.mul(ctx.levels).add_(0.5).floor_()
        clamped = y.clamp(0, ctx.levels)
        grad_x = torch.where(y == clamped, grad, 0)
        # `up` takes part as the factor in front of the staircase and in `x / up`
        grad_up = (grad * clamped).sum() / ctx.levels - (grad_x * z).sum()
        return grad_x, grad_up[None].to(up.dtype), None


class Qcfs(nn.Module):
    """Quantised clip-floor-shift activation (arXiv 2303.04347), or the neurons that it stands for.

    A neuron with threshold `up` that subtracts it when it fires, starts at half of it and sees `x` for T steps gives
    this activation's value with `levels = T` on the average.

    Args:
        levels: steps of the staircase between 0 and `up`.
        threshold: where the learnable `up` `(1,)` starts.

    Attributes:
        spiking: integrate and fire over the first axis, which is time.

    Raises:
        ValueError: if there is no level.
    """

    def __init__(self, levels: int, threshold: float = 2.0) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels={levels} must be at least 1")
        self.up = nn.Parameter(torch.full((1,), threshold))
        self.levels, self.spiking = levels, False

    def forward(self, x: Tensor) -> Tensor:
        if self.spiking:
            return (lif(x / self.up, tau=None, reset=None, initial=0.5) * self.up).to(x.dtype)
        if torch.is_grad_enabled():
            return _Quantise.apply(x, self.up, self.levels)
        return quantise(x, self.up, self.levels)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, spiking={self.spiking}"


class SpikeMask(nn.Module):
    """Random spike masking: drop each value with probability `ratio`, in training and evaluation, without rescaling.

    Raises:
        ValueError: for a ratio outside [0, 1).
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"masking_ratio={ratio} must be in [0, 1); 0 masks nothing")
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x, dtype=torch.float32) > self.ratio) if self.ratio else x

    def extra_repr(self) -> str:
        return f"{self.ratio}"


class PatchEmbed(nn.Module):
    """Non-overlapping 4x4 patches, batch norm, activation; the image is padded to multiples of 4."""

    def __init__(self, in_chans: int, dim: int, levels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = BatchNorm(dim)
        self.proj_if = Qcfs(levels)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        return self.proj_if(repeat(each_step(self._embed, x), steps))

    def _embed(self, x: Tensor) -> Tensor:
        return self.norm(channels_last_conv(self.proj, pad_map(x, (4, 4))))


class NeighbourNorm(BatchNorm):
    """2x2 neighbours concatenated and batch-normalised: `(B, H, W, C)` -> `(B, H / 2, W / 2, 4 * C)`, rounded up.

    Neighbours beyond the edge of an odd map are 0 after the norm, whose statistics do not count them.
    """

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, c = x.shape
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        if not torch.compiler.is_compiling() and h % 2 == w % 2 == 0:  # a traced size may be any: no branch
            return super().forward(torch.cat(parts, dim=-1))
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        size = (h + 1) // 2, (w + 1) // 2
        normed = [self._norm_part(part, slice(i * c, (i + 1) * c)) for i, part in enumerate(parts)]
        return torch.cat([F.pad(n, (0, 0, 0, size[1] - n.shape[2], 0, size[0] - n.shape[1])) for n in normed], dim=-1)

    def _norm_part(self, x: Tensor, channels: slice) -> Tensor:
        if not torch.compiler.is_compiling() and x.numel() == 0:
            return x
        own = (t[channels] for t in (self.running_mean, self.running_var, self.weight, self.bias) if t is not None)
        norm = functools.partial(F.batch_norm, training=self.training, momentum=self.momentum or 0.0, eps=self.eps)
        return norm(x.permute(0, 3, 1, 2), *own).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """2x2 neighbours concatenated, normalised and projected to twice the width, activation."""

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        self.norm = NeighbourNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.reduction_if = Qcfs(levels)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction_if(self.reduction(each_step(self.norm, x)))


class WindowAttention(nn.Module):
    """Window attention of quantised or spiking q, k, v, with a quantised or spiking map under the softmax.

    Tokens of the padding are projected from zeros and take part, as in Swin's dense-prediction code.
    """

    def __init__(self, dim: int, num_heads: int, window: Size, levels: int, masking_ratio: float) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.relative_position_bias_table = nn.Parameter(
            trunc_normal_(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), num_heads), std=0.02)
        )
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_if, self.k_if, self.v_if, self.attn_if, self.attn_v_if = (Qcfs(levels) for _ in range(5))
        self.mask = SpikeMask(masking_ratio)
        self.proj = nn.Linear(dim, dim)
        self.proj_if = Qcfs(levels)

    def forward(self, x: Tensor, shift: Size) -> Tensor:
        _, _, h, w, _ = x.shape
        padded = padded_size((h, w), self.window)
        groups = each_step(lambda m: split(pad_map(m, self.window, self.qkv.bias), self.window, shift), self.qkv(x))
        q, k, v = groups.unflatten(-1, (3, self.num_heads, -1)).permute(4, 0, 1, 2, 5, 3, 6)
        out = (self._weights(self.q_if(q), self.k_if(k), (h, w), shift) @ self.v_if(v)).transpose(-3, -2).flatten(-2)
        out = each_step(lambda g: crop(merge(g, padded, self.window, shift), (h, w)), out)
        return self.proj_if(self.proj(self.attn_v_if(out)))

    def _weights(self, q: Tensor, k: Tensor, size: Size, shift: Size) -> Tensor:
        """`(T, B, G, heads, N, D)` twice -> what each query takes of each value, `(T, B, G, heads, N, N)`."""
        scores = (self.mask(q) @ self.mask(k).transpose(-2, -1)) * q.shape[-1] ** -0.5
        scores = self.mask(self.attn_if(scores)) + expand_bias(self.relative_position_bias_table, self.window)
        if shift != (0, 0):
            scores = scores + group_mask(size, self.window, shift, device=q.device)[:, None].to(scores.dtype)
        return scores.softmax(-1).to(q.dtype)


class Mlp(nn.Module):
    """Linear, batch norm (where `norm`), activation; twice."""

    def __init__(self, dim: int, hidden_dim: int, norm: bool, levels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.norm1 = BatchNorm(hidden_dim) if norm else nn.Identity()
        self.fc1_if = Qcfs(levels)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.norm2 = BatchNorm(dim) if norm else nn.Identity()
        self.fc2_if = Qcfs(levels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1_if(each_step(self.norm1, self.fc1(x)))
        return self.fc2_if(each_step(self.norm2, self.fc2(x)))


class Block(nn.Module):
    """Attention with a residual; batch norm of the stream; MLP with a residual from the normalised stream."""

    def __init__(
        self, dim: int, attn: WindowAttention, mlp_ratio: float, mlp_norm: bool, levels: int, shifted: bool,
        drop_path: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = BatchNorm(dim)
        self.shortcut1_if = Qcfs(levels)
        self.attn = attn
        self.norm2 = BatchNorm(dim)
        self.shortcut2_if = Qcfs(levels)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), mlp_norm, levels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shifted = shifted

    def shift(self, height: int, width: int) -> Size:
        """Half a window in every other block, none in a map that is a single window high or wide."""
        window = self.attn.window
        if not self.shifted or height <= window[0] or width <= window[1]:
            return 0, 0
        return window[0] // 2, window[1] // 2

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w, _ = x.shape
        y = self.shortcut1_if(each_step(self.norm1, x))
        x = each_step(self.norm2, x + self.drop_path(self.attn(y, self.shift(h, w))))
        return x + self.drop_path(self.mlp(self.shortcut2_if(x)))


class MST(SpikingBackbone):
    """Masked Spiking Transformer, as an ANN or as an SNN of the same state dict.

    The ANN sees an image in one step. The SNN runs whole in every step, softmax and norms included, and only the
    neurons remember; logits are the mean over the steps, where the authors take the sum. Any image size works: maps are
    padded to whole windows after the norm, then shifted.

    Args:
        dim: width of the first stage; depths, num_heads: of all stages.
        window: tokens per window, one number or (height, width); `img_size` as in `Swin`.
        mlp_norm: batch norms in the MLPs; the CIFAR models have none.
        levels: of the activations.
        masking_ratio: part of q, k and the attention map that is dropped at random, in training and evaluation.
        spiking: run as an SNN; see `set_spiking` for a model that exists already.
        timesteps: for which the SNN sees an image; the authors' default is 128.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).

    Raises:
        ValueError: for arguments that do not fit together or are out of range.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int | Size = 7,
        img_size: int | Size = 224,
        mlp_ratio: float = 4.0,
        mlp_norm: bool = True,
        levels: int = 16,
        masking_ratio: float = 0.0,
        spiking: bool = False,
        timesteps: int = 32,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"depths={depths}, num_heads={num_heads}: one number of heads per stage")
        window, size = to_size(window, "window"), to_size(img_size, "img_size")
        dims = [dim * 2**i for i in range(len(depths))]
        strides = [4 * 2**i for i in range(len(depths))]
        drops = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = PatchEmbed(in_chans, dim, levels)
        self.layers = nn.ModuleList()
        for i, (width, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            native = native_window(window, (math.ceil(size[0] / strides[i]), math.ceil(size[1] / strides[i])))
            blocks = []
            for j in range(depth):
                attn = WindowAttention(width, heads, native, levels, masking_ratio)
                blocks.append(Block(width, attn, mlp_ratio, mlp_norm, levels, j % 2 == 1, next(drops)))
            self.layers.append(SpikingStage(PatchMerging(width // 2, levels) if i else nn.Identity(), blocks))
        self.build_spiking_head(dims, strides, num_classes, global_pool, drop_rate, timesteps)
        self.norm = nn.LayerNorm(dims[-1])
        self.apply(init_linear)
        self._set_neurons(timesteps if spiking else None)

    def set_spiking(self, timesteps: int | None) -> None:
        """Turn the model into an SNN that sees an image for `timesteps` steps, or with None into an ANN.

        Its weights stay as they are, in both directions.

        Raises:
            ValueError: if `timesteps` is less than 1.
        """
        self._set_neurons(timesteps)
        if hasattr(self, "model_args"):  # a saved model comes back as it is
            kept = {key: value for key, value in self.model_args.items() if key not in ("spiking", "timesteps")}
            self.model_args = kept | ({"spiking": True, "timesteps": timesteps} if timesteps else {})

    def _set_neurons(self, timesteps: int | None) -> None:
        if timesteps is not None and timesteps < 1:
            raise ValueError(f"timesteps={timesteps} must be at least 1, or None for the ANN")
        self.timesteps = timesteps or 1
        for module in self.modules():
            if isinstance(module, Qcfs):
                module.spiking = timesteps is not None

    def no_weight_decay(self) -> set[str]:
        """Position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    adapt = Swin.adapt  # the same tables of position biases

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys -> ours: they differ as Microsoft's keys of a Swin Transformer do."""
        return convert_swin(state)


@register(MST_FAMILY, params=28.3, gmacs=4.5)
def mst_tiny(**kwargs: Any) -> nn.Module:
    """The published size: Swin-T at 224x224."""
    return build(MST, dict(), kwargs)


_NANO = dict(dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window=4, img_size=64, levels=8)


@register(MST_FAMILY, params=1.0, gmacs=0.01, size=64, crop_pct=1.0)
def mst_nano(**kwargs: Any) -> nn.Module:
    """Our own size for small images: windows of 4x4 tokens at 64x64, activations of few levels."""
    return build(MST, dict(_NANO), kwargs)
