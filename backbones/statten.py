"""STAtten (arXiv 2409.19764): Spike-driven Transformer whose attention spans several time steps.

`convert` reads the authors' files (https://github.com/Intelligent-Computing-Lab-Yale/STAtten, MIT).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._registry import Family, build, register
from ._spiking import Lif, each_step
from .spike_driven_transformer import CIFAR, SpikeDrivenTransformer, SpikingQkv

STATTEN = Family(
    "statten",
    "STAtten",
    "https://arxiv.org/abs/2409.19764",
    "https://github.com/Intelligent-Computing-Lab-Yale/STAtten",
    "MIT",
)


class SpatialTemporalAttention(SpikingQkv):
    """`lif(q (k^T v) / H)` over the tokens of `chunk_size` steps at a time; H is the height of the map, as published.

    Raises (in the forward):
        ValueError: if the time steps are not a multiple of `chunk_size`.
    """

    def __init__(self, dim: int, num_heads: int, chunk_size: int) -> None:
        super().__init__(dim)
        self.num_heads, self.chunk_size = num_heads, chunk_size
        self.attn_lif = Lif(threshold=0.5)

    def forward(self, x: Tensor) -> Tensor:
        t, b, h, w, c = x.shape
        if t % self.chunk_size:
            raise ValueError(f"{t} time steps must be a multiple of chunk_size={self.chunk_size}; pass another")
        q, k, v = (self._chunks(spikes) for spikes in self.qkv(x))
        y = q @ (k.transpose(-2, -1) @ v * (1 / h))  # (chunks, B, heads, steps * N, D)
        y = y.unflatten(3, (self.chunk_size, h * w)).permute(0, 3, 1, 4, 2, 5).reshape(t, b, h * w, c)
        return each_step(self.proj, self.attn_lif(y).view_as(x))

    def _chunks(self, spikes: Tensor) -> Tensor:
        """`(T, B, H, W, C)` -> `(chunks, B, heads, steps * N, D)`."""
        tokens = spikes.flatten(2, 3).unflatten(-1, (self.num_heads, -1))
        chunks = len(tokens) // self.chunk_size
        return tokens.unflatten(0, (chunks, self.chunk_size)).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)


class STAtten(SpikeDrivenTransformer):
    """Spike-driven Transformer with spatial-temporal attention.

    Args:
        chunk_size: time steps that attend to each other; a divisor of `timesteps`.
        **kwargs: those of `SpikeDrivenTransformer`.
    """

    def __init__(self, chunk_size: int = 2, timesteps: int = 4, **kwargs: Any) -> None:
        if chunk_size < 1 or timesteps % chunk_size:
            raise ValueError(f"chunk_size={chunk_size} must be a divisor of timesteps={timesteps}")
        self.chunk_size = chunk_size
        super().__init__(timesteps=timesteps, **kwargs)

    def attention(self, dim: int, num_heads: int) -> nn.Module:
        """See `SpikeDrivenTransformer.attention`."""
        return SpatialTemporalAttention(dim, num_heads, self.chunk_size)


_CONV = "patch_embed.convs.0.conv"


@register(STATTEN, params=29.7, gmacs=33.2, crop_pct=0.95, first_conv=_CONV)
def statten_8_512(**kwargs: Any) -> nn.Module:
    """STAtten-8-512."""
    return build(STAtten, dict(), kwargs)


@register(STATTEN, params=66.3, gmacs=74.6, top1=78.39, crop_pct=0.95, first_conv=_CONV)
def statten_8_768(**kwargs: Any) -> nn.Module:
    """STAtten-8-768."""
    return build(STAtten, dict(dim=768), kwargs)


@register(STATTEN, params=10.7, gmacs=5.0, size=32, crop_pct=1.0, first_conv=_CONV)
def statten_2_512_cifar(**kwargs: Any) -> nn.Module:
    """STAtten-2-512 for images of 32 pixels."""
    return build(STAtten, dict(CIFAR), kwargs)
