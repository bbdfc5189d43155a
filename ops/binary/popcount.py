"""Products of packed signs in machine code by numba, an optional package (`pip install striate[binary]`).

Importing this needs numba. A kernel takes a few rows at a time through all that it does, from the signs of the
activations to the result, in the first-level cache; `counting.py` has the inner loop.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import counting
from .counting import ROWS
from .intrinsics import signs_of_eight
from .reference import WORD

LEAST_WORK = 1 << 17  # products of words that are worth a thread, about 20 us
_pool: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_pool.clear)  # its threads stay behind


class Weights:
    """Packed weights `(N, W)` of rows of `length` signs, laid out for the fastest way to count on this CPU."""

    def __init__(self, words: Tensor, length: int) -> None:
        way = counting.best(length)
        self.columns, self.work, self.kernels = len(words), words.numel(), _kernels(way.count)
        self.data = way.layout(words.contiguous().numpy().view(np.uint64))


# These take whole matrices and the number of a row: a slice is an object whose references numba counts.


@numba.njit(nogil=True, error_model="numpy")
def _pack(x, m, shift, bits, present, r):  # type: ignore[no-untyped-def]
    """Signs of the row `x[m] + shift`, and where it has one, as bits of the bytes `bits[r]` and `present[r]`."""
    columns = x.shape[1]
    whole = columns // 8
    for i in range(whole):
        bits[r, i], present[r, i] = signs_of_eight(x, m * columns + 8 * i, shift, 8 * i)
    if columns > 8 * whole:
        rest, zeros = np.zeros(8, x.dtype), np.zeros(8, x.dtype)
        for i in range(8 * whole, columns):
            rest[i - 8 * whole] = x[m, i] + shift[i]
        bits[r, whole], present[r, whole] = signs_of_eight(rest, 0, zeros, 0)


@numba.njit(nogil=True, error_model="numpy")
def _scale(products, r, scale, bias, out, m):  # type: ignore[no-untyped-def]
    for n in range(out.shape[1]):
        out[m, n] = out.dtype.type(products[r, n]) * scale[n] + bias[n]


@numba.njit(nogil=True, error_model="numpy")
def _activate(y, shortcut, slope, offset, m):  # type: ignore[no-untyped-def]
    """A row of `y` in place; without a branch, so that it is vectorised."""
    period = shortcut.shape[1]
    for start in range(0, y.shape[1], period):
        for c in range(period):
            y[m, start + c] += shortcut[m, c]
    for n in range(y.shape[1]):
        negative = y[m, n] * slope[n]
        y[m, n] = (y[m, n] if y[m, n] > 0 else negative) + offset[n]


@functools.cache
def _kernels(count: Any) -> SimpleNamespace:
    """Layers and products of words around a kernel of `counting.py`."""

    @numba.njit(nogil=True, error_model="numpy")
    def products_of_signs(x, weights, shift, first, out):  # type: ignore[no-untyped-def]
        """Of rows `first` to `first + ROWS` of `x + shift`, as far as there are."""
        size = WORD // 8 * ((x.shape[1] + WORD - 1) // WORD)
        bits, present = np.zeros((ROWS, size), np.uint8), np.zeros((ROWS, size), np.uint8)
        rows = min(ROWS, len(x) - first)
        for r in range(rows):
            _pack(x, first + r, shift, bits, present, r)
        return count(bits, present, rows, weights, out, first)

    @numba.njit(nogil=True, error_model="numpy")
    def linear(x, weights, shift, scale, bias, out):  # type: ignore[no-untyped-def]
        for first in range(0, len(x), ROWS):
            products = products_of_signs(x, weights, shift, first, out)
            for r in range(min(ROWS, len(x) - first)):
                _scale(products, r, scale, bias, out, first + r)

    @numba.njit(nogil=True, error_model="numpy")
    def projection(x, shortcut, weights, shift, scale, bias, slope, offset, out):  # type: ignore[no-untyped-def]
        for first in range(0, len(x), ROWS):
            products = products_of_signs(x, weights, shift, first, out)
            for r in range(min(ROWS, len(x) - first)):
                _scale(products, r, scale, bias, out, first + r)
                _activate(out, shortcut, slope, offset, first + r)

    @numba.njit(nogil=True, error_model="numpy")
    def matmul(a, weights, present, out):  # type: ignore[no-untyped-def]
        bits = np.zeros(present.shape, np.uint8)
        for first in range(0, len(a), ROWS):
            rows = min(ROWS, len(a) - first)
            for r in range(rows):
                for i in range(a.shape[1]):
                    bits[r, i] = a[first + r, i]
            products = count(bits, present, rows, weights, out, first)
            for r in range(rows):
                for n in range(out.shape[1]):
                    out[first + r, n] = products[r, n]

    return SimpleNamespace(linear=linear, projection=projection, matmul=matmul)


def linear(x: Tensor, weights: Weights, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`sign(x) W^T * scale + bias` in the dtype of `x` `(M, K)`, float32 or float64."""
    bias = torch.zeros_like(scale) if bias is None else bias
    out = x.new_empty(len(x), weights.columns)
    _in_threads(weights.kernels.linear, weights, (x,), _arrays(x.new_zeros(x.shape[1]), scale, bias), out)
    return out


def projection(
    x: Tensor,
    weights: Weights,
    scale: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    slope: Tensor,
    offset: Tensor,
    shift: Tensor | None,
) -> Tensor:
    """See `striate.ops.binary_projection`; `x` `(M, K)`, shortcut `(M, C)`."""
    out = x.new_empty(len(x), weights.columns)
    shift = x.new_zeros(x.shape[1]) if shift is None else shift.to(x.dtype)
    _in_threads(weights.kernels.projection, weights, (x, shortcut), _arrays(shift, scale, bias, slope, offset), out)
    return out


def matmul(a: Tensor, weights: Weights, length: int) -> Tensor:
    """Words `a` `(M, W)` times weights: `(M, N)` int32."""
    out = torch.empty(len(a), weights.columns, dtype=torch.int32)
    present = np.packbits(np.arange(a.shape[1] * WORD) < length, bitorder="little")
    present = np.broadcast_to(present, (ROWS, len(present))).copy()
    _in_threads(weights.kernels.matmul, weights, (a.contiguous().view(torch.uint8),), (present,), out)
    return out


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().contiguous().numpy() for t in tensors)


def _in_threads(
    kernel: Callable[..., None], weights: Weights, rows: Sequence[Tensor], others: Sequence[Any], out: Tensor
) -> None:
    """Run `kernel(*rows, weights, *others, out)` on some rows in each of PyTorch's number of threads."""
    threads = max(1, min(torch.get_num_threads(), len(out) * weights.work // LEAST_WORK))
    arrays, result = _arrays(*rows), out.numpy()
    if threads == 1:
        kernel(*arrays, weights.data, *others, result)
        return
    bounds = [len(out) * i // threads for i in range(threads + 1)]
    parts = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    calls = [(*(array[part] for array in arrays), weights.data, *others, result[part]) for part in parts]
    if not _pool or _pool[0]._max_workers < threads - 1:
        _pool[:] = [ThreadPoolExecutor(threads - 1, "striate-popcount")]
    rest = [_pool[0].submit(kernel, *call) for call in calls[1:]]
    kernel(*calls[0])
    for future in rest:
        future.result()
