"""Triton kernels of bidirectional gated linear attention. `triton.py` launches them and says how they divide the work.

Decays between two tokens are never differences of running sums, which lose all digits behind one strong gate, nor
quotients of exponentials, which overflow. Inside a chunk every pair of tokens meets at one level of a binary tree: at
level `l`, pairs lie in neighbouring blocks of `2^l` tokens, and the decay of a pair is the product of the decay from
either token to the border between the blocks. Both factors are exponentials of sums of gates, hence at most 1, and the
scores of a level are one matrix product. A query in the right block looks left with the forward gates and one in the
left block looks right with the reverse gates, so the same product holds the pairs of both directions.

Gates are kept as logarithms to base 2. Chunks are counted in token order, segments (runs of chunks that one program
walks through) in the order of the scan. `kind` numbers the scans: 0 and 1 carry `k v^T` forward and backward, 2 and 3
carry `q dout^T`, for the gradients, against them.
"""

from __future__ import annotations

from .._triton import kernel, tl


@kernel
def _load(base, token, tokens, stride, dim, BLOCK: tl.constexpr):
    """Rows `token` of `base`, `(len(token), BLOCK)`; zeros outside of the image, which neither decay nor add."""
    column = tl.arange(0, BLOCK)
    inside = ((token >= 0) & (token < tokens))[:, None] & (column < dim)[None, :]
    return tl.load(base + token[:, None] * stride + column[None, :], mask=inside, other=0.0)


@kernel
def _load_gate(base, token, tokens, stride, dim, BLOCK: tl.constexpr):
    return _load(base, token, tokens, stride, dim, BLOCK).to(tl.float32) * 1.4426950408889634


@kernel
def _store(base, value, token, tokens, stride, dim, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < dim)[None, :]
    tl.store(base + token[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=inside)


@kernel
def _fit(x, DTYPE: tl.constexpr):
    """`x` as an operand of `tl.dot`, and the factor to undo: sums over many tokens may exceed the range of float16."""
    peak = 1.0
    if DTYPE == tl.float16:
        peak = tl.maximum(tl.max(tl.abs(x)), 1e-30)
        x = x / peak
    return x.to(DTYPE), peak


@kernel
def _neighbours(row, level):
    """Which pairs of rows lie in the two blocks of `2^level` rows of one block twice as long."""
    block = row >> level
    return block[:, None] ^ block[None, :] == 1


@kernel
def _widen(sums, gate_total, reverse_total, row, level):
    """Decays to the borders of blocks of `2^level` tokens, and totals of the blocks -> of blocks twice as long.

    `sums` are those of a query to the left border of its block (forward gates) and to the right one (reverse gates),
    then those of a key to the right border (forward gates) and to the left one (reverse gates).
    """
    query_left, query_right, key_right, key_left = sums
    right = ((row >> level) & 1 == 1)[:, None]
    beside = tl.broadcast_to((row ^ (1 << level))[:, None], gate_total.shape)
    gate_beside, reverse_beside = tl.gather(gate_total, beside, 0), tl.gather(reverse_total, beside, 0)
    query_left += tl.where(right, gate_beside, 0.0)
    query_right += tl.where(right, 0.0, reverse_beside)
    key_right += tl.where(right, 0.0, gate_beside)
    key_left += tl.where(right, reverse_beside, 0.0)
    return (query_left, query_right, key_right, key_left), gate_total + gate_beside, reverse_total + reverse_beside


@kernel
def _entering(
    states, decays, ends, head, kind, first, chunk, chunks, segments, per_segment,
    KINDS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SLICE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state of scan `kind` that enters `chunk`, `(SLICE, BLOCK_V)` from key dim `first` on."""
    scan = head.to(tl.int64) * KINDS + kind
    rows, columns = first + tl.arange(0, SLICE), tl.arange(0, BLOCK_V)
    cell = rows[:, None] * V + columns[None, :]
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    state = tl.load(states + (scan * chunks + chunk) * (K * V) + cell, mask=inside, other=0.0)
    if segments > 1:
        step = chunk
        if kind == 1 or kind == 2:
            step = chunks - 1 - chunk
        before = tl.load(ends + (scan * segments + step // per_segment) * (K * V) + cell, mask=inside, other=0.0)
        decay = tl.load(decays + (scan * chunks + chunk) * K + rows, mask=rows < K, other=0.0)
        state += tl.exp2(decay)[:, None] * before
    return state


@kernel
def _gated_linear_attention_state_kernel(
    q, k, v, dout, gate, reverse_gate, states, decays, ends, end_decays,
    heads, tokens, chunks, segments, per_segment,
    qk_image, qk_token, qk_head, v_image, v_token, v_head, dout_image, dout_token, dout_head,
    gate_image, gate_token, gate_head,
    KINDS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program walks one segment of one scan of one head: the state that enters each chunk, from zero on.

    Per scan, reads the gates, `k` and `v` (or `q` and `dout`) once and writes one float32 state per chunk; with
    several segments also the state that leaves the segment.
    """
    head, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    kind, column = tl.program_id(1), tl.program_id(2) * BLOCK_V
    image, within = (head // heads).to(tl.int64), head % heads
    x = k + image * qk_image + within * qk_head
    y = v + image * v_image + within * v_head
    y_token = v_token
    if kind >= 2:
        x = q + image * qk_image + within * qk_head
        y = dout + image * dout_image + within * dout_head
        y_token = dout_token
    gates = gate + image * gate_image + within * gate_head
    if kind % 2 == 1:
        gates = reverse_gate + image * gate_image + within * gate_head
    descends = (kind == 1) | (kind == 2)
    shift = tl.where(kind >= 2, 0, 1)  # a query decays with its own gate, a key from the token after it on

    row, rows = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    columns = column + tl.arange(0, BLOCK_V)
    cell = rows[:, None] * V + columns[None, :]
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    scan = head.to(tl.int64) * KINDS + kind
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    decay = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(segment * per_segment, tl.minimum((segment + 1) * per_segment, chunks)):
        chunk = tl.where(descends, chunks - 1 - step, step)
        tl.store(states + (scan * chunks + chunk) * (K * V) + cell, state, mask=inside)
        if (segments > 1) & (column == 0):
            tl.store(decays + (scan * chunks + chunk) * K + rows, decay, mask=rows < K)
        position = row + shift
        token = chunk * CHUNK + tl.where(descends, CHUNK - 1 - row, row)
        after = tl.where(position < CHUNK, chunk * CHUNK + tl.where(descends, CHUNK - 1 - position, position), tokens)
        total = tl.sum(_load_gate(gates, token, tokens, gate_token, K, BLOCK_K), 0)
        until_end = tl.cumsum(_load_gate(gates, after, tokens, gate_token, K, BLOCK_K), 0, reverse=True)
        key = (_load(x, token, tokens, qk_token, K, BLOCK_K).to(tl.float32) * tl.exp2(until_end)).to(DTYPE)
        value = _load(y + column, token, tokens, y_token, V - column, BLOCK_V).to(DTYPE)
        gain = tl.dot(tl.trans(key), value, input_precision=PRECISION)
        state = state * tl.exp2(total)[:, None] + gain
        decay += total
    if segments > 1:
        place = scan * segments + segment
        tl.store(ends + place * (K * V) + cell, state, mask=inside)
        if column == 0:
            tl.store(end_decays + place * K + rows, decay, mask=rows < K)


@kernel
def _gated_linear_attention_scan_kernel(
    ends, end_decays, segments, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """In place: the states that leave segments started from zero -> the states that enter the segments.

    One program per scan and `ROWS` rows of the state walks through the segments, four loads ahead of their use.
    """
    scan = tl.program_id(0).to(tl.int64) * segments
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_V)
    cell = rows[:, None] * V + columns[None, :]
    state = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for first in range(0, segments, 4):
        gains, factors = (), ()
        for i in tl.static_range(4):
            there = rows < tl.where(first + i < segments, K, 0)
            inside = there[:, None] & (columns < V)[None, :]
            gains += (tl.load(ends + (scan + first + i) * (K * V) + cell, mask=inside, other=0.0),)  # type: ignore[assignment]  # unrolled
            factors += (tl.load(end_decays + (scan + first + i) * K + rows, mask=there, other=0.0),)  # type: ignore[assignment]
        for i in tl.static_range(4):
            inside = (rows < tl.where(first + i < segments, K, 0))[:, None] & (columns < V)[None, :]
            tl.store(ends + (scan + first + i) * (K * V) + cell, state, mask=inside)
            state = tl.exp2(factors[i])[:, None] * state + gains[i]


@kernel
def _gated_linear_attention_fwd_kernel(
    q, k, v, gate, reverse_gate, out, states, decays, ends, scale,
    heads, tokens, chunks, segments, per_segment,
    qk_image, qk_token, qk_head, v_image, v_token, v_head, gate_image, gate_token, gate_head,
    K: tl.constexpr, V: tl.constexpr, SLICE: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk of one head: over slices of the key dim and levels, scores; then their product with `v`.

    Reads `q`, `k`, `v`, both gates and the two states that enter the chunk once and writes `out` once.
    """
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    image, within = (head // heads).to(tl.int64), head % heads
    row = tl.arange(0, CHUNK)
    token = chunk * CHUNK + row
    qk_start = image * qk_image + within * qk_head
    gate_start = image * gate_image + within * gate_head
    same = row[:, None] == row[None, :]
    nothing = tl.zeros((CHUNK, SLICE), tl.float32)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    result = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for first in range(0, K, SLICE):
        query = _load(q + qk_start + first, token, tokens, qk_token, K - first, SLICE).to(tl.float32)
        key = _load(k + qk_start + first, token, tokens, qk_token, K - first, SLICE).to(tl.float32)
        gate_total = _load_gate(gate + gate_start + first, token, tokens, gate_token, K - first, SLICE)
        reverse_total = _load_gate(reverse_gate + gate_start + first, token, tokens, gate_token, K - first, SLICE)
        scores += tl.where(same, 2 * tl.sum(query * key, 1)[:, None], 0.0)
        sums = (gate_total, reverse_total, nothing, nothing)
        for level in range(LEVELS):  # unrolled, it would take every register
            right = ((row >> level) & 1 == 1)[:, None]
            to_border = (query * tl.exp2(tl.where(right, sums[0], sums[1]))).to(DTYPE)
            from_border = (key * tl.exp2(tl.where(right, sums[3], sums[2]))).to(DTYPE)
            products = tl.dot(to_border, tl.trans(from_border), input_precision=PRECISION)
            scores += tl.where(_neighbours(row, level), products, 0.0)
            sums, gate_total, reverse_total = _widen(sums, gate_total, reverse_total, row, level)
        for direction in range(tl.where(chunks > 1, 2, 0)):
            decay = tl.exp2(tl.where(direction == 0, sums[0], sums[1]))
            state, factor = _fit(_entering(states, decays, ends, head, direction, first, chunk, chunks, segments,
                                           per_segment, 2, K, V, SLICE, BLOCK_V), DTYPE)  # fmt: skip
            result += tl.dot((query * decay).to(DTYPE), state, input_precision=PRECISION) * factor
    scores, peak = _fit(scores, DTYPE)
    value = _load(v + image * v_image + within * v_head, token, tokens, v_token, V, BLOCK_V).to(DTYPE)
    result += tl.dot(scores, value, input_precision=PRECISION) * peak
    _store(out + (image * tokens * heads + within) * V, result * scale, token, tokens, heads * V, V, BLOCK_V)


@kernel
def _gated_linear_attention_bwd_kernel(
    q, k, v, gate, reverse_gate, dout, dq, dk, dv, dgate, dreverse_gate, states, decays, ends, scale,
    heads, tokens, chunks, segments, per_segment,
    qk_image, qk_token, qk_head, v_image, v_token, v_head, dout_image, dout_token, dout_head,
    gate_image, gate_token, gate_head,
    K: tl.constexpr, V: tl.constexpr, SLICE: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk of one head: every gradient of its tokens, with the scores computed again.

    Over slices of the key dim and levels: gradients of `q`, `k` and gates, and the scores; then the gradient of `v`.
    Reads the inputs, `dout` and the four states that enter the chunk once and writes each gradient once.
    The gradient of a gate is that of all pairs it lies between: with x = q dq and y = k dk, the x after it less the y
    after it among pairs inside the chunk (rounded alike, so that the difference of a strong gate vanishes), the x
    after it for keys before the chunk, the y before it for queries behind it, and one sum for pairs around it.
    """
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    image, within = (head // heads).to(tl.int64), head % heads
    row = tl.arange(0, CHUNK)
    token = chunk * CHUNK + row
    qk_start = image * qk_image + within * qk_head
    gate_start = image * gate_image + within * gate_head
    place = image * tokens * heads + within
    same = row[:, None] == row[None, :]
    nothing = tl.zeros((CHUNK, SLICE), tl.float32)
    value = _load(v + image * v_image + within * v_head, token, tokens, v_token, V, BLOCK_V).to(DTYPE)
    slope = _load(dout + image * dout_image + within * dout_head, token, tokens, dout_token, V, BLOCK_V).to(DTYPE)
    dscores, dpeak = _fit(tl.dot(slope, tl.trans(value), input_precision=PRECISION), DTYPE)
    diagonal = 2 * tl.sum(tl.where(same, dscores.to(tl.float32), 0.0), 1)[:, None]
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    dvalue = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for first in range(0, K, SLICE):
        query = _load(q + qk_start + first, token, tokens, qk_token, K - first, SLICE).to(tl.float32)
        key = _load(k + qk_start + first, token, tokens, qk_token, K - first, SLICE).to(tl.float32)
        gate_total = _load_gate(gate + gate_start + first, token, tokens, gate_token, K - first, SLICE)
        reverse_total = _load_gate(reverse_gate + gate_start + first, token, tokens, gate_token, K - first, SLICE)
        scores += tl.where(same, 2 * tl.sum(query * key, 1)[:, None], 0.0)
        dquery, dkey = diagonal * key, diagonal * query
        slopes, reverse_slopes = nothing, nothing  # x - y of either direction
        sums = (gate_total, reverse_total, nothing, nothing)
        for level in range(LEVELS):
            right = ((row >> level) & 1 == 1)[:, None]
            query_decay = tl.exp2(tl.where(right, sums[0], sums[1]))
            key_decay = tl.exp2(tl.where(right, sums[3], sums[2]))
            to_border, from_border = (query * query_decay).to(DTYPE), (key * key_decay).to(DTYPE)
            pairs = _neighbours(row, level)
            scores += tl.where(pairs, tl.dot(to_border, tl.trans(from_border), input_precision=PRECISION), 0.0)
            level_dscores = tl.where(pairs, dscores, 0.0).to(DTYPE)
            dx = tl.dot(level_dscores, from_border, input_precision=PRECISION)
            dy = tl.dot(tl.trans(level_dscores), to_border, input_precision=PRECISION)
            dquery += dx * query_decay
            dkey += dy * key_decay
            x, y = to_border.to(tl.float32) * dx, from_border.to(tl.float32) * dy
            slopes += tl.where(right, x, -y)
            reverse_slopes += tl.where(right, -y, x)
            sums, gate_total, reverse_total = _widen(sums, gate_total, reverse_total, row, level)
        dquery, dkey, slopes, reverse_slopes = dquery * dpeak, dkey * dpeak, slopes * dpeak, reverse_slopes * dpeak

        dlog, dreverse = tl.cumsum(slopes, 0, reverse=True), tl.cumsum(reverse_slopes, 0)
        for direction in range(tl.where(chunks > 1, 2, 0)):
            forward = direction == 0
            query_decay = tl.exp2(tl.where(forward, sums[0], sums[1]))
            key_decay = tl.exp2(tl.where(forward, sums[2], sums[3]))
            before = _entering(states, decays, ends, head, direction, first, chunk, chunks, segments, per_segment,
                               4, K, V, SLICE, BLOCK_V)  # fmt: skip
            behind = _entering(states, decays, ends, head, direction + 2, first, chunk, chunks, segments,
                               per_segment, 4, K, V, SLICE, BLOCK_V)  # fmt: skip
            around = tl.sum(before * behind, 1)[None, :]
            state, factor = _fit(before, DTYPE)
            dx = tl.dot(slope, tl.trans(state), input_precision=PRECISION) * factor * query_decay
            state, factor = _fit(behind, DTYPE)
            dy = tl.dot(value, tl.trans(state), input_precision=PRECISION) * factor * key_decay
            dvalue += tl.dot((key * key_decay).to(DTYPE), state, input_precision=PRECISION) * factor
            dquery += dx
            dkey += dy
            x, y = query * dx, key * dy
            if forward:
                dlog += tl.cumsum(x, 0, reverse=True) + tl.cumsum(y, 0) - y + tl.exp2(gate_total) * around
            else:
                dreverse += tl.cumsum(x, 0) + tl.cumsum(y, 0, reverse=True) - y + tl.exp2(reverse_total) * around
        offset = place * K + first
        _store(dq + offset, dquery * scale, token, tokens, heads * K, K - first, SLICE)
        _store(dk + offset, dkey * scale, token, tokens, heads * K, K - first, SLICE)
        _store(dgate + offset, dlog * scale, token, tokens, heads * K, K - first, SLICE)
        _store(dreverse_gate + offset, dreverse * scale, token, tokens, heads * K, K - first, SLICE)
    scores, peak = _fit(scores, DTYPE)
    dvalue += tl.dot(tl.trans(scores), slope, input_precision=PRECISION) * peak
    _store(dv + place * V, dvalue * scale, token, tokens, heads * V, V, BLOCK_V)
