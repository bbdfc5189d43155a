"""Two ways to multiply packed signs, in machine code by numba: the number of signs less twice that of differing ones.

Each has a layout for the weights and a kernel `count(bits, present, weights, out, first)`: `bits` and `present` are
`(ROWS, 8 W)` bytes, the signs of ROWS rows and which of them count; it returns the products `(ROWS, N or more)`.
`out[first:]` is where the caller will write next.
"""

from __future__ import annotations

from types import SimpleNamespace

import numba
import numpy as np
from numba.core.codegen import get_host_cpu_features

from .intrinsics import (
    add_tables,
    count_ones,
    expect_write,
    load,
    load_twice,
    no_bytes,
    plus,
    plus_looked_up,
    sixteenth,
    take_twice,
)

ROWS = 4  # at once: with two vectors of columns each, they leave 8 of AVX2's 16 registers
COLUMNS = 64
GROUPS = 60  # of four signs, whose differing bits a byte can count
LINE = 64  # bytes of a cache line


# ------------------------------------------------------------------------------------------- instructions for counting


def _words_in_columns(words: np.ndarray) -> np.ndarray:
    """`(N, W)` -> `(W, N)`: neighbouring columns lie side by side, so that the counting is vectorised over them."""
    return np.ascontiguousarray(words.T)


@numba.njit(nogil=True, error_model="numpy")
def _count_row(words, r):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for w in range(words.shape[1]):
        total += np.int32(count_ones(words[r, w]))
    return total


@numba.njit(nogil=True, error_model="numpy")
def _count_words(bits, present, weights, out, first):  # type: ignore[no-untyped-def]
    """Words of 64 signs by `vpopcntq` where the CPU has it, else by what LLVM makes of it."""
    count, columns = weights.shape
    a, p = bits.view(np.uint64), present.view(np.uint64)
    products = np.empty((ROWS, columns), np.int32)
    for r in range(ROWS):
        total = _count_row(p, r)
        for n in range(columns):
            products[r, n] = total
        w = 0
        while w + 3 <= count:  # three at once save two of three loads and stores of the products
            a0, a1, a2, p0, p1, p2 = a[r, w], a[r, w + 1], a[r, w + 2], p[r, w], p[r, w + 1], p[r, w + 2]
            for n in range(columns):
                differ = np.int32(
                    count_ones((a0 ^ weights[w, n]) & p0)
                    + count_ones((a1 ^ weights[w + 1, n]) & p1)
                    + count_ones((a2 ^ weights[w + 2, n]) & p2)
                )
                products[r, n] -= differ + differ
            w += 3
        while w < count:
            a0, p0 = a[r, w], p[r, w]
            for n in range(columns):
                differ = np.int32(count_ones((a0 ^ weights[w, n]) & p0))
                products[r, n] -= differ + differ
            w += 1
    return products


# ------------------------------------------------------------------------------------------------------ looking them up

# For each (signs, which of them count) of four activations 16 bytes: in how many they differ from 0, 1, ... 15. Then
# the same 16 times as large: a sum of two of them stands for two rows.
_present, _signs, _weights = np.indices((16, 16, 16), np.uint8)
_differ = sum(((_signs ^ _weights) & _present) >> i & 1 for i in range(4))
TABLES = np.stack((_differ, 16 * _differ))
SECOND = _differ.size


def _fours_in_columns(words: np.ndarray) -> np.ndarray:
    """`(N, W)` -> `(N / 64, groups, 64)`: four signs of a column in a byte, 64 columns side by side.

    Groups come by threes, and so in sixes, since a word has 16. The first and the second 16 of 32 columns alternate.
    """
    given, pairs = 16 * words.shape[1], words.view(np.uint8)
    groups = -(-given // 6) * 6
    fours = np.zeros((-(-len(words) // COLUMNS) * COLUMNS, groups), np.uint8)
    fours[: len(words), :given:2], fours[: len(words), 1:given:2] = pairs & 15, pairs >> 4
    fours = fours.reshape(-1, 2, 2, 16, groups).transpose(0, 4, 1, 3, 2)
    return np.ascontiguousarray(fours).reshape(-1, groups, COLUMNS)


@numba.njit(nogil=True, error_model="numpy")
def _fill_tables(bits, present, begin, end, tables):  # type: ignore[no-untyped-def]
    """Fill `tables` `(2, GROUPS, 16)`, each for two rows, with those of bytes `begin` to `end`."""
    for r in range(2):
        to = r * GROUPS * 16
        for i in range(begin, end):
            if i < bits.shape[1]:
                a, p = np.intp(bits[2 * r, i]), np.intp(present[2 * r, i])
                b, q = np.intp(bits[2 * r + 1, i]), np.intp(present[2 * r + 1, i])
            else:
                a = p = b = q = 0
            low, high = 16 * (a & 15) + 256 * (p & 15), 16 * (b & 15) + 256 * (q & 15)
            add_tables(tables, to, TABLES, low, SECOND + high)
            low, high = 16 * (a >> 4) + 256 * (p >> 4), 16 * (b >> 4) + 256 * (q >> 4)
            add_tables(tables, to + 16, TABLES, low, SECOND + high)
            to += 32


@numba.njit(nogil=True, error_model="numpy")
def _look_up(tables, weights, at, groups, products, n):  # type: ignore[no-untyped-def]
    """Take from 64 columns of `products` `(ROWS, N)` from `n`; their `groups` of weights begin at `at`.

    A look-up does two rows, 256 signs. Three of its bytes, with a row in each half, are added up before a half
    overflows. The sums of the lower rows follow from all sums, and those of the upper halves.
    """
    a0, a1, b0, b1 = no_bytes(), no_bytes(), no_bytes(), no_bytes()
    upper_a0, upper_a1, upper_b0, upper_b1 = no_bytes(), no_bytes(), no_bytes(), no_bytes()
    row = GROUPS * 16
    for first in range(0, groups, 3):
        c0, c1, d0, d1 = no_bytes(), no_bytes(), no_bytes(), no_bytes()
        for g in range(first, first + 3):
            w0, w1 = load(weights, at + COLUMNS * g), load(weights, at + COLUMNS * g + 32)
            table = load_twice(tables, 16 * g)
            c0, c1 = plus_looked_up(c0, table, w0), plus_looked_up(c1, table, w1)
            table = load_twice(tables, 16 * g + row)
            d0, d1 = plus_looked_up(d0, table, w0), plus_looked_up(d1, table, w1)
        a0, a1, b0, b1 = plus(a0, c0), plus(a1, c1), plus(b0, d0), plus(b1, d1)
        upper_a0, upper_a1 = plus(upper_a0, sixteenth(c0)), plus(upper_a1, sixteenth(c1))
        upper_b0, upper_b1 = plus(upper_b0, sixteenth(d0)), plus(upper_b1, sixteenth(d1))
    columns = products.shape[1]
    take_twice(products, n, n + columns, a0, upper_a0)
    take_twice(products, n + 32, n + 32 + columns, a1, upper_a1)
    take_twice(products, n + 2 * columns, n + 3 * columns, b0, upper_b0)
    take_twice(products, n + 32 + 2 * columns, n + 32 + 3 * columns, b1, upper_b1)


@numba.njit(nogil=True, error_model="numpy")
def _count_fours(bits, present, weights, out, first):  # type: ignore[no-untyped-def]
    """Groups of four signs by look-ups in tables of 16 entries, which live in registers (AVX2)."""
    blocks, groups = weights.shape[0], weights.shape[1]
    products = np.empty((ROWS, blocks * COLUMNS), np.int16)
    words = present.view(np.uint64)
    for r in range(ROWS):
        total = _count_row(words, r)
        for n in range(blocks * COLUMNS):
            products[r, n] = total
    tables = np.empty((2, GROUPS, 16), np.uint8)
    for begin in range(0, groups, GROUPS):
        here = min(GROUPS, groups - begin)
        _fill_tables(bits, present, begin // 2, (begin + here) // 2, tables)
        for n in range(blocks):
            if begin == 0:
                for r in range(ROWS):
                    for i in range(0, COLUMNS, LINE // out.itemsize):
                        expect_write(out, (first + r) * out.shape[1] + COLUMNS * n + i)
            _look_up(tables, weights, (n * groups + begin) * COLUMNS, here, products, COLUMNS * n)
    return products


words = SimpleNamespace(layout=_words_in_columns, count=_count_words)
fours = SimpleNamespace(layout=_fours_in_columns, count=_count_fours)


def best(length: int) -> SimpleNamespace:
    """The faster way on this CPU for rows of `length` signs; look-ups do fewer than 2^15 of them."""
    given = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    features = (get_host_cpu_features() if given is None else given).split(",")
    return fours if "+avx2" in features and "+avx512vpopcntdq" not in features and length < 1 << 15 else words
