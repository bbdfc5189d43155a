"""Eager bi-level routing attention on a CPU.

Keys and values of the routed regions are gathered straight from the map for a few regions at a time, so that the copy
stays in cache and memory does not grow with top-k. Where the routed regions cover much of a small map, a masked dense
attention reads less than the gather would write. Training saves q, k, v alone and gathers again in the backward.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..partition import Size, group_order, pad_map, scatter_groups, split

CHUNK_BYTES = 1 << 20  # keys and values gathered at once: fits the second-level cache of current cores
DENSE_TOKENS = 1024  # a masked dense attention of more tokens costs more than the gather it saves
DENSE_SHARE = 4  # and so does one of which less than a quarter is wanted


def route_regions(qkv: Tensor, region: Size, topk: int, scale: float) -> Tensor:
    """See `striate.ops.route_regions`."""
    _, h, w, c = qkv.shape
    x = pad_map(qkv.detach(), region)
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), region).flatten(2).transpose(1, 2)[..., : c // 3 * 2]
    if x.shape[1:3] != (h, w):
        means = means / _real_share((h, w), region).to(means.dtype)
    q, k = means.chunk(2, dim=-1)
    return torch.bmm(q * scale, k.transpose(1, 2)).topk(topk, dim=-1, sorted=False).indices


def _real_share(size: Size, region: Size) -> Tensor:
    """Share of unpadded tokens in every region: `(R, 1)`."""
    rows, cols = (
        (length - torch.arange(0, length, part)).clamp_max(part) / part
        for length, part in zip(size, region, strict=True)
    )
    return (rows[:, None] * cols).reshape(-1, 1)


def routing_attention(qkv: Tensor, routes: Tensor, num_heads: int, region: Size, scale: float) -> Tensor:
    """See `striate.ops.routing_attention`."""
    b, h, w, _ = qkv.shape
    qkv = pad_map(qkv, region)
    height, width = qkv.shape[1:3]
    tokens, wanted = height * width, routes.shape[-1] * region[0] * region[1]
    if tokens <= DENSE_TOKENS and wanted * DENSE_SHARE >= tokens:
        out = _dense(qkv, routes, num_heads, region, scale)
    else:
        order = group_order(b, (height, width), region)
        groups = order.gather.view(b * routes.shape[1], region[0] * region[1])
        offset = torch.arange(b)[:, None, None] * routes.shape[1]
        out = _RoutedAttention.apply(qkv.flatten(0, 2), groups, (routes + offset).flatten(0, 1), num_heads, scale)
        out = scatter_groups(out.flatten(0, 1), order, (b, height, width))
    return out[:, :h, :w]


def _dense(qkv: Tensor, routes: Tensor, num_heads: int, region: Size, scale: float) -> Tensor:
    """Attention of all tokens to all, masked to the routed regions, without any reordering."""
    b, h, w, c = qkv.shape
    of_token = _region_of_token((h, w), region)
    allowed = torch.zeros(b, routes.shape[1], routes.shape[1], dtype=torch.bool).scatter_(2, routes, True)
    allowed = allowed[:, of_token][:, None, :, of_token]
    q, k, v = qkv.reshape(b, h * w, 3, num_heads, c // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
    return out.transpose(1, 2).reshape(b, h, w, c // 3)


@functools.lru_cache(maxsize=32)
def _region_of_token(size: Size, region: Size) -> Tensor:
    """Region number of every token of a padded map: `(H * W,)`."""
    with torch.inference_mode(False):
        tokens = split(torch.arange(size[0] * size[1]).view(1, *size, 1), region).flatten(2)[0]
        of_token = torch.empty(size[0] * size[1], dtype=torch.long)
        of_token[tokens.flatten()] = torch.arange(tokens.shape[0]).repeat_interleave(tokens.shape[1])
        return of_token


class _RoutedAttention(torch.autograd.Function):
    """Attention of every region to its routed regions, chunk by chunk: `(G, N, C)` from the rows of a map.

    `rows` `(B * H * W, 3 * C)`; `groups` `(G, N)` the row of each token of a region; `routes` `(G, topk)` regions.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows: Tensor, groups: Tensor, routes: Tensor, num_heads: int, scale: float
    ) -> Tensor:
        ctx.save_for_backward(rows, groups, routes)
        ctx.num_heads, ctx.scale = num_heads, scale
        out = rows.new_empty(*groups.shape, rows.shape[1] // 3)
        for part in _chunks(rows, groups, routes):
            q, k, v = _gather(rows, groups[part], groups[routes[part]].flatten(1))
            out[part] = _attend(q, k, v, num_heads, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        rows, groups, routes = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows)
        c = rows.shape[1] // 3
        for part in _chunks(rows, groups, routes):
            keys = groups[routes[part]].flatten(1)
            q, k, v = leaves = tuple(t.detach().requires_grad_() for t in _gather(rows, groups[part], keys))
            with torch.enable_grad():
                out = _attend(q, k, v, ctx.num_heads, ctx.scale)
            grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, grad[part])
            grad_rows[:, :c].index_copy_(0, groups[part].flatten(), grad_q.flatten(0, 1))
            grad_rows[:, c:].index_add_(0, keys.flatten(), torch.cat((grad_k, grad_v), -1).flatten(0, 1))
        return grad_rows, None, None, None, None


def _chunks(rows: Tensor, groups: Tensor, routes: Tensor) -> list[slice]:
    bytes_per_group = routes.shape[1] * groups.shape[1] * rows.shape[1] // 3 * 2 * rows.element_size()
    step = max(1, CHUNK_BYTES // bytes_per_group)
    return [slice(i, i + step) for i in range(0, groups.shape[0], step)]


def _gather(rows: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q `(G, N, C)` and k, v `(G, M, C)` of the given rows."""
    c = rows.shape[1] // 3
    q = rows[:, :c].index_select(0, queries.flatten()).view(*queries.shape, c)
    kv = rows[:, c:].index_select(0, keys.flatten()).view(*keys.shape, 2 * c)
    return q, kv[..., :c], kv[..., c:]


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    q, k, v = (t.unflatten(-1, (num_heads, t.shape[-1] // num_heads)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
