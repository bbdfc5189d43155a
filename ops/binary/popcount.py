"""Products of packed signs in machine code by numba, an optional package (`pip install striate[binary]`).

Importing this needs numba. Words of neighbouring rows of the weights lie side by side, so that the counting of bits is
vectorised over them; LLVM takes the best that the CPU has (`vpopcntq`, or table look-ups on AVX2).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from .reference import WORD

LEAST_WORK = 1 << 16  # word operations that are worth a thread, about 20 us
_pool: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_pool.clear)  # its threads stay behind


@intrinsic
def _count_bits(context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@numba.njit(nogil=True, error_model="numpy")
def _pack(x, shift, bits, nonzero):  # type: ignore[no-untyped-def]
    """Fill `bits` and `nonzero` `(W,)` with the signs of `x + shift` `(K,)` and where it is not 0."""
    for w in range(len(bits)):
        positive, present = np.uint64(0), np.uint64(0)
        for i in range(min(WORD, len(x) - WORD * w)):
            value = x[WORD * w + i] + shift[WORD * w + i]
            positive |= np.uint64(value > 0) << np.uint64(i)
            present |= np.uint64((value > 0) | (value < 0)) << np.uint64(i)
        bits[w], nonzero[w] = positive, present


@numba.njit(nogil=True, error_model="numpy")
def _differing_bits(bits, present, words, length, differ):  # type: ignore[no-untyped-def]
    """Add to `differ` `(N,)` in how many bits one row and the rows of `words` `(W, N)` differ, where they count.

    Returns how many bits of the row count.
    """
    count, columns, total = len(bits), words.shape[1], np.uint64(0)
    for w in range(count):
        total += _count_bits(present[w])
    differ[:] = 0
    if total != length:
        for w in range(count):
            for n in range(columns):
                differ[n] += np.uint32(_count_bits((bits[w] ^ words[w, n]) & present[w]))
        return total
    w = 0
    while w + 3 <= count:  # three at once save two of three loads and stores of `differ`
        a, b, c = bits[w], bits[w + 1], bits[w + 2]
        for n in range(columns):
            differ[n] += np.uint32(
                _count_bits(a ^ words[w, n]) + _count_bits(b ^ words[w + 1, n]) + _count_bits(c ^ words[w + 2, n])
            )
        w += 3
    while w < count:
        a = bits[w]
        for n in range(columns):
            differ[n] += np.uint32(_count_bits(a ^ words[w, n]))
        w += 1
    return total


@numba.njit(nogil=True, error_model="numpy")
def _scale(total, differ, scale, bias, out):  # type: ignore[no-untyped-def]
    """Fill `out` `(N,)` from the numbers of differing bits of `total` ones."""
    for n in range(len(out)):
        out[n] = out.dtype.type(total - np.int32(2) * np.int32(differ[n])) * scale[n] + bias[n]


@numba.njit(nogil=True, error_model="numpy")
def _activate(y, shortcut, slope, offset):  # type: ignore[no-untyped-def]
    """In place for a row `(N,)`; without a branch, so that it is vectorised."""
    period = len(shortcut)
    for start in range(0, len(y), period):
        part = y[start : start + period]
        for c in range(period):
            part[c] += shortcut[c]
    for n in range(len(y)):
        negative = y[n] * slope[n]
        y[n] = (y[n] if y[n] > 0 else negative) + offset[n]


@numba.njit(nogil=True, error_model="numpy")
def _linear(x, words, shift, scale, bias, out):  # type: ignore[no-untyped-def]
    bits, nonzero = np.empty(len(words), np.uint64), np.empty(len(words), np.uint64)
    differ = np.empty(words.shape[1], np.uint32)
    for m in range(len(x)):
        _pack(x[m], shift, bits, nonzero)
        total = _differing_bits(bits, nonzero, words, x.shape[1], differ)
        _scale(np.int32(total), differ, scale, bias, out[m])


@numba.njit(nogil=True, error_model="numpy")
def _projection(x, shortcut, words, shift, scale, bias, slope, offset, out):  # type: ignore[no-untyped-def]
    bits, nonzero = np.empty(len(words), np.uint64), np.empty(len(words), np.uint64)
    differ = np.empty(words.shape[1], np.uint32)
    for m in range(len(x)):
        _pack(x[m], shift, bits, nonzero)
        total = _differing_bits(bits, nonzero, words, x.shape[1], differ)
        _scale(np.int32(total), differ, scale, bias, out[m])
        _activate(out[m], shortcut[m], slope, offset)


@numba.njit(nogil=True, error_model="numpy")
def _matmul(a, words, length, out):  # type: ignore[no-untyped-def]
    present = np.empty(words.shape[0], np.uint64)
    for w in range(len(present)):
        count = min(WORD, length - WORD * w)
        present[w] = ~np.uint64(0) >> np.uint64(WORD - count)
    differ = np.empty(words.shape[1], np.uint32)
    for m in range(len(a)):
        _differing_bits(a[m], present, words, length, differ)
        for n in range(len(differ)):
            out[m, n] = np.int32(length) - np.int32(2) * np.int32(differ[n])


def columns(words: Tensor) -> np.ndarray:
    """Words `(N, W)` as the kernels read them, `(W, N)`."""
    return np.ascontiguousarray(words.numpy().view(np.uint64).T)


def linear(x: Tensor, words: np.ndarray, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`sign(x) W^T * scale + bias` in the dtype of `x` `(M, K)`, float32 or float64; words `(W, N)`."""
    out = x.new_empty(len(x), words.shape[1])
    bias = torch.zeros_like(scale) if bias is None else bias
    _in_threads(_linear, (x,), (words, *_arrays(x.new_zeros(x.shape[1]), scale, bias)), out)
    return out


def projection(
    x: Tensor,
    words: np.ndarray,
    scale: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    slope: Tensor,
    offset: Tensor,
    shift: Tensor | None,
) -> Tensor:
    """See `striate.ops.binary_projection`; `x` `(M, K)`, words `(W, N)`, shortcut `(M, C)`."""
    out = x.new_empty(len(x), words.shape[1])
    shift = x.new_zeros(x.shape[1]) if shift is None else shift.to(x.dtype)
    _in_threads(_projection, (x, shortcut), (words, *_arrays(shift, scale, bias, slope, offset)), out)
    return out


def matmul(a: Tensor, words: np.ndarray, length: int) -> Tensor:
    """`a` `(M, W)` times words `(W, N)`: `(M, N)` int32."""
    out = torch.empty(len(a), words.shape[1], dtype=torch.int32)
    _in_threads(_matmul, (a.view(torch.uint64),), (words, length), out)
    return out


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().contiguous().numpy() for t in tensors)


def _in_threads(kernel: Callable[..., None], rows: Sequence[Tensor], others: Sequence[Any], out: Tensor) -> None:
    """Run `kernel(*rows, *others, out)` on some rows in each of PyTorch's number of threads; `others[0]` are words."""
    threads = max(1, min(torch.get_num_threads(), len(out) * others[0].size // LEAST_WORK))
    bounds = [len(out) * i // threads for i in range(threads + 1)]
    if not _pool or _pool[0]._max_workers < threads - 1:
        _pool[:] = [ThreadPoolExecutor(max(1, threads - 1), "striate-popcount")]
    arrays, result = _arrays(*rows), out.numpy()
    parts = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    calls = [(*(array[part] for array in arrays), *others, result[part]) for part in parts]
    rest = [_pool[0].submit(kernel, *call) for call in calls[1:]]
    kernel(*calls[0])
    for future in rest:
        future.result()
