"""Triton kernels of packed binary products. `triton.py` launches them.

Signs come in words of 64 bits, 1 for +1 and 0 for -1, those after the last sign 0. Signs of activations have a second
plane, whose bits are 1 where the activation is not zero. Products of signs are exact integers; what follows them is
computed in float32 and rounded once.
"""

from __future__ import annotations

from .._triton import kernel, tl


@kernel
def _popcount(x):
    """Number of ones in each word of 64 bits, in a form that compilers know and turn into their instruction for it."""
    x = x.to(tl.uint64, bitcast=True)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@kernel
def _pack(ones, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Booleans (ROWS, 64 WORDS) -> words (ROWS, WORDS)."""
    bit = tl.arange(0, 64).to(tl.int64)
    ones = tl.reshape(ones.to(tl.int64), (ROWS, WORDS, 64))
    return tl.sum(ones << bit[None, None, :], 2)  # the bits are disjoint: a sum is their union


@kernel
def _unpack(halves, ROWS: tl.constexpr):
    """Halves of words (ROWS, 2) -> their bits (ROWS, 64), in steps that leave a thread the eight bits of a byte."""
    x = halves[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]
    x = tl.join(x, x >> 4)
    x = tl.join(x, x >> 2)
    x = tl.join(x, x >> 1)
    return tl.reshape(x & 1, (ROWS, 64))


@kernel
def _affine(total, scale, bias, column, inside):
    """`total * scale + bias` in float32, of a tile whose columns are outputs."""
    total *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@kernel
def _pack_signs_kernel(
    x, signs, nonzero, counts, rows, columns, row_stride, ROWS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Planes `(words, rows)` of the signs and of what is not zero, and the number of the latter; reads `x` once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    start = row.to(tl.int64) * row_stride
    words = (columns + 63) // 64
    count = tl.zeros((ROWS,), tl.int32)
    for first in range(0, words, WORDS):
        column = first * 64 + tl.arange(0, 64 * WORDS)
        inside = there[:, None] & (column < columns)[None, :]
        value = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        positive = _pack(value > 0.0, ROWS, WORDS)
        either = positive | _pack(value < 0.0, ROWS, WORDS)  # a NaN has no sign and counts as a zero
        count += tl.sum(_popcount(either), 1)
        word = first + tl.arange(0, WORDS)
        place = word.to(tl.int64)[None, :] * rows + row[:, None]
        inside = there[:, None] & (word < words)[None, :]
        tl.store(signs + place, positive, mask=inside)
        tl.store(nonzero + place, either, mask=inside)
    tl.store(counts + row, count, mask=there)


@kernel
def _packed_matmul_kernel(
    a, nonzero, counts, b, scale, bias, out, rows, columns, length, a_row, a_word,
    ACTIVATIONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products of signs `a`, whose rows and words are `a_row` and `a_word` apart, and `b` `(columns, words)`.

    Each is `length` less twice the bits that differ. Of `ACTIVATIONS` only those that are not zero take part, and their
    number stands for `length`; then come the scale and the bias.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there, inside = row < rows, column < columns
    words = (length + 63) // 64
    start = row.to(tl.int64) * a_row
    weights = b + column.to(tl.int64) * words
    step = tl.cast(a_word, tl.int64)
    differ = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for word in range(words):
        x = tl.load(a + start + word * step, mask=there, other=0)
        bits = x[:, None] ^ tl.load(weights + word, mask=inside, other=0)[None, :]
        if ACTIVATIONS:
            bits &= tl.load(nonzero + start + word * step, mask=there, other=0)[:, None]
        differ += _popcount(bits)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    if ACTIVATIONS:
        total = tl.load(counts + row, mask=there, other=0)[:, None] - 2 * differ
        result = _affine(total.to(tl.float32), scale, bias, column, inside)
    else:
        result = length - 2 * differ
    tl.store(out + place, result.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


@kernel
def _binary_weight_linear_kernel(
    x, halves, scale, bias, out, rows, columns, depth, row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x` `(rows, depth)` times signs, whose words come as halves of 32 bits `(columns, 2 words)`; scale and bias.

    The signs are the left operand of the product: that one may stay in the registers that they are unpacked into.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there, inside = row < rows, column < columns
    words = (depth + 63) // 64
    start = x + row.to(tl.int64) * row_stride
    weights = halves + column.to(tl.int64) * (2 * words)
    half, deep = tl.arange(0, 2), tl.arange(0, 64)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for word in range(words):
        packed = tl.load(weights[:, None] + 2 * word + half[None, :], mask=inside[:, None], other=0)
        signs = tl.where(_unpack(packed, BLOCK_N) != 0, 1.0, -1.0).to(x.dtype.element_ty)
        k = word * 64 + deep
        value = tl.load(start[:, None] + k[None, :], mask=there[:, None] & (k < depth)[None, :], other=0.0)
        total = tl.dot(signs, tl.trans(value), total, input_precision=PRECISION)
    result = _affine(tl.trans(total), scale, bias, column, inside)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])
