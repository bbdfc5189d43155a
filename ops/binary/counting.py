"""Two ways to multiply packed signs, in machine code by numba: the number of signs less twice that of differing ones.

Each has a layout for the weights and a kernel `count(bits, present, rows, weights, out, first)`: `bits` and `present`
are `(ROWS, 8 W)` bytes, the signs of `rows` rows and which of them count; it returns the products `(ROWS, N or more)`,
the first `rows` of them filled. `out[first:]` is where the caller will write next.
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

ROWS = 8  # at once: twice what the registers hold, so that weights come from the second-level cache half as often
COLUMNS = 64
GROUPS = 63  # of four signs, threes of them, whose differing bits a byte can count
LINE = 64  # bytes of a cache line


@numba.njit(nogil=True, error_model="numpy")
def _start(present, rows, products):  # type: ignore[no-untyped-def]
    """Fill rows of `products` with how many signs count: what the products are if none differ."""
    words = present.view(np.uint64)
    for r in range(rows):
        total = np.int32(0)
        for w in range(words.shape[1]):
            total += np.int32(count_ones(words[r, w]))
        for n in range(products.shape[1]):
            products[r, n] = total


# ------------------------------------------------------------------------------------------- instructions for counting


def _words_in_columns(words: np.ndarray) -> np.ndarray:
    """`(N, W)` -> `(W, N)`: neighbouring columns lie side by side, so that the counting is vectorised over them."""
    return np.ascontiguousarray(words.T)


@numba.njit(nogil=True, error_model="numpy")
def _count_words(bits, present, rows, weights, out, first):  # type: ignore[no-untyped-def]
    """Words of 64 signs by `vpopcntq` where the CPU has it, else by what LLVM makes of it."""
    count, columns = weights.shape
    a, p = bits.view(np.uint64), present.view(np.uint64)
    products = np.empty((ROWS, columns), np.int32)
    _start(present, rows, products)
    for r in range(rows):
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


def _fours_in_columns(words: np.ndarray) -> np.ndarray:
    """`(N, W)` -> `(N / 64, groups, 64)`: four signs of a column in a byte, 64 columns side by side.

    Groups come by threes. The first and the second 16 of 32 columns alternate.
    """
    given, pairs = 16 * words.shape[1], words.view(np.uint8)
    groups = -(-given // 3) * 3
    fours = np.zeros((-(-len(words) // COLUMNS) * COLUMNS, groups), np.uint8)
    fours[: len(words), :given:2], fours[: len(words), 1:given:2] = pairs & 15, pairs >> 4
    fours = fours.reshape(-1, 2, 2, 16, groups).transpose(0, 4, 1, 3, 2)
    return np.ascontiguousarray(fours).reshape(-1, groups, COLUMNS)


@numba.njit(nogil=True, error_model="numpy")
def _numbers_of_tables(bits, present, numbers):  # type: ignore[no-untyped-def]
    """Fill `numbers` `(ROWS, groups)`: which table each group of each row takes."""
    for r in range(ROWS):
        for i in range(bits.shape[1]):
            numbers[r, 2 * i] = (bits[r, i] & np.uint8(15)) | (present[r, i] << np.uint8(4))
            numbers[r, 2 * i + 1] = (bits[r, i] >> np.uint8(4)) | (present[r, i] & np.uint8(240))


@numba.njit(nogil=True, error_model="numpy")
def _copy_tables(numbers, begin, groups, tables):  # type: ignore[no-untyped-def]
    """Fill `tables` `(ROWS / 2, GROUPS, 16)`, each for two rows, for some `groups` from `begin`."""
    for pair in range(ROWS // 2):
        for g in range(groups):
            first = np.intp(numbers[2 * pair, begin + g])
            second = np.intp(numbers[2 * pair + 1, begin + g])
            add_tables(tables, (pair * GROUPS + g) * 16, TABLES, 16 * first, 16 * (256 + second))


@numba.njit(nogil=True, error_model="numpy")
def _look_up(tables, r, weights, at, groups, products, n):  # type: ignore[no-untyped-def]
    """Take from four rows and 64 columns of `products` `(ROWS, N)` from `r, n`; their weights begin at `at`.

    A look-up does two rows, 256 signs. Three of its bytes, with a row in each half, are added up before a half
    overflows. The sums of the lower rows follow from all sums, and those of the upper halves.
    """
    a0, a1, b0, b1 = no_bytes(), no_bytes(), no_bytes(), no_bytes()
    upper_a0, upper_a1, upper_b0, upper_b1 = no_bytes(), no_bytes(), no_bytes(), no_bytes()
    pair = GROUPS * 16
    start = r // 2 * pair
    for first in range(0, groups, 3):
        c0, c1, d0, d1 = no_bytes(), no_bytes(), no_bytes(), no_bytes()
        for g in range(first, first + 3):
            w0, w1 = load(weights, at + COLUMNS * g), load(weights, at + COLUMNS * g + 32)
            table = load_twice(tables, start + 16 * g)
            c0, c1 = plus_looked_up(c0, table, w0), plus_looked_up(c1, table, w1)
            table = load_twice(tables, start + pair + 16 * g)
            d0, d1 = plus_looked_up(d0, table, w0), plus_looked_up(d1, table, w1)
        a0, a1, b0, b1 = plus(a0, c0), plus(a1, c1), plus(b0, d0), plus(b1, d1)
        upper_a0, upper_a1 = plus(upper_a0, sixteenth(c0)), plus(upper_a1, sixteenth(c1))
        upper_b0, upper_b1 = plus(upper_b0, sixteenth(d0)), plus(upper_b1, sixteenth(d1))
    columns = products.shape[1]
    n += r * columns
    take_twice(products, n, n + columns, a0, upper_a0)
    take_twice(products, n + 32, n + 32 + columns, a1, upper_a1)
    take_twice(products, n + 2 * columns, n + 3 * columns, b0, upper_b0)
    take_twice(products, n + 32 + 2 * columns, n + 32 + 3 * columns, b1, upper_b1)


@numba.njit(nogil=True, error_model="numpy")
def _expect_columns(out, first, rows, n):  # type: ignore[no-untyped-def]
    """Have the cache lines of 64 columns from `n` at hand when they are written."""
    for r in range(rows):
        for i in range(0, COLUMNS, LINE // out.itemsize):
            expect_write(out, (first + r) * out.shape[1] + n + i)


@numba.njit(nogil=True, error_model="numpy")
def _count_fours(bits, present, rows, weights, out, first):  # type: ignore[no-untyped-def]
    """Groups of four signs by look-ups in tables of 16 entries, which live in registers (AVX2)."""
    blocks, groups = weights.shape[0], weights.shape[1]
    products = np.empty((ROWS, blocks * COLUMNS), np.int16)
    _start(present, rows, products)
    numbers, tables = np.zeros((ROWS, groups), np.uint8), np.empty((ROWS // 2, GROUPS, 16), np.uint8)
    _numbers_of_tables(bits, present, numbers)
    for begin in range(0, groups, GROUPS):
        here = min(GROUPS, groups - begin)
        _copy_tables(numbers, begin, here, tables)
        for n in range(blocks):
            if begin == 0:
                _expect_columns(out, first, rows, COLUMNS * n)
            for r in range(0, rows, 4):
                _look_up(tables, r, weights, (n * groups + begin) * COLUMNS, here, products, COLUMNS * n)
    return products


words = SimpleNamespace(layout=_words_in_columns, count=_count_words)
fours = SimpleNamespace(layout=_fours_in_columns, count=_count_fours)


def best(length: int) -> SimpleNamespace:
    """The faster way on this CPU for rows of `length` signs; look-ups do fewer than 2^15 of them."""
    given = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    features = (get_host_cpu_features() if given is None else given).split(",")
    return fours if "+avx2" in features and "+avx512vpopcntdq" not in features and length < 1 << 15 else words
