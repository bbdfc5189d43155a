"""What spiking backbones share: time steps, neurons as layers, the classifier, the contract for maps with time.

Maps are `(T, B, H, W, C)`. Nothing outlives a forward: the potentials of a neuron start anew with every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.utils.checkpoint
from timm.layers import DropPath as SampleDropPath
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from ..ops import lif, multispike
from ._base import Backbone, Stage
from ._layers import BatchNorm, ConvNorm, image_to_map


def each_step(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer of maps `(N, H, W, C)` to every step of `(T, B, H, W, C)`."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def repeat(x: Tensor, steps: int) -> Tensor:
    """`(1, B, …)` -> `(steps, B, …)` of the same content, without a copy."""
    return x if steps == 1 else x.expand(steps, *x.shape[1:])


class Lif(nn.Module):
    """Leaky integrate-and-fire neurons over the first axis, with hard reset to 0; see `striate.ops.lif`."""

    def __init__(self, threshold: float = 1.0, tau: float = 2.0) -> None:
        super().__init__()
        self.threshold, self.tau = threshold, tau

    def forward(self, x: Tensor) -> Tensor:
        return lif(x, tau=self.tau, threshold=self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, tau={self.tau}"


class Multispike(nn.Module):
    """Integer neurons, several spikes at once; see `striate.ops.multispike`."""

    def __init__(self, levels: int = 4, step: float | None = None) -> None:
        super().__init__()
        self.levels, self.step = levels, step

    def forward(self, x: Tensor) -> Tensor:
        return multispike(x, levels=self.levels, step=self.step)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, step={self.step or 1 / self.levels}"


def conv_norm(dim: int, out_dim: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> ConvNorm:
    """Convolution padded to keep the size (divided by the stride, rounded up), and batch norm."""
    conv = nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, bias=bias)
    return ConvNorm(conv, BatchNorm(out_dim))


class LinearNorm(nn.Module):
    """Linear layer (a 1x1 convolution in most papers) and batch norm of `(B, H, W, C)`."""

    def __init__(self, dim: int, out_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim, bias=bias)
        self.norm = BatchNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class MaxPool(nn.MaxPool2d):
    """3x3 maximum of `(B, H, W, C)` with stride 2; sizes are rounded up."""

    def __init__(self) -> None:
        super().__init__(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(SampleDropPath):
    """Stochastic depth of `(T, B, …)`: an image keeps or loses the branch in all its steps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class SpikingStage(Stage):
    """A stage of maps `(T, B, H, W, C)`."""

    batch_axis = 1


def spike_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """`scale * q (k^T v)` of spikes `(T, B, H, W, C)`: linear in the number of tokens; heads are groups of channels."""
    heads = (t.flatten(2, 3).unflatten(-1, (num_heads, -1)).transpose(2, 3) for t in (q, k, v))
    query, key, value = heads  # (T, B, heads, N, D)
    y = (query @ (key.transpose(-2, -1) @ value)) * scale
    return y.transpose(2, 3).flatten(3).view_as(q)


class SpikingHead(nn.Module):
    """Pool, optional neurons, mean over the steps, classifier `fc`: `(T, B, H, W, C)` -> `(B, num_classes)`.

    Args:
        lif: neurons that turn the pooled potentials into spikes, or None.
        distilled: add a second classifier `fc_dist`, which learns from a teacher; the result is the mean of both.

    Attributes:
        distilled_training: in training, a distilled head returns the pair `(logits, logits_dist)`.
    """

    distilled_training = False

    def __init__(
        self,
        dim: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        lif: nn.Module | None,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.drop_rate, self.distilled = dim, drop_rate, distilled
        self.lif = lif or nn.Identity()
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; `global_pool` is timm's `avg`, `max`, … or empty for none."""
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True, input_fmt="NHWC")
        if num_classes and self.global_pool.is_identity():
            raise ValueError(f"num_classes={num_classes} with global_pool='': pool, or pass num_classes=0")
        self.fc = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        if self.distilled:
            self.fc_dist = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False, keep_time: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if self.global_pool.is_identity():
            return x if keep_time else x.mean(0)
        x = self.lif(each_step(self.global_pool, x))
        if not keep_time:
            x = x.mean(0)  # the classifier is linear: the mean of its inputs gives the mean of its outputs
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        if pre_logits or not self.distilled:
            return x if pre_logits else self.fc(x)
        logits, logits_dist = self.fc(x), self.fc_dist(x)
        if self.training and self.distilled_training:
            return logits, logits_dist
        return (logits + logits_dist) / 2


class SpikingBackbone(Backbone):
    """Base of the spiking backbones.

    Takes images `(B, C, H, W)`, seen in each of `timesteps` steps, or event frames `(T, B, C, H, W)` with a time of
    their own. `forward_features` returns `(T, B, H, W, C)`, `forward` the mean logits over the steps, and
    `forward_intermediates` and feature pyramids the mean maps.

    A subclass's stem takes the frames `(T or 1, B, H, W, C)` and the number of times that it has to repeat them.

    Attributes:
        timesteps: steps for which an image is shown.
        keep_time: intermediates and pyramids keep their steps: `(T, B, C, H, W)`.
        step_logits: in training, `forward` returns the logits of every step, `(T, B, num_classes)`.
    """

    timesteps: int
    keep_time = False
    step_logits = False
    checkpoint_stem = False
    head: SpikingHead

    def build_spiking_head(
        self,
        dims: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        timesteps: int,
        lif: nn.Module | None = None,
        distilled: bool = False,
    ) -> None:
        """Finish construction as `build_head` does, with a `SpikingHead`.

        Raises:
            ValueError: if `timesteps` is less than 1.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps={timesteps} must be at least 1")
        self.timesteps = timesteps
        self.norm = nn.Identity()
        head = SpikingHead(dims[-1], num_classes, global_pool, drop_rate, lif, distilled)
        self.build_head(dims, strides, num_classes, global_pool, drop_rate, head)

    def embed(self, x: Tensor) -> Tensor:
        """Image `(B, in_chans, H, W)` or frames `(T, B, in_chans, H, W)` -> first map `(T, B, H, W, C)`."""
        if x.ndim not in (4, 5):
            raise ValueError(f"input {tuple(x.shape)}; pass images (B, C, H, W) or event frames (T, B, C, H, W)")
        stem: Callable[..., Tensor] = self.get_submodule(self.stem_name)
        if self.checkpoint_stem and torch.is_grad_enabled():
            stem = functools.partial(torch.utils.checkpoint.checkpoint, stem, use_reentrant=False)
        if x.ndim == 5:
            return stem(image_to_map(x.flatten(0, 1)).unflatten(0, x.shape[:2]), 1)
        return stem(image_to_map(x)[None], self.timesteps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Backbone.set_grad_checkpointing`; a stem that is no level, with the largest maps, is recomputed too."""
        super().set_grad_checkpointing(enable)
        self.checkpoint_stem = enable and not self.stem_stride

    @property
    def head_dist(self) -> nn.Module:
        """The classifier that learns from a teacher, an attribute of models with a distilled head alone."""
        return self.head.fc_dist

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether `forward` returns `(logits, logits_dist)` in training.

        Raises:
            ValueError: if there is no distilled head.
        """
        if enable and not self.head.distilled:
            raise ValueError(f"this {type(self).__name__} has no distilled head; build it with distilled=True")
        self.head.distilled_training = enable

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Image `(B, in_chans, H, W)` or frames `(T, B, in_chans, H, W)` -> logits `(B, num_classes)`.

        In training with `step_logits`: `(T, B, num_classes)`. In distilled training: a pair of logits.
        """
        return self.head(self.forward_features(x), keep_time=self.step_logits and self.training)

    def forward_head(  # type: ignore[override]
        self, x: Tensor, pre_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Last map `(T, B, H, W, C)` -> logits `(B, num_classes)`, or what the classifier reads `(B, num_features)`."""
        return self.head(x, pre_logits=pre_logits)

    def _to_layout(self, x: Tensor, layout: str) -> Tensor:
        if not self.keep_time:
            return super()._to_layout(x.mean(0), layout)
        return (x.movedim(-1, -3) if layout == "NCHW" else x).contiguous()
