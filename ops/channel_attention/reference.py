"""The definition of channel-group attention (DaViT, arXiv 2204.03645, eq. 3)."""

from __future__ import annotations

from torch import Tensor


def channel_attention(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """See `striate.ops.channel_attention`."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads))).permute(2, 0, 3, 1, 4)
    weights = ((k * scale).transpose(-2, -1) @ v).softmax(-1)
    return (q @ weights.transpose(-2, -1).to(q.dtype)).transpose(1, 2).flatten(2)
