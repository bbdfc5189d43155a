"""The operators of `triton.py` on CPU tensors, in plain PyTorch: a graph that was exported on a GPU runs here.

Autograd is off inside an operator, and `torch.func` fails there under a dispatch mode, so the gradient is written out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..partition import Size, crop, merge, pad_map, padded_size, split
from . import reference

LOG2E = math.log2(math.e)


class _Gathered(NamedTuple):
    """q `(B, R, N, heads, dim)`; k and v of the routed regions `(B, R, topk, N, heads, dim)`; their rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor  # (B * R * topk,) number of the region, counted over the batch


def forward(qkv: Tensor, routes: Tensor, num_heads: int, region: Size, scale: float) -> tuple[Tensor, Tensor]:
    """See `launch_forward` in `triton.py`."""
    out = reference.routing_attention(qkv, routes, num_heads, region, scale)
    part = _gather(qkv, routes, num_heads, region)
    lse = _scores(part.q, part.k, scale).flatten(3, 4).logsumexp(3) * LOG2E
    return out.contiguous(), _to_map(lse, qkv, region).permute(0, 3, 1, 2).float().contiguous()


def backward(
    grad: Tensor, qkv: Tensor, routes: Tensor, out: Tensor, lse: Tensor, num_heads: int, region: Size, scale: float
) -> Tensor:
    """See `launch_backward` in `triton.py`."""
    part = _gather(qkv, routes, num_heads, region)
    do, o = (_to_groups(x, region).unflatten(-1, (num_heads, -1)) for x in (grad, out))
    level = _to_groups(lse.permute(0, 2, 3, 1), region)[:, :, :, None, None]
    shift = (do * o).sum(-1)[:, :, :, None, None]
    weights = (_scores(part.q, part.k, scale) - level / LOG2E).exp()
    grad_scores = weights * (_scores(do, part.v, 1.0) - shift) * scale
    grad_q = torch.einsum("brntmh,brtmhd->brnhd", grad_scores, part.k)
    grad_kv = [
        torch.zeros_like(grad_q).flatten(0, 1).index_add(0, part.rows, each.flatten(0, 2)).view_as(grad_q)
        for each in (
            torch.einsum("brntmh,brnhd->brtmhd", grad_scores, part.q),
            torch.einsum("brntmh,brnhd->brtmhd", weights, do),
        )
    ]
    return _to_map(torch.stack((grad_q, *grad_kv), 3).flatten(3), qkv, region).to(qkv.dtype).contiguous()


def _gather(qkv: Tensor, routes: Tensor, num_heads: int, region: Size) -> _Gathered:
    q, k, v = _to_groups(qkv, region).unflatten(-1, (3, num_heads, -1)).unbind(3)
    images = torch.arange(q.shape[0], device=q.device)[:, None, None]
    return _Gathered(q, k[images, routes], v[images, routes], (images * q.shape[1] + routes).flatten())


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`(B, R, N, topk, N, heads)`"""
    return torch.einsum("brnhd,brtmhd->brntmh", q * scale, k)


def _to_groups(x: Tensor, region: Size) -> Tensor:
    """A map in float32, or float64, as `(B, R, N, channels)`."""
    return split(pad_map(x.to(torch.promote_types(x.dtype, torch.float32)), region), region)


def _to_map(groups: Tensor, like: Tensor, region: Size) -> Tensor:
    size = (like.shape[1], like.shape[2])
    return crop(merge(groups, padded_size(size, region), region), size)
