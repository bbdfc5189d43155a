"""Spike-driven Transformer (arXiv 2307.01694): between layers only spikes, so that every product is an addition.

The residual stream is a membrane potential: neurons come before a layer, not after it. `convert` reads the authors'
files (https://github.com/BICLab/Spike-Driven-Transformer, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ._registry import Family, build, register
from ._spiking import DropPath, Lif, LinearNorm, SpikingBackbone, SpikingStage, each_step, repeat
from .spikformer import SpikingPatchEmbed, convert

SPIKE_DRIVEN_TRANSFORMER = Family(
    "spike_driven_transformer",
    "Spike-driven Transformer",
    "https://arxiv.org/abs/2307.01694",
    "https://github.com/BICLab/Spike-Driven-Transformer",
    "Apache-2.0",
)


class MembranePatchEmbed(SpikingPatchEmbed):
    """Spikformer's stem for a stream of potentials: the last pool and the shortcut come before the neurons."""

    def __init__(self, in_chans: int, dim: int, pools: Sequence[bool]) -> None:
        super().__init__(in_chans, dim, pools)
        del self.rpe_lif

    def forward(self, x: Tensor, steps: int) -> Tensor:
        *first, last = zip(self.convs, self.lifs, self.pools, strict=True)
        for i, (conv, neurons, pool) in enumerate(first):
            x = each_step(conv, x)
            x = each_step(pool, neurons(repeat(x, steps) if i == 0 else x))
        conv, neurons, pool = last
        x = each_step(pool, each_step(conv, x))
        return x + each_step(self.rpe, neurons(x))


class SpikingQkv(nn.Module):
    """Spikes of a stream of potentials, and their projections to the spikes q, k, v."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shortcut_lif = Lif()
        self.q, self.k, self.v = (LinearNorm(dim, dim) for _ in range(3))
        self.q_lif, self.k_lif, self.v_lif = Lif(), Lif(), Lif()
        self.proj = LinearNorm(dim, dim, bias=True)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Potentials `(T, B, H, W, C)` -> spikes q, k, v of the same shape."""
        x = self.shortcut_lif(x)
        q, k, v = each_step(self.q, x), each_step(self.k, x), each_step(self.v, x)
        return self.q_lif(q), self.k_lif(k), self.v_lif(v)


class SpikeDrivenSelfAttention(SpikingQkv):
    """The channels of q in which enough of `k * v` comes together over the tokens: a mask and sums, no product.

    Channels do not meet, so that heads make no difference.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim)
        self.talking_heads_lif = Lif(threshold=0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        mask = self.talking_heads_lif((k * v).sum((2, 3), keepdim=True))
        return each_step(self.proj, q * mask)


class MembraneMlp(nn.Module):
    """Spikes, linear layer, batch norm; twice."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1_lif, self.fc1 = Lif(), LinearNorm(dim, hidden_dim, bias=True)
        self.fc2_lif, self.fc2 = Lif(), LinearNorm(hidden_dim, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return each_step(self.fc2, self.fc2_lif(each_step(self.fc1, self.fc1_lif(x))))


class Block(nn.Module):
    """Attention and MLP, each added to the stream of potentials."""

    def __init__(self, attn: nn.Module, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = MembraneMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class SpikeDrivenTransformer(SpikingBackbone):
    """Spike-driven Transformer: one stage, in which the map keeps its size.

    Args:
        in_chans: image channels; event cameras have 2.
        dim: channels, a multiple of 8 and of `num_heads`.
        depths: blocks, one entry.
        pools: after which of the stem's four convolutions the map is halved; its stride is 2 to their number.
        timesteps: for which an image is shown.
        drop_path_rate: of the last block; 0 in the authors' code, which builds stochastic depth and does not apply it.
    """

    stages_name = "stages"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 512,
        depths: Sequence[int] = (8,),
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        pools: Sequence[bool] = (True, True, True, True),
        timesteps: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % 8 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of 8 and of num_heads={num_heads}")
        if len(depths) != 1 or len(pools) != 4:
            raise ValueError(f"depths={depths} must have one entry and pools={pools} four")
        drops = calculate_drop_path_rates(drop_path_rate, depths[0])
        self.patch_embed = MembranePatchEmbed(in_chans, dim, pools)
        blocks = [Block(self.attention(dim, num_heads), dim, mlp_ratio, drop) for drop in drops]
        self.stages = nn.ModuleList([SpikingStage(nn.Identity(), blocks)])
        self.apply(_init)
        self.build_spiking_head([dim], [2 ** sum(pools)], num_classes, global_pool, drop_rate, timesteps, Lif())

    def attention(self, dim: int, num_heads: int) -> nn.Module:
        """The token mixer of a block: potentials `(T, B, H, W, C)` -> what is added to them."""
        return SpikeDrivenSelfAttention(dim, num_heads)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' keys are Spikformer's."""
        return convert(state)


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_CONV = "patch_embed.convs.0.conv"
CIFAR = dict(depths=(2,), pools=(False, False, True, True))


@register(SPIKE_DRIVEN_TRANSFORMER, params=16.8, gmacs=18.4, top1=72.28, crop_pct=0.95, first_conv=_CONV)
def spike_driven_transformer_8_384(**kwargs: Any) -> nn.Module:
    """Spike-driven Transformer-8-384."""
    return build(SpikeDrivenTransformer, dict(dim=384), kwargs)


@register(SPIKE_DRIVEN_TRANSFORMER, params=29.7, gmacs=32.8, top1=74.57, crop_pct=0.95, first_conv=_CONV)
def spike_driven_transformer_8_512(**kwargs: Any) -> nn.Module:
    """Spike-driven Transformer-8-512."""
    return build(SpikeDrivenTransformer, dict(), kwargs)


@register(SPIKE_DRIVEN_TRANSFORMER, params=66.3, gmacs=73.7, top1=77.07, crop_pct=0.95, first_conv=_CONV)
def spike_driven_transformer_8_768(**kwargs: Any) -> nn.Module:
    """Spike-driven Transformer-8-768; its accuracy is that of images of 288 pixels."""
    return build(SpikeDrivenTransformer, dict(dim=768), kwargs)


@register(SPIKE_DRIVEN_TRANSFORMER, params=10.7, gmacs=4.9, size=32, crop_pct=1.0, first_conv=_CONV)
def spike_driven_transformer_2_512_cifar(**kwargs: Any) -> nn.Module:
    """Spike-driven Transformer-2-512 for images of 32 pixels."""
    return build(SpikeDrivenTransformer, dict(CIFAR), kwargs)
