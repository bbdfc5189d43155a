"""Triton kernels of routing attention: tiles of rows against tiles of columns, both found in the map by arithmetic.

A region's tokens, and the tokens of the regions it is routed to, are numbered in one row: token `i` of that row is
token `i % tokens` of the region in place `i // tokens` of a list. Tiles are cut from the row, so that one tile of keys
holds as many small regions as fit, and a pointer per key reads them where they are: nothing is gathered first.

Regions of a few tokens cannot fill a tile of queries, since each region has other keys. With `DENSE` a tile of
queries holds many regions and meets all tokens of its image; one 64-bit word per region says which regions it may see.

Padded tokens are zeros: as keys they take part, as queries nobody asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._triton import kernel, tl, triton

# Triton compiles anew for an integer that is 1 or divisible by 16: images of many sizes would meet every combination
_SIZES = ["height", "width", "region_h", "region_w", "columns", "regions", "topk", "heads"]


def _kernel_for_any_size(function: Callable[..., Any]) -> Any:
    return triton.jit(function, do_not_specialize=_SIZES) if triton else function


@kernel
def _divide(index, divisor):
    """Quotient and remainder, exact for 0 <= index < 2**20: integer division costs five times the instructions."""
    quotient = ((index.to(tl.float32) + 0.5) * (1.0 / divisor)).to(tl.int32)
    return quotient, index - quotient * divisor


@kernel
def _rows(tile, regions, tokens, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """The image, regions and tokens of tile number `tile`, and which of its rows there are."""
    if DENSE:
        tiles = tl.cdiv(regions * tokens, BLOCK)
        image = tile // tiles
        region, token = _divide((tile % tiles) * BLOCK + tl.arange(0, BLOCK), tokens)
        exists = region < regions
    else:
        tiles = tl.cdiv(tokens, BLOCK)
        image, region = tile // tiles // regions, tile // tiles % regions
        token = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
        exists = token < tokens
    return image, region, token, exists


@kernel
def _columns(start, count, routes, tokens, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """Regions and tokens number `start` onwards in a list of regions with `count` tokens, and which there are."""
    index = start + tl.arange(0, BLOCK)
    place, token = _divide(index, tokens)
    exists = index < count
    region = place
    if not DENSE:
        region = tl.load(routes + place, mask=exists, other=0).to(tl.int32)
    return region, token, exists


@kernel
def _find(region, token, exists, height, width, region_h, region_w, columns):
    """Row and column of tokens in the map, and which of them are no padding."""
    region_y, region_x = _divide(region, columns)
    y, x = _divide(token, region_w)
    y, x = region_y * region_h + y, region_x * region_w + x
    return y, x, exists & (y < height) & (x < width)


@kernel
def _load(base, offset, real, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors of one head at `offset`, zeros for padding: `(tokens, BLOCK_D)`."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(base + offset[:, None] + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)


@kernel
def _store(base, offset, real, value, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = real[:, None] & (d < DIM)[None, :]
    tl.store(base + offset[:, None] + d[None, :], value.to(base.dtype.element_ty), mask=mask)


@kernel
def _allowed(words, region, exists):
    """Whether the bit of `region` is set in `words`; both broadcast."""
    return (((words >> (region & 63).to(tl.int64)) & 1) != 0) & exists  # a shift by more than 63 is undefined


@_kernel_for_any_size
def _routing_attention_fwd_kernel(
    qkv,
    routes,
    out,
    lse,
    stride_b,
    stride_h,
    stride_w,
    height,
    width,
    region_h,
    region_w,
    columns,
    regions,
    topk,
    heads,
    scale_log2,
    PRECISION: tl.constexpr,
    DENSE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per tile of queries and head, heads innermost: they share the cache lines of a token.

    Loops over the tiles of the routed keys with an online softmax in base 2. Reads q once, k and v once per tile of
    queries that is routed to them; writes out and lse once.
    """
    head = tl.program_id(0) % heads
    tokens = region_h * region_w
    image, region, token, exists = _rows(tl.program_id(0) // heads, regions, tokens, BLOCK_M, DENSE)
    y, x, real = _find(region, token, exists, height, width, region_h, region_w, columns)
    base = qkv + image.to(tl.int64) * stride_b + head * DIM
    channels = heads * DIM
    q = _load(base, y * stride_h + x * stride_w, real, DIM, BLOCK_D)
    group = image * regions + region
    if DENSE:
        words = tl.load(routes + group, mask=exists, other=0)
        count = regions * tokens
    else:
        routes += group * topk
        count = topk * tokens

    top = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row whose first tile is masked must not give inf - inf
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_N):
        key_region, key_token, listed = _columns(start, count, routes, tokens, BLOCK_N, DENSE)
        key_y, key_x, key_real = _find(key_region, key_token, listed, height, width, region_h, region_w, columns)
        offset = key_y * stride_h + key_x * stride_w
        k = _load(base + channels, offset, key_real, DIM, BLOCK_D)
        v = _load(base + 2 * channels, offset, key_real, DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if DENSE:
            scores = tl.where(_allowed(words[:, None], key_region[None, :], listed[None, :]), scores, float("-inf"))
        else:
            scores = tl.where(listed[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    place = y * width + x
    out += image.to(tl.int64) * height * width * channels + head * DIM
    _store(out, place * channels, real, acc / total[:, None], DIM, BLOCK_D)
    lse += (image * heads + head).to(tl.int64) * height * width
    tl.store(lse + place, top + tl.log2(total), mask=real)


@_kernel_for_any_size
def _routing_attention_bwd_q_kernel(
    qkv,
    routes,
    out,
    lse,
    grad,
    delta,
    grad_qkv,
    stride_b,
    stride_h,
    stride_w,
    height,
    width,
    region_h,
    region_w,
    columns,
    regions,
    topk,
    heads,
    scale,
    scale_log2,
    PRECISION: tl.constexpr,
    DENSE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of q: programs, loop and re-reads as in the forward.

    Reads q, out, grad and lse once; writes the gradient of q once, and `delta`, the inner products of out and grad,
    which the kernel for k and v needs.
    """
    head = tl.program_id(0) % heads
    tokens = region_h * region_w
    image, region, token, exists = _rows(tl.program_id(0) // heads, regions, tokens, BLOCK_M, DENSE)
    y, x, real = _find(region, token, exists, height, width, region_h, region_w, columns)
    base = qkv + image.to(tl.int64) * stride_b + head * DIM
    channels = heads * DIM
    q = _load(base, y * stride_h + x * stride_w, real, DIM, BLOCK_D)
    place = y * width + x
    to_map = image.to(tl.int64) * height * width * channels + head * DIM
    row = (image * heads + head).to(tl.int64) * height * width + place
    do = _load(grad + to_map, place * channels, real, DIM, BLOCK_D)
    o = _load(out + to_map, place * channels, real, DIM, BLOCK_D)
    shift = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row, shift, mask=real)
    level = tl.load(lse + row, mask=real, other=0.0)
    group = image * regions + region
    if DENSE:
        words = tl.load(routes + group, mask=exists, other=0)
        count = regions * tokens
    else:
        routes += group * topk
        count = topk * tokens

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_N):
        key_region, key_token, listed = _columns(start, count, routes, tokens, BLOCK_N, DENSE)
        key_y, key_x, key_real = _find(key_region, key_token, listed, height, width, region_h, region_w, columns)
        offset = key_y * stride_h + key_x * stride_w
        k = _load(base + channels, offset, key_real, DIM, BLOCK_D)
        v = _load(base + 2 * channels, offset, key_real, DIM, BLOCK_D)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - level[:, None])
        if DENSE:
            weights = tl.where(_allowed(words[:, None], key_region[None, :], listed[None, :]), weights, 0.0)
        else:  # though k = 0 beyond the list: where all scores are far below zero the weight of a zero is infinite
            weights = tl.where(listed[None, :], weights, 0.0)
        grad_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - shift[:, None])
        acc += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    _store(grad_qkv + 3 * (to_map - head * DIM) + head * DIM, 3 * place * channels, real, acc * scale, DIM, BLOCK_D)


@_kernel_for_any_size
def _routing_attention_bwd_kv_kernel(
    qkv,
    routes,
    starts,
    lse,
    grad,
    delta,
    grad_qkv,
    stride_b,
    stride_h,
    stride_w,
    height,
    width,
    region_h,
    region_w,
    columns,
    regions,
    heads,
    scale,
    scale_log2,
    PRECISION: tl.constexpr,
    DENSE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of k and v: one program per tile of keys and head, scores transposed, keys in rows.

    `routes` is the inverted table: the regions whose queries see region `g` stand from `starts[g]` to `starts[g + 1]`.
    Loops over the tiles of their queries in that order: every sum has one order, no atomics. Reads k and v once; q,
    grad, lse and delta once per tile of keys they are routed to; writes the gradients of k and v once.
    """
    head = tl.program_id(0) % heads
    tokens = region_h * region_w
    image, region, token, exists = _rows(tl.program_id(0) // heads, regions, tokens, BLOCK_N, DENSE)
    y, x, real = _find(region, token, exists, height, width, region_h, region_w, columns)
    base = qkv + image.to(tl.int64) * stride_b + head * DIM
    channels = heads * DIM
    offset = y * stride_h + x * stride_w
    k = _load(base + channels, offset, real, DIM, BLOCK_D)
    v = _load(base + 2 * channels, offset, real, DIM, BLOCK_D)
    to_map = image.to(tl.int64) * height * width * channels + head * DIM
    to_row = (image * heads + head).to(tl.int64) * height * width
    if DENSE:
        routes += image * regions
        count = regions * tokens
    else:
        first = tl.load(starts + image * regions + region)
        count = ((tl.load(starts + image * regions + region + 1) - first) * tokens).to(tl.int32)
        routes += first

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_M):
        query_region, query_token, listed = _columns(start, count, routes, tokens, BLOCK_M, DENSE)
        query_y, query_x, query_real = _find(
            query_region, query_token, listed, height, width, region_h, region_w, columns
        )
        place = query_y * width + query_x
        q = _load(base, query_y * stride_h + query_x * stride_w, query_real, DIM, BLOCK_D)
        do = _load(grad + to_map, place * channels, query_real, DIM, BLOCK_D)
        level = tl.load(lse + to_row + place, mask=query_real, other=0.0)
        shift = tl.load(delta + to_row + place, mask=query_real, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - level[None, :])
        if DENSE:
            words = tl.load(routes + query_region, mask=listed, other=0)
            weights = tl.where(_allowed(words[None, :], region[:, None], listed[None, :]), weights, 0.0)
        # else queries beyond the list, or of padding, have q = 0 and grad = 0 and add nothing
        grad_v += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - shift[None, :])
        grad_k += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)
    base = grad_qkv + 3 * (to_map - head * DIM) + head * DIM
    offset = 3 * (y * width + x) * channels
    _store(base + channels, offset, real, grad_k * scale, DIM, BLOCK_D)
    _store(base + 2 * channels, offset, real, grad_v, DIM, BLOCK_D)
