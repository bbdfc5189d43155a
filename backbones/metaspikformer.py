"""Meta-SpikeFormer (Spike-driven Transformer V2, arXiv 2404.03663): convolutions first, then attention, on spikes.

`convert` reads the authors' files (https://github.com/BICLab/Spike-Driven-Transformer-V2, no licence given), of
classification, detection and segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, calculate_drop_path_rates
from torch import Tensor, nn

from ._checkpoint import rename
from ._layers import BatchNorm, channels_last_conv, init_linear
from ._registry import Family, build, register
from ._spiking import (
    DropPath,
    Lif,
    LinearNorm,
    SpikingBackbone,
    SpikingStage,
    conv_norm,
    each_step,
    repeat,
    spike_attention,
)
from .spike_driven_transformer import MembraneMlp

METASPIKFORMER = Family(
    "metaspikformer",
    "Meta-SpikeFormer",
    "https://arxiv.org/abs/2404.03663",
    "https://github.com/BICLab/Spike-Driven-Transformer-V2",
    "unknown",
)


class SepConv(nn.Module):
    """Separable convolution on spikes: widen, 7x7 depthwise, narrow."""

    def __init__(self, dim: int, ratio: int = 2) -> None:
        super().__init__()
        hidden = ratio * dim
        self.lif1, self.expand = Lif(), LinearNorm(dim, hidden)
        self.lif2, self.depthwise = Lif(), nn.Conv2d(hidden, hidden, 7, padding=3, groups=hidden, bias=False)
        self.project = LinearNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif2(each_step(self.expand, self.lif1(x)))
        return each_step(lambda m: self.project(channels_last_conv(self.depthwise, m)), x)


class ConvBlock(nn.Module):
    """Separable convolution and two 3x3 convolutions (an MLP over channels and neighbours), each with a residual."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.sep_conv = SepConv(dim)
        self.lif1, self.conv1 = Lif(), conv_norm(dim, hidden_dim)
        self.lif2, self.conv2 = Lif(), conv_norm(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sep_conv(x)
        return x + each_step(self.conv2, self.lif2(each_step(self.conv1, self.lif1(x))))


class PadNorm(BatchNorm):
    """Batch norm of `(B, H, W, C)`, and a row and column on every side of what it makes of 0 in eval mode.

    The padding is a constant: it follows the running statistics in training too, and has no gradient.
    """

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        momentum, self.momentum = self.momentum, 0.0 if self._is_recomputed() else self.momentum
        x = super().forward(x)
        self.momentum = momentum
        value = self.bias - self.running_mean * self.weight / torch.sqrt(self.running_var + self.eps)
        border = F.pad(x.new_zeros(1, *x.shape[1:3], 1), (0, 0, 1, 1, 1, 1), value=1.0)
        return F.pad(x, (0, 0, 1, 1, 1, 1)) + border * value.detach().to(x.dtype)

    def _is_recomputed(self) -> bool:
        """Whether this is the second forward of activation checkpointing, which must see the padding of the first."""
        return self.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RepConv(nn.Module):
    """A 3x3 convolution of `(B, H, W, C)` as it is trained: linear, depthwise, linear, batch norms and nothing else.

    By the padding, all of it is in eval mode one convolution of a map padded with zeros.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, dim, bias=False)
        self.pad_norm = PadNorm(dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, groups=dim, bias=False)
        self.project = LinearNorm(dim, dim)
        self.norm = BatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last_conv(self.depthwise, self.pad_norm(self.expand(x)))
        return self.norm(self.project(x))

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The same map in eval mode as one dense 3x3 convolution of `(B, C, H, W)`, as neuromorphic chips want it.

        An affine map that commutes with shifts is known by its answers to nothing and to single pixels.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("RepConv.fold() in training mode: its norms depend on the batch; call eval() first")
        dim = self.depthwise.out_channels
        pixels = torch.eye(dim).to(self.depthwise.weight)[:, None, None]
        bias = self(torch.zeros_like(pixels[:1])).flatten()
        answers = self(F.pad(pixels, (0, 0, 1, 1, 1, 1))) - bias  # (from, 3, 3, to)
        conv = nn.Conv2d(dim, dim, 3, padding=1).to(bias)
        conv.weight.copy_(answers.flip(1, 2).permute(3, 0, 1, 2))
        conv.bias = nn.Parameter(bias)
        return conv


class SpikeDrivenAttention(nn.Module):
    """`lif(scale * q (k^T v))` of spikes (the paper's SDSA-3), whose projections are convolutions."""

    def __init__(self, dim: int, num_heads: int, scale: float) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.head_lif = Lif()
        self.q, self.k, self.v = (RepConv(dim) for _ in range(3))
        self.q_lif, self.k_lif, self.v_lif = Lif(), Lif(), Lif()
        self.attn_lif = Lif(threshold=0.5)
        self.proj = RepConv(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head_lif(x)
        q, k, v = (
            neurons(each_step(conv, x))
            for conv, neurons in ((self.q, self.q_lif), (self.k, self.k_lif), (self.v, self.v_lif))
        )
        return each_step(self.proj, self.attn_lif(spike_attention(q, k, v, self.num_heads, self.scale)))


class Block(nn.Module):
    """Attention and MLP, each added to the stream of potentials."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, scale: float, layer_scale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.attn = SpikeDrivenAttention(dim, num_heads, scale)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.mlp = MembraneMlp(dim, hidden_dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(x)))
        return x + self.drop_path(self.ls2(self.mlp(x)))


class Stem(nn.Module):
    """Frames `(T or 1, B, H, W, in_chans)` -> `(T, B, H / 2, W / 2, dim)`: a 7x7 convolution and a `ConvBlock`."""

    def __init__(self, in_chans: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.conv = conv_norm(in_chans, dim, kernel=7, stride=2, bias=True)
        self.stage = SpikingStage(nn.Identity(), [ConvBlock(dim, hidden_dim)])

    def forward(self, x: Tensor, steps: int) -> Tensor:
        return self.stage(repeat(each_step(self.conv, x), steps))  # a still image is convolved once


class Downsample(nn.Module):
    """Spikes and a 3x3 convolution; the last stage's has stride 1."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.lif = Lif()
        self.conv = conv_norm(dim, out_dim, stride=stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return each_step(self.conv, self.lif(x))


class MetaSpikformer(SpikingBackbone):
    """Meta-SpikeFormer: a stem and four stages, two of convolutions and two of attention.

    The pyramid has five levels of strides 2 (the stem, half of `dims[0]` channels), 4, 8, 16 and 16. The authors'
    detection code takes `out_indices=(1, 2, 3, 4)`, their segmentation code `(0, 1, 2, 4)`. Maps are potentials, not
    spikes; `keep_time=True` keeps their steps.

    Args:
        in_chans: image channels; event cameras have 2.
        dims: channels of the four stages; the last two multiples of `num_heads`.
        depths: blocks of the four stages.
        timesteps: for which an image is shown.
        drop_path_rate: of the last attention block; the convolutions before have none. 0 in the authors' code, which
            builds stochastic depth and does not apply it.
        distilled: add a second classifier for a teacher's labels, see `set_distilled_training`.

    Raises:
        ValueError: for widths or depths that do not fit.
    """

    stem_name, stages_name = "stem", "stages"
    stem_stride = 2
    attn_scale = 0.125  # in every size
    layer_scale: float | None = None

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 360),
        depths: Sequence[int] = (1, 2, 6, 2),
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        timesteps: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        if len(dims) != 4 or len(depths) != 4:
            raise ValueError(f"dims={dims} and depths={depths} must have an entry for each of the four stages")
        if dims[0] % 2 or dims[2] % num_heads or dims[3] % num_heads:
            raise ValueError(f"dims={dims}: the first must be even, the last two multiples of num_heads={num_heads}")
        widths = (dims[0] // 2, *dims)
        hidden = [int(width * mlp_ratio) for width in widths]
        drops = iter(calculate_drop_path_rates(drop_path_rate, depths[2] + depths[3]))

        def block(level: int) -> nn.Module:
            if level < 3:
                return ConvBlock(widths[level], hidden[level])
            return Block(widths[level], num_heads, hidden[level], self.attn_scale, self.layer_scale, next(drops))

        self.stem = Stem(in_chans, widths[0], hidden[0])
        self.stages = nn.ModuleList(
            SpikingStage(
                Downsample(widths[level - 1], widths[level], stride=2 if level < 4 else 1),
                [block(level) for _ in range(depths[level - 1])],
            )
            for level in range(1, 5)
        )
        strides = (2, 4, 8, 16, 16)
        self.build_spiking_head(widths, strides, num_classes, global_pool, drop_rate, timesteps, Lif(), distilled)
        self.head.apply(init_linear)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Backbone.set_grad_checkpointing`; the stem's block, the largest of all, is recomputed too."""
        super().set_grad_checkpointing(enable)
        self.stem.stage.grad_checkpointing = enable

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


_CONVERT = [
    (r"^downsample1_1\.", "stem.conv."),
    (r"^ConvBlock1_1\.", "stem.stage.blocks."),
    (r"^downsample1_2\.", "stages.0.downsample.conv."),
    (r"^ConvBlock1_2\.", "stages.0.blocks."),
    (r"^downsample2\.", "stages.1.downsample.conv."),
    (r"^ConvBlock2_1\.0\.", "stages.1.blocks.0."),
    (r"^ConvBlock2_2\.0\.", "stages.1.blocks.1."),
    (r"^downsample3\.", "stages.2.downsample.conv."),
    (r"^block3\.", "stages.2.blocks."),
    (r"^downsample4\.", "stages.3.downsample.conv."),
    (r"^block4\.", "stages.3.blocks."),
    (r"\.encode_(conv|bn)\.", r".\1."),
    (r"\.Conv\.pwconv1\.", ".sep_conv.expand.linear."),
    (r"\.Conv\.bn1\.", ".sep_conv.expand.norm."),
    (r"\.Conv\.dwconv\.", ".sep_conv.depthwise."),
    (r"\.Conv\.pwconv2\.", ".sep_conv.project.linear."),
    (r"\.Conv\.bn2\.", ".sep_conv.project.norm."),
    (r"(\.blocks\.\d+)\.conv(\d)\.(?!conv\.|norm\.)", r"\1.conv\2.conv."),
    (r"(\.blocks\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"\.(q|k|v|proj)_conv\.0\.body\.0\.", r".\1.expand."),
    (r"\.(q|k|v|proj)_conv\.0\.body\.1\.bn\.", r".\1.pad_norm."),
    (r"\.(q|k|v|proj)_conv\.0\.body\.2\.0\.", r".\1.depthwise."),
    (r"\.(q|k|v|proj)_conv\.0\.body\.2\.1\.", r".\1.project.linear."),
    (r"\.(q|k|v|proj)_conv\.0\.body\.2\.2\.", r".\1.project.norm."),
    (r"\.(q|k|v|proj)_conv\.1\.", r".\1.norm."),
    (r"\.(fc1|fc2)_conv\.", r".\1.linear."),
    (r"\.(fc1|fc2)_bn\.", r".\1.norm."),
    (r"\.bn\.", ".norm."),
    (r"^head\.(?!fc)", "head.fc."),
    (r"^head_kd\.", "head.fc_dist."),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> ours; their 1x1 convolutions are linear layers here."""
    converted = {rename(key, _CONVERT): value for key, value in state.items()}
    linear = (".linear.weight", ".expand.weight")
    return {key: value.flatten(1) if key.endswith(linear) else value for key, value in converted.items()}


@register(METASPIKFORMER, params=15.1, gmacs=6.5, first_conv="stem.conv.conv")
def metaspikformer_15m(**kwargs: Any) -> nn.Module:
    """Meta-SpikeFormer of the authors' detection and segmentation, one step."""
    return build(MetaSpikformer, dict(), kwargs)


@register(METASPIKFORMER, params=31.3, gmacs=14.0, first_conv="stem.conv.conv")
def metaspikformer_8_384(**kwargs: Any) -> nn.Module:
    """Meta-SpikeFormer-8-384, one step."""
    return build(MetaSpikformer, dict(dims=(96, 192, 384, 480)), kwargs)


@register(METASPIKFORMER, params=55.4, gmacs=98.9, top1=80.0, first_conv="stem.conv.conv")
def metaspikformer_8_512(**kwargs: Any) -> nn.Module:
    """Meta-SpikeFormer-8-512; four steps, with which (and a teacher) it has its published accuracy."""
    return build(MetaSpikformer, dict(dims=(128, 256, 512, 640), timesteps=4), kwargs)


@register(METASPIKFORMER, params=123.7, gmacs=55.6, first_conv="stem.conv.conv")
def metaspikformer_8_768(**kwargs: Any) -> nn.Module:
    """Meta-SpikeFormer-8-768, one step; no numbers are published."""
    return build(MetaSpikformer, dict(dims=(192, 384, 768, 960)), kwargs)
