"""The definition of bi-level routing attention (BiFormer, arXiv 2303.08810, eq. 3-7)."""

from __future__ import annotations

from torch import Tensor

from ..partition import Size, crop, merge, pad_map, padded_size, split


def route_regions(qkv: Tensor, region: Size, topk: int, scale: float) -> Tensor:
    """See `striate.ops.route_regions`."""
    _, h, w, c = qkv.shape
    real = split(pad_map(qkv.new_ones(1, h, w, 1), region), region).sum(2)
    means = split(pad_map(qkv[..., : c // 3 * 2].detach(), region), region).sum(2) / real
    q, k = means.chunk(2, dim=-1)
    return ((q * scale) @ k.transpose(-2, -1)).topk(topk, dim=-1).indices


def routing_attention(qkv: Tensor, routes: Tensor, num_heads: int, region: Size, scale: float) -> Tensor:
    """See `striate.ops.routing_attention`."""
    b, h, w, c = qkv.shape
    padded = padded_size((h, w), region)
    groups = split(pad_map(qkv, region), region)
    r, n = groups.shape[1:3]
    q, k, v = groups.unflatten(-1, (3, num_heads, c // (3 * num_heads))).permute(3, 0, 1, 4, 2, 5)
    index = routes[..., None, None, None].expand(-1, -1, -1, num_heads, n, c // (3 * num_heads))
    k, v = (t[:, None].expand(b, r, *t.shape[1:]).gather(2, index).transpose(2, 3).flatten(3, 4) for t in (k, v))
    out = ((q * scale) @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    return crop(merge(out.transpose(2, 3).flatten(3), padded, region), (h, w))
