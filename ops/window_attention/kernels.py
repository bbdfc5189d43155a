"""Triton kernels of window attention: maps are read and written in place, groups exist as index arithmetic only.

A group is a window, a dilated group or a grid of `WINDOW_H * WINDOW_W` tokens; groups are numbered as `partition.split`
orders them, over the whole batch. Up to 64 tokens (`_fwd_kernel`, `_bwd_kernel`) a group is one tile, and small groups
share one; larger groups go through tiles of queries and of keys with an online softmax (`*_tiled_*`).

Arguments that the kernels share:
    qkv: `(B, H, W, 3, heads, DIM)`; pad: `(3, heads, DIM)`, the values of tokens outside the map, or unused.
    table: `(heads, rows)` float32, the position bias by offset query - key, or unused.
    scale: `(heads,)` factors of the scores, or unused; then `factor` is the one of all heads.
    lse: `(groups, heads, TOKENS)` float32, log of the softmax's denominator.
    height, width: of the map; padded_h, padded_w: of the map of whole groups; interval_*, shift_*: see `partition`.
"""

from __future__ import annotations

from .._triton import kernel, tl

# Scores of keys that are not there: finite, because a row of a tile may have no key at all.
NEVER = tl.constexpr(-1e30) if tl.constexpr else None
SEAM = tl.constexpr(-100.0) if tl.constexpr else None
PADDING = tl.constexpr(-1e6) if tl.constexpr else None


@kernel
def _locate(
    group, token, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Row of the flattened map `(B * H * W)` (int64), whether it is inside the map, and the side of the seam."""
    columns = padded_w // (WINDOW_W * interval_w)
    groups = padded_h * padded_w // (WINDOW_H * WINDOW_W)
    image = group // groups
    place = group % groups
    block = place // interval_w
    x = (block % columns * WINDOW_W + token % WINDOW_W) * interval_w + place % interval_w
    block = block // columns
    y = (block // interval_h * WINDOW_H + token // WINDOW_W) * interval_h + block % interval_h
    side = token * 0
    if SHIFTED:
        side = tl.where(y >= padded_h - shift_h, 2, 0) + tl.where(x >= padded_w - shift_w, 1, 0)
        y += shift_h
        x += shift_w
        y = tl.where(y >= padded_h, y - padded_h, y)
        x = tl.where(x >= padded_w, x - padded_w, x)
    return tl.cast(image, tl.int64) * (height * width) + y * width + x, (y < height) & (x < width), side


@kernel
def _load_part(
    qkv, pad, part, row, inside, head, heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_PAD: tl.constexpr,
):  # fmt: skip
    """Queries (part 0), keys (1) or values (2) of one head: `(rows, BLOCK_D)`, what is not `inside` is padding."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if DIM < BLOCK_D:
        mask = mask & (d < DIM)[None, :]
    tile = tl.load(qkv + ((row * 3 + part) * heads + head)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    if HAS_PAD:
        fill = tl.load(pad + (part * heads + head) * DIM + d, mask=d < DIM, other=0.0).to(tile.dtype)
        tile = tl.where(inside[:, None], tile, fill[None, :])
    return tile


@kernel
def _load_map(x, row, inside, head, heads, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of a map `(B, H, W, heads, DIM)`: `(rows, BLOCK_D)`, zero outside."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if DIM < BLOCK_D:
        mask = mask & (d < DIM)[None, :]
    return tl.load(x + (row * heads + head)[:, None] * DIM + d[None, :], mask=mask, other=0.0)


@kernel
def _store(pointer, row, inside, tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `tile` `(rows, BLOCK_D)` to the rows of `DIM` numbers that are `inside`."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if DIM < BLOCK_D:
        mask = mask & (d < DIM)[None, :]
    tl.store(pointer + row[:, None] * DIM + d[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@kernel
def _inverse_norm(x):
    """One over the length of every row of `x`, as `F.normalize` guards it: `(rows,)` float32."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)


@kernel
def _through_norm(grad, unit, inverse):
    """Gradient of `x` from that of the unit vectors `x * inverse`."""
    unit = unit.to(tl.float32)
    return (grad - unit * tl.sum(grad * unit, 1)[:, None]) * inverse[:, None]


@kernel
def _offset_index(token, WINDOW_W: tl.constexpr):
    """Row of the bias table of a pair of tokens, less a constant, is the difference of these."""
    return token // WINDOW_W * (2 * WINDOW_W - 1) + token % WINDOW_W


@kernel
def _mask(scores, row_side, column_side, outside, SHIFTED: tl.constexpr, MASKED_PADDING: tl.constexpr):
    """Add what pairs across the seam of a shift and padded keys (`outside`, broadcast to the scores) get."""
    if SHIFTED:
        scores += tl.where(row_side[:, None] != column_side[None, :], SEAM, 0.0)
    if MASKED_PADDING:
        scores += tl.where(outside, PADDING, 0.0)
    return scores


@kernel
def _window_attention_fwd_kernel(
    qkv, table, scale, pad, out, lse, factor, heads, total, spans,
    height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PAD: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, MASKED_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Groups of at most `TILE` tokens, `TILE // TOKENS` of them in one tile.

    A program takes one head and every `spans`-th tile, and holds the position bias meanwhile. q, k and v are read once,
    the output and the log-sum-exp written once, the bias read once per program. Grid: heads x spans, heads fastest, so
    that programs that run together share the lines of the map.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    PACK: tl.constexpr = TILE // TOKENS
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    place = tl.arange(0, TILE)
    slot, token = place // TOKENS, place % TOKENS
    here = (slot[:, None] == slot[None, :]) & (slot < PACK)[None, :]
    if PACK == 1:
        here = (place < TOKENS)[None, :]
    if HAS_BIAS:
        index = _offset_index(token, WINDOW_W)
        middle = (2 * WINDOW_W - 1) * (WINDOW_H - 1) + WINDOW_W - 1
        rows = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
        bias = tl.load(table + head * rows + middle + index[:, None] - index[None, :])
        bias = tl.where(here, bias, NEVER)
    if HAS_SCALE:
        factor = tl.load(scale + head).to(tl.float32)
    for tile in range(part, tl.cdiv(total, PACK), spans):
        group = tile * PACK
        real = slot < PACK
        if PACK > 1:
            group += slot
            real = real & (group < total)
        row, inside, side = _locate(
            group, token, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
            WINDOW_H, WINDOW_W, SHIFTED,
        )  # fmt: skip
        inside = inside & real
        q = _load_part(qkv, pad, 0, row, inside, head, heads, DIM, BLOCK_D, HAS_PAD)
        k = _load_part(qkv, pad, 1, row, inside, head, heads, DIM, BLOCK_D, HAS_PAD)
        v = _load_part(qkv, pad, 2, row, inside, head, heads, DIM, BLOCK_D, HAS_PAD)
        if COSINE:
            q = (q * _inverse_norm(q)[:, None]).to(v.dtype)
            k = (k * _inverse_norm(k)[:, None]).to(v.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if HAS_BIAS:
            scores += bias
        else:
            scores = tl.where(here, scores, NEVER)
        scores = _mask(scores, side, side, (real & ~inside)[None, :], SHIFTED, MASKED_PADDING)
        top = tl.max(scores, 1)
        prob = tl.exp(scores - top[:, None])
        denominator = tl.sum(prob, 1)
        o = tl.dot(prob.to(v.dtype), v, input_precision=PRECISION) / denominator[:, None]
        _store(out, row * heads + head, inside, o, DIM, BLOCK_D)
        at = (tl.cast(group, tl.int64) * heads + head) * TOKENS + token
        tl.store(lse + at, top + tl.log(denominator), mask=real)


@kernel
def _keys_here(key_place, place, TOKENS: tl.constexpr, PACK: tl.constexpr):
    """Whether the key at a place of a tile belongs to the group of the token at another: `(keys, tokens)`."""
    if PACK == 1:
        return (key_place < TOKENS)[:, None] & (place >= 0)[None, :]
    else:
        return (key_place[:, None] // TOKENS == place[None, :] // TOKENS) & (key_place < PACK * TOKENS)[:, None]


@kernel
def _bwd_queries(
    k, v, key_side, outside, dk, dv, score_sum, scale_sum, tile,
    qkv, bias, pad, grad, lse, grad_qkv, factor, head, heads, total,
    height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
    START: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr, COSINE: tl.constexpr, SHIFTED: tl.constexpr,
    MASKED_PADDING: tl.constexpr, BIAS_GRAD: tl.constexpr, SCALE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `QUERIES` queries of a tile, from the `START`-th, add to the gradients; writes their own.

    Their whole row of probabilities is at hand, so that the sum of output times gradient needs no output.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    PACK: tl.constexpr = TILE // TOKENS
    # the minimum is zero, but the compiler cannot know: else it would keep what follows in registers from tile to tile
    place = START + tl.arange(0, QUERIES) + tl.minimum(tile, 0)
    slot, token = place // TOKENS, place % TOKENS
    group = tile * PACK
    real = slot < PACK
    if PACK > 1:
        group += slot
        real = real & (group < total)
    row, inside, side = _locate(
        group, token, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
        WINDOW_H, WINDOW_W, SHIFTED,
    )  # fmt: skip
    inside = inside & real
    q = _load_part(qkv, pad, 0, row, inside, head, heads, DIM, BLOCK_D, HAS_PAD)
    do = _load_map(grad, row, inside, head, heads, DIM, BLOCK_D).to(v.dtype)
    if COSINE:
        inverse = _inverse_norm(q)
        q = (q * inverse[:, None]).to(v.dtype)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
    if HAS_BIAS:
        scores += tl.load(bias + (head * TILE + tl.arange(0, TILE)[:, None]) * TILE + place[None, :])
    else:
        scores = tl.where(_keys_here(tl.arange(0, TILE), place, TOKENS, PACK), scores, NEVER)
    scores = _mask(scores, key_side, side, outside[:, None], SHIFTED, MASKED_PADDING)
    at = (tl.cast(group, tl.int64) * heads + head) * TOKENS + token
    # an infinite log-sum-exp makes the probabilities of rows that hold no query zero, whatever their scores
    prob = tl.exp(scores - tl.load(lse + at, mask=real, other=float("inf"))[None, :])
    dv = tl.dot(prob.to(v.dtype), do, dv, input_precision=PRECISION)
    dprob = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dscores = prob * (dprob - tl.sum(prob * dprob, 0)[None, :])
    if BIAS_GRAD:
        score_sum += dscores
    dscores = dscores.to(v.dtype)
    dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
    dq = tl.dot(tl.trans(dscores), k, input_precision=PRECISION)
    if SCALE_GRAD:
        scale_sum += tl.sum(dq * q, 1)
    dq *= factor
    if COSINE:
        dq = _through_norm(dq, q, inverse)
    _store(grad_qkv, row * (3 * heads) + head, inside, dq, DIM, BLOCK_D)
    return dk, dv, score_sum, scale_sum


@kernel
def _store_scores(
    grad_scores, score_sum, part, head, heads,
    START: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the sums of a program for all keys of a tile and `QUERIES` queries of it."""
    PACK: tl.constexpr = TILE // TOKENS
    place, key_place = START + tl.arange(0, QUERIES), tl.arange(0, TILE)
    slot, token, key = place // TOKENS, place % TOKENS, key_place % TOKENS
    at = ((part * PACK + slot) * heads + head) * (TOKENS * TOKENS) + token * TOKENS
    mask = _keys_here(key_place, place, TOKENS, PACK) & (slot < PACK)[None, :]
    tl.store(grad_scores + at[None, :] + key[:, None], score_sum, mask=mask)


@kernel
def _window_attention_bwd_kernel(
    qkv, bias, scale, pad, grad, lse, grad_qkv, grad_scores, grad_pad, grad_scale, factor, heads, total, spans,
    height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PAD: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, MASKED_PADDING: tl.constexpr, BIAS_GRAD: tl.constexpr, SCALE_GRAD: tl.constexpr,
    PAD_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of groups of at most `TILE` tokens, in the order of the forward kernel.

    q, k, v and the output's gradient are read once, their gradients written once; the output is not read. Queries are
    taken in one piece of `QUERIES` or in two; scores stand transposed, keys by queries, so that only one of the five
    products needs a transposed operand. `bias` `(heads, TILE, TILE)` float32 is that of every pair, keys by queries,
    `NEVER` where they share no group: the sums leave no registers to hold it or the indices of a table. A program sums
    the gradients of the parameters over its tiles and writes them once: `grad_scores`
    `(spans, PACK, heads, TOKENS, TOKENS)`, `grad_pad` `(spans, 2, heads, DIM)` (k and v; queries outside the map have
    no gradient), `grad_scale` `(spans, heads)`, all float32.
    """
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    PACK: tl.constexpr = TILE // TOKENS
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    if HAS_SCALE:
        factor = tl.load(scale + head).to(tl.float32)
    score_sum = tl.zeros((TILE, QUERIES), tl.float32)
    more_score_sum = tl.zeros((TILE, QUERIES), tl.float32)
    scale_sum = tl.zeros((QUERIES,), tl.float32)
    if PAD_GRAD:
        pad_k = tl.zeros((BLOCK_D,), tl.float32)
        pad_v = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(part, tl.cdiv(total, PACK), spans):
        place = tl.arange(0, TILE) + tl.minimum(tile, 0)  # see `_bwd_queries`
        slot, token = place // TOKENS, place % TOKENS
        group = tile * PACK
        real = slot < PACK
        if PACK > 1:
            group += slot
            real = real & (group < total)
        row, inside, side = _locate(
            group, token, height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
            WINDOW_H, WINDOW_W, SHIFTED,
        )  # fmt: skip
        inside = inside & real
        outside = real & ~inside
        k = _load_part(qkv, pad, 1, row, inside, head, heads, DIM, BLOCK_D, HAS_PAD)
        v = _load_part(qkv, pad, 2, row, inside, head, heads, DIM, BLOCK_D, HAS_PAD)
        if COSINE:
            inverse = _inverse_norm(k)
            k = (k * inverse[:, None]).to(v.dtype)
        dk = tl.zeros((TILE, BLOCK_D), tl.float32)
        dv = tl.zeros((TILE, BLOCK_D), tl.float32)
        dk, dv, score_sum, scale_sum = _bwd_queries(
            k, v, side, outside, dk, dv, score_sum, scale_sum, tile,
            qkv, bias, pad, grad, lse, grad_qkv, factor, head, heads, total,
            height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
            0, QUERIES, WINDOW_H, WINDOW_W, DIM, BLOCK_D, TILE, HAS_BIAS, HAS_PAD, COSINE, SHIFTED,
            MASKED_PADDING, BIAS_GRAD, SCALE_GRAD, PRECISION,
        )  # fmt: skip
        if QUERIES < TILE:
            dk, dv, more_score_sum, scale_sum = _bwd_queries(
                k, v, side, outside, dk, dv, more_score_sum, scale_sum, tile,
                qkv, bias, pad, grad, lse, grad_qkv, factor, head, heads, total,
                height, width, padded_h, padded_w, interval_h, interval_w, shift_h, shift_w,
                QUERIES, QUERIES, WINDOW_H, WINDOW_W, DIM, BLOCK_D, TILE, HAS_BIAS, HAS_PAD, COSINE, SHIFTED,
                MASKED_PADDING, BIAS_GRAD, SCALE_GRAD, PRECISION,
            )  # fmt: skip
        dk *= factor
        if COSINE:
            dk = _through_norm(dk, k, inverse)
        _store(grad_qkv, row * (3 * heads) + heads + head, inside, dk, DIM, BLOCK_D)
        _store(grad_qkv, row * (3 * heads) + 2 * heads + head, inside, dv, DIM, BLOCK_D)
        if PAD_GRAD:
            pad_k += tl.sum(tl.where(outside[:, None], dk, 0.0), 0)
            pad_v += tl.sum(tl.where(outside[:, None], dv, 0.0), 0)
    if BIAS_GRAD:
        _store_scores(grad_scores, score_sum, part, head, heads, 0, QUERIES, TILE, TOKENS)
        if QUERIES < TILE:
            _store_scores(grad_scores, more_score_sum, part, head, heads, QUERIES, QUERIES, TILE, TOKENS)
    if PAD_GRAD:
        d = tl.arange(0, BLOCK_D)
        tl.store(grad_pad + (part * 2 * heads + head) * DIM + d, pad_k, mask=d < DIM)
        tl.store(grad_pad + ((part * 2 + 1) * heads + head) * DIM + d, pad_v, mask=d < DIM)
    if SCALE_GRAD:
        tl.store(grad_scale + part * heads + head, tl.sum(scale_sum, 0))
