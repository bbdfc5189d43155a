"""Triton kernels of window attention for groups of more than 64 tokens; arguments and helpers as in `kernels`.

Keys outside a group are masked to `NEVER`, queries outside one get an infinite log-sum-exp, so that their
probabilities are zero.
"""

from __future__ import annotations

from .._triton import kernel, tl
from .kernels import NEVER, _inverse_norm, _load_map, _load_part, _locate, _mask, _offset_index, _store, _through_norm


@kernel
def _bias(table, head, query, key, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Position bias of tokens `query` and `key`, which broadcast to a tile."""
    middle = (2 * WINDOW_W - 1) * (WINDOW_H - 1) + WINDOW_W - 1
    rows = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    index = _offset_index(query, WINDOW_W) - _offset_index(key, WINDOW_W)
    return tl.load(table + head * rows + middle + index)


@kernel
def _window_attention_fwd_tiled_kernel(
    qkv, table, scale, pad, out, lse, factor, heads,
    height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PAD: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, MASKED_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one group and head: loops over tiles of keys with an online softmax.

    q is read once, k and v once per tile of queries (by neighbouring programs, so that they stay in the cache), output
    and log-sum-exp are written once. Grid: heads x tiles of queries x groups, heads fastest.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + TILE_Q - 1) // TILE_Q
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads // TILES
    start = tl.program_id(0) // heads % TILES * TILE_Q
    place_q = start + tl.arange(0, TILE_Q)
    real_q, query = place_q < TOKENS, tl.minimum(place_q, TOKENS - 1)
    row_q, inside_q, side_q = _locate(
        group, query, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
        WINDOW_H, WINDOW_W, SHIFTED,
    )  # fmt: skip
    inside_q = inside_q & real_q
    if HAS_SCALE:
        factor = tl.load(scale + head).to(tl.float32)
    q = _load_part(qkv, pad, 0, row_q, inside_q, head, heads, DIM, BLOCK_D, HAS_PAD)
    if COSINE:
        q = (q * _inverse_norm(q)[:, None]).to(q.dtype)
    top = tl.full((TILE_Q,), NEVER, tl.float32)
    denominator = tl.zeros((TILE_Q,), tl.float32)
    o = tl.zeros((TILE_Q, BLOCK_D), tl.float32)
    for offset in range(0, TOKENS, TILE_K):
        place_k = offset + tl.arange(0, TILE_K)
        real_k, key = place_k < TOKENS, tl.minimum(place_k, TOKENS - 1)
        row_k, inside_k, side_k = _locate(
            group, key, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
            WINDOW_H, WINDOW_W, SHIFTED,
        )  # fmt: skip
        inside_k = inside_k & real_k
        k = _load_part(qkv, pad, 1, row_k, inside_k, head, heads, DIM, BLOCK_D, HAS_PAD)
        v = _load_part(qkv, pad, 2, row_k, inside_k, head, heads, DIM, BLOCK_D, HAS_PAD)
        if COSINE:
            k = (k * _inverse_norm(k)[:, None]).to(v.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if HAS_BIAS:
            scores += _bias(table, head, query[:, None], key[None, :], WINDOW_H, WINDOW_W)
        scores = _mask(scores, side_q, side_k, ~inside_k[None, :], SHIFTED, MASKED_PADDING)
        scores = tl.where(real_k[None, :], scores, NEVER)
        higher = tl.maximum(top, tl.max(scores, 1))
        prob = tl.exp(scores - higher[:, None])
        keep = tl.exp(top - higher)
        denominator = denominator * keep + tl.sum(prob, 1)
        o = tl.dot(prob.to(v.dtype), v, o * keep[:, None], input_precision=PRECISION)
        top = higher
    _store(out, row_q * heads + head, inside_q, o / denominator[:, None], DIM, BLOCK_D)
    at = (tl.cast(group, tl.int64) * heads + head) * TOKENS + place_q
    tl.store(lse + at, top + tl.log(denominator), mask=real_q)


@kernel
def _window_attention_bwd_q_kernel(
    qkv, table, scale, pad, out, grad, lse, grad_qkv, delta, grad_scale, factor, heads,
    height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PAD: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, MASKED_PADDING: tl.constexpr, SCALE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries: loops over tiles of keys, in the order of the forward kernel.

    Reads q, the output and its gradient once, k and v once per tile of queries. Writes the gradient of q, for the other
    backward kernels `delta` like `lse`, the sum over channels of output times gradient, and this tile's part of the
    gradient of the scale `(groups * tiles, heads)` float32.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + TILE_Q - 1) // TILE_Q
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    group = part // TILES
    place_q = part % TILES * TILE_Q + tl.arange(0, TILE_Q)
    real_q, query = place_q < TOKENS, tl.minimum(place_q, TOKENS - 1)
    row_q, inside_q, side_q = _locate(
        group, query, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
        WINDOW_H, WINDOW_W, SHIFTED,
    )  # fmt: skip
    inside_q = inside_q & real_q
    if HAS_SCALE:
        factor = tl.load(scale + head).to(tl.float32)
    q = _load_part(qkv, pad, 0, row_q, inside_q, head, heads, DIM, BLOCK_D, HAS_PAD)
    if COSINE:
        inverse = _inverse_norm(q)
        q = (q * inverse[:, None]).to(q.dtype)
    do = _load_map(grad, row_q, inside_q, head, heads, DIM, BLOCK_D).to(q.dtype)
    o = _load_map(out, row_q, inside_q, head, heads, DIM, BLOCK_D)
    mean = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = (tl.cast(group, tl.int64) * heads + head) * TOKENS + place_q
    tl.store(delta + at, mean, mask=real_q)
    total = tl.load(lse + at, mask=real_q, other=float("inf"))
    dq = tl.zeros((TILE_Q, BLOCK_D), tl.float32)
    for offset in range(0, TOKENS, TILE_K):
        place_k = offset + tl.arange(0, TILE_K)
        real_k, key = place_k < TOKENS, tl.minimum(place_k, TOKENS - 1)
        row_k, inside_k, side_k = _locate(
            group, key, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
            WINDOW_H, WINDOW_W, SHIFTED,
        )  # fmt: skip
        inside_k = inside_k & real_k
        k = _load_part(qkv, pad, 1, row_k, inside_k, head, heads, DIM, BLOCK_D, HAS_PAD)
        v = _load_part(qkv, pad, 2, row_k, inside_k, head, heads, DIM, BLOCK_D, HAS_PAD)
        if COSINE:
            k = (k * _inverse_norm(k)[:, None]).to(v.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if HAS_BIAS:
            scores += _bias(table, head, query[:, None], key[None, :], WINDOW_H, WINDOW_W)
        scores = _mask(scores, side_q, side_k, ~inside_k[None, :], SHIFTED, MASKED_PADDING)
        prob = tl.exp(tl.where(real_k[None, :], scores, NEVER) - total[:, None])
        dprob = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dscores = (prob * (dprob - mean[:, None])).to(v.dtype)
        dq = tl.dot(dscores, k, dq, input_precision=PRECISION)
    if SCALE_GRAD:
        tl.store(grad_scale + part * heads + head, tl.sum(tl.sum(dq * q, 1), 0))
    dq *= factor
    if COSINE:
        dq = _through_norm(dq, q, inverse)
    _store(grad_qkv, row_q * (3 * heads) + head, inside_q, dq, DIM, BLOCK_D)


@kernel
def _window_attention_bwd_kv_kernel(
    qkv, table, scale, pad, grad, lse, delta, grad_qkv, grad_pad, factor, heads,
    height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PAD: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, MASKED_PADDING: tl.constexpr, PAD_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values: loops over tiles of queries.

    Reads k and v once, q and the output's gradient once per tile of keys. Scores stand transposed, keys by queries, so
    that no product needs a transposed operand of its own making. Writes the gradients of k and v, and what this tile's
    tokens outside the map add to the gradient of `pad`: `(groups * tiles, 2, heads, DIM)` float32.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES: tl.constexpr = (TOKENS + TILE_K - 1) // TILE_K
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    group = part // TILES
    place_k = part % TILES * TILE_K + tl.arange(0, TILE_K)
    real_k, key = place_k < TOKENS, tl.minimum(place_k, TOKENS - 1)
    row_k, inside_k, side_k = _locate(
        group, key, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
        WINDOW_H, WINDOW_W, SHIFTED,
    )  # fmt: skip
    inside_k = inside_k & real_k
    outside = real_k & ~inside_k
    if HAS_SCALE:
        factor = tl.load(scale + head).to(tl.float32)
    k = _load_part(qkv, pad, 1, row_k, inside_k, head, heads, DIM, BLOCK_D, HAS_PAD)
    v = _load_part(qkv, pad, 2, row_k, inside_k, head, heads, DIM, BLOCK_D, HAS_PAD)
    if COSINE:
        inverse = _inverse_norm(k)
        k = (k * inverse[:, None]).to(v.dtype)
    dk = tl.zeros((TILE_K, BLOCK_D), tl.float32)
    dv = tl.zeros((TILE_K, BLOCK_D), tl.float32)
    for offset in range(0, TOKENS, TILE_Q):
        place_q = offset + tl.arange(0, TILE_Q)
        real_q, query = place_q < TOKENS, tl.minimum(place_q, TOKENS - 1)
        row_q, inside_q, side_q = _locate(
            group, query, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
            WINDOW_H, WINDOW_W, SHIFTED,
        )  # fmt: skip
        inside_q = inside_q & real_q
        q = _load_part(qkv, pad, 0, row_q, inside_q, head, heads, DIM, BLOCK_D, HAS_PAD)
        do = _load_map(grad, row_q, inside_q, head, heads, DIM, BLOCK_D).to(v.dtype)
        if COSINE:
            q = (q * _inverse_norm(q)[:, None]).to(v.dtype)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
        if HAS_BIAS:
            scores += _bias(table, head, query[None, :], key[:, None], WINDOW_H, WINDOW_W)
        scores = _mask(scores, side_k, side_q, outside[:, None], SHIFTED, MASKED_PADDING)
        at = (tl.cast(group, tl.int64) * heads + head) * TOKENS + place_q
        prob = tl.exp(scores - tl.load(lse + at, mask=real_q, other=float("inf"))[None, :])
        dv = tl.dot(prob.to(v.dtype), do, dv, input_precision=PRECISION)
        dprob = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dscores = prob * (dprob - tl.load(delta + at, mask=real_q, other=0.0)[None, :])
        dk = tl.dot(dscores.to(v.dtype), q, dk, input_precision=PRECISION)
    dk *= factor
    if COSINE:
        dk = _through_norm(dk, k, inverse)
    _store(grad_qkv, row_k * (3 * heads) + heads + head, inside_k, dk, DIM, BLOCK_D)
    _store(grad_qkv, row_k * (3 * heads) + 2 * heads + head, inside_k, dv, DIM, BLOCK_D)
    if PAD_GRAD:
        d = tl.arange(0, BLOCK_D)
        at = (tl.cast(part, tl.int64) * 2 * heads + head) * DIM + d
        tl.store(grad_pad + at, tl.sum(tl.where(outside[:, None], dk, 0.0), 0), mask=d < DIM)
        tl.store(grad_pad + at + heads * DIM, tl.sum(tl.where(outside[:, None], dv, 0.0), 0), mask=d < DIM)


@kernel
def _window_attention_bwd_bias_kernel(
    qkv, table, scale, pad, grad, lse, delta, grad_scores, factor, heads, total, spans,
    height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_PAD: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, MASKED_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of one tile of queries and one of keys, summed over every `spans`-th group.

    A sum over groups needs the same pair of tiles of all of them, which neither of the other backward kernels meets:
    this one computes the scores again, and reads q and the output's gradient once per tile of keys, k and v once per
    tile of queries. Writes `grad_scores` `(spans, heads, TOKENS, TOKENS)` float32. Grid: heads x pairs of tiles x
    spans, heads fastest.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    TILES_Q: tl.constexpr = (TOKENS + TILE_Q - 1) // TILE_Q
    TILES_K: tl.constexpr = (TOKENS + TILE_K - 1) // TILE_K
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    place_q = rest % TILES_Q * TILE_Q + tl.arange(0, TILE_Q)
    place_k = rest // TILES_Q % TILES_K * TILE_K + tl.arange(0, TILE_K)
    part = rest // (TILES_Q * TILES_K)
    real_q, query = place_q < TOKENS, tl.minimum(place_q, TOKENS - 1)
    real_k, key = place_k < TOKENS, tl.minimum(place_k, TOKENS - 1)
    if HAS_SCALE:
        factor = tl.load(scale + head).to(tl.float32)
    bias = _bias(table, head, query[:, None], key[None, :], WINDOW_H, WINDOW_W)
    score_sum = tl.zeros((TILE_Q, TILE_K), tl.float32)
    for group in range(part, total, spans):
        row_q, inside_q, side_q = _locate(
            group, query, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
            WINDOW_H, WINDOW_W, SHIFTED,
        )  # fmt: skip
        row_k, inside_k, side_k = _locate(
            group, key, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
            WINDOW_H, WINDOW_W, SHIFTED,
        )  # fmt: skip
        inside_q, inside_k = inside_q & real_q, inside_k & real_k
        q = _load_part(qkv, pad, 0, row_q, inside_q, head, heads, DIM, BLOCK_D, HAS_PAD)
        k = _load_part(qkv, pad, 1, row_k, inside_k, head, heads, DIM, BLOCK_D, HAS_PAD)
        v = _load_part(qkv, pad, 2, row_k, inside_k, head, heads, DIM, BLOCK_D, HAS_PAD)
        do = _load_map(grad, row_q, inside_q, head, heads, DIM, BLOCK_D).to(v.dtype)
        if COSINE:
            q = (q * _inverse_norm(q)[:, None]).to(v.dtype)
            k = (k * _inverse_norm(k)[:, None]).to(v.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
        scores = _mask(scores, side_q, side_k, ~inside_k[None, :], SHIFTED, MASKED_PADDING)
        at = (tl.cast(group, tl.int64) * heads + head) * TOKENS + place_q
        prob = tl.exp(scores - tl.load(lse + at, mask=real_q, other=float("inf"))[:, None])
        dprob = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        score_sum += prob * (dprob - tl.load(delta + at, mask=real_q, other=0.0)[:, None])
    at = (tl.cast(part, tl.int64) * heads + head) * (TOKENS * TOKENS) + place_q[:, None] * TOKENS + place_k[None, :]
    tl.store(grad_scores + at, score_sum, mask=real_q[:, None] & real_k[None, :])
