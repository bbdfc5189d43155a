"""Eager channel-group attention on a CPU.

The heads of one image are a strided batch that a matrix product takes and fills as it is; those of all images together
would be copied first. Training saves the projection alone: the weights are small and cheap to compute again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _backend


def channel_attention(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """See `striate.ops.channel_attention`."""
    rows = qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads)))
    return _ChannelAttention.apply(rows, scale).flatten(2)


class _ChannelAttention(torch.autograd.Function):
    """`(B, N, 3, heads, D)` -> `(B, N, heads, D)`."""

    @staticmethod
    def forward(ctx, rows: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows)
        ctx.scale = scale
        out = rows.new_empty(rows[:, :, 0].shape)
        with _backend.no_autocast(rows):
            for (q, k, v), result in zip(_by_head(rows), out.transpose(1, 2), strict=True):
                torch.bmm(q, _weights(k, v, scale).transpose(1, 2), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        for (q, k, v), g, (grad_q, grad_k, grad_v) in zip(
            _by_head(rows), grad.transpose(1, 2), _by_head(grad_rows), strict=True
        ):
            weights = _weights(k, v, ctx.scale)
            torch.bmm(g, weights, out=grad_q)
            grad_weights = torch.bmm(g.transpose(1, 2), q)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype) * ctx.scale
            torch.bmm(v, grad_scores.transpose(1, 2), out=grad_k)
            torch.bmm(k, grad_scores, out=grad_v)
        return grad_rows, None


def _by_head(rows: Tensor) -> Tensor:
    """`(B, 3, heads, N, D)`, a view."""
    return rows.permute(0, 2, 3, 1, 4)


def _weights(k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of one image, `(heads, D, D)`, without subnormal numbers: scores are sums over all tokens, so that there are
    many, and they make a product 20 times slower."""
    weights = torch.bmm(k.transpose(1, 2), v).mul_(scale).softmax(-1)
    return F.threshold(weights, torch.finfo(weights.dtype).tiny, 0.0, inplace=True)
