"""Bi-level routing attention: every region of a map attends to the few regions most like it (arXiv 2303.08810)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _backend
from ..partition import padded_size, to_size
from . import cpu, reference, triton

_PATHS: dict[str, Any] = {"reference": reference, "cpu": cpu, "triton": triton}


def route_regions(
    qkv: Tensor,
    *,
    region: int | tuple[int, int],
    topk: int,
    scale: float | None = None,
) -> Tensor:
    """The regions that each region of a map attends to: those whose mean key is most like its mean query.

    No gradient flows through the choice, as published.

    Args:
        qkv: `(B, H, W, 3 * C)`, channels ordered q, k, v. Where H or W is no multiple of `region`, the last regions are
            smaller: padding does not enter the means.
        region: tokens per region, one number or (height, width).
        topk: regions to choose.
        scale: factor of the affinities; default `C ** -0.5`.

    Returns:
        `(B, R, topk)` int64, regions numbered row by row. Exact ties may be broken either way.

    Raises:
        ValueError: if shapes do not fit together or the map has fewer than `topk` regions.
    """
    region = to_size(region, "region")
    if qkv.ndim != 4 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv {tuple(qkv.shape)} must be (B, H, W, 3 * C)")
    _, h, w, c = qkv.shape
    height, width = padded_size((h, w), region)
    count = (height // region[0]) * (width // region[1])
    if not 0 < topk <= count:
        raise ValueError(
            f"topk={topk}, but a {h}x{w} map has {count} regions of {region[0]}x{region[1]} tokens;"
            f" choose 1 to {count}, or more regions"
        )
    path = _backend.choose("route_regions", qkv)
    return _PATHS[path].route_regions(qkv, region, topk, (c // 3) ** -0.5 if scale is None else scale)


def routing_attention(
    qkv: Tensor,
    routes: Tensor,
    *,
    num_heads: int,
    region: int | tuple[int, int],
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of the tokens of each region to all tokens of the regions it is routed to.

    Where H or W is no multiple of `region`, the map is padded on the right and bottom with zeros, which take part in
    the attention, as published.

    Args:
        qkv: `(B, H, W, 3 * C)`, channels ordered q, k, v and within each by head.
        routes: `(B, R, topk)` int64 from `route_regions` with the same `region`.
        num_heads: heads; divides C.
        region: tokens per region, one number or (height, width).
        scale: factor of the scores; default `(C / num_heads) ** -0.5`. The published models use `C ** -0.5`.

    Returns:
        `(B, H, W, C)` in the dtype of `qkv`.

    Raises:
        ValueError: if shapes do not fit together.
    """
    region = to_size(region, "region")
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv {tuple(qkv.shape)} must be (B, H, W, 3 * C) with C a multiple of num_heads={num_heads}")
    b, h, w, c = qkv.shape
    height, width = padded_size((h, w), region)
    count = (height // region[0]) * (width // region[1])
    if routes.ndim != 3 or routes.shape[:2] != (b, count):
        raise ValueError(f"routes {tuple(routes.shape)} must be ({b}, {count}, topk) for {count} regions of {region}")
    arguments = (qkv, routes, num_heads, region, (c // (3 * num_heads)) ** -0.5 if scale is None else scale)
    path = _backend.choose("routing_attention", qkv, lambda: triton.obstacle(*arguments))
    return _PATHS[path].routing_attention(*arguments)
