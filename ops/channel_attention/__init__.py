"""Attention between the channels of a head, over all tokens: linear in their number (DaViT, arXiv 2204.03645)."""

from __future__ import annotations

from torch import Tensor

from .. import _backend
from . import cpu, reference


def channel_attention(qkv: Tensor, *, num_heads: int, scale: float | None = None) -> Tensor:
    """Channels of each head attend to each other: weights `softmax(scale k^T v)` over the tokens, applied to q.

    Args:
        qkv: `(B, N, 3 * C)`, channels ordered q, k, v and within each by head.
        num_heads: groups of channels; divides C.
        scale: factor of the scores; default `(C / num_heads) ** -0.5`, as in the authors' code.

    Returns:
        `(B, N, C)` in the dtype of `qkv`.

    Raises:
        ValueError: if `qkv` has another shape.
    """
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv {tuple(qkv.shape)} must be (B, N, 3 * C) with C a multiple of num_heads={num_heads}")
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else scale
    path = _backend.choose("channel_attention", qkv)
    run = cpu.channel_attention if path == "cpu" else reference.channel_attention
    return run(qkv, num_heads, scale)
