"""Eager products of packed signs on a CPU.

With numba, bits are counted. Without it, signs are multiplied as 8-bit integers by oneDNN, which is fast on CPUs that
have instructions for that (VNNI, AMX), and as floating-point numbers where that is faster or there is no oneDNN. Both
keep an unpacked copy of the weights, as do products of binary weights and real numbers, as long as the words exist.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, MutableMapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _backend
from . import reference
from .reference import affine, unpack_signs

CHUNK_BYTES = 1 << 19  # passed over at once per thread
FEW_ROWS = 128  # for fewer, oneDNN without AVX-512 spends more time on the layout of the weights than it saves
_kept: MutableMapping[Tensor, dict[Any, Any]] = WeakTensorKeyDictionary()


def packed_matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    """See `striate.ops.packed_matmul`."""
    if popcount := _popcount():
        return popcount.matmul(a, popcount.Weights(b, length), length)
    return reference.packed_matmul(a, b, length)


def binary_linear(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, binary_input: bool) -> Tensor:
    """See `striate.ops.binary_linear`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, scale, bias = _rows(x).to(wide), scale.to(wide), None if bias is None else bias.to(wide)
    multiply = _signs_product if binary_input else _real_product
    y = multiply(rows, words, scale, bias) if len(rows) else rows.new_empty(0, len(words))
    return y.to(x.dtype).view(*x.shape[:-1], len(words))


def _rows(x: Tensor) -> Tensor:
    """`(..., C)` -> `(M, C)`."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def binary_projection(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    slope: Tensor,
    offset: Tensor,
    shift: Tensor | None,
) -> Tensor | None:
    """See `striate.ops.binary_projection`; None where it is better composed of other operators."""
    if x.dtype not in (torch.float32, torch.float64) or not len(words):
        return None
    rows, shortcuts = _rows(x), _rows(shortcut.to(x.dtype))
    if popcount := _popcount():
        weights = _laid_out(popcount, words, x.shape[-1])
        y = popcount.projection(rows, weights, scale, bias, shortcuts, slope, offset, shift)
    else:
        y = _scaled_product(rows, words, scale, shift)
        for part in _pieces(y):
            y[part] = reference.activate(y[part].add_(bias), shortcuts[part], slope, offset)
    return y.view(*x.shape[:-1], len(words))


def _real_product(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    with _backend.no_autocast(x):
        return affine(F.linear(x, _unpacked(words, x.shape[-1], x.dtype)), scale, bias)


def _signs_product(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if popcount := _popcount():
        return popcount.linear(x, _laid_out(popcount, words, x.shape[-1]), scale, bias)
    y = _scaled_product(x, words, scale)
    return y if bias is None else y.add_(bias)


def _scaled_product(x: Tensor, words: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """`sign(x + shift) W^T * scale`, rounded once, by PyTorch alone."""
    whole = _takes_int8(len(x))
    signs = torch.empty_like(x, dtype=torch.int8 if whole else x.dtype)
    for part in _pieces(x):
        signs[part] = torch.sign(x[part] if shift is None else x[part] + shift)
    if not whole:
        return _real_product(signs, words, scale, None)
    weight = _derived(words, ("int8", x.shape[-1]), lambda: _Int8Weight(words, x.shape[-1]))
    return weight.products(signs, scale) if x.dtype == torch.float32 else weight.products(signs).to(x.dtype).mul_(scale)


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that stay in the caches while several operators pass over them."""
    step = max(1, CHUNK_BYTES * torch.get_num_threads() // max(1, rows.shape[1] * rows.itemsize))
    return (slice(first, first + step) for first in range(0, len(rows), step))


class _Int8Weight:
    """Weights of +1 and -1 in oneDNN's layout for 8-bit integers."""

    def __init__(self, words: Tensor, length: int) -> None:
        self.packed = torch.ops.onednn.qlinear_prepack(unpack_signs(words, length, torch.int8), None)
        self.ones, self.zeros = torch.ones(len(words)), torch.zeros(len(words), dtype=torch.int64)

    def products(self, signs: Tensor, scale: Tensor | None = None) -> Tensor:
        """Of int8 `(M, K)`: `(M, N)` float32, exact, and rounded once after `scale` `(N,)` float32."""
        scale = self.ones if scale is None else scale.contiguous()
        return torch.ops.onednn.qlinear_pointwise(
            signs, 1.0, 0, self.packed, scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )


def _laid_out(popcount: ModuleType, words: Tensor, length: int) -> Any:
    return _derived(words, ("popcount", length), lambda: popcount.Weights(words, length))


def _unpacked(words: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    return _derived(words, (length, dtype), lambda: unpack_signs(words, length, dtype))


def _derived(words: Tensor, name: Any, make: Callable[[], Any]) -> Any:
    """The value of `make()` for the present content of `words`."""
    version = 0 if words.is_inference() else words._version
    values = _kept.setdefault(words, {})
    if name not in values or values[name][0] != version:
        values[name] = version, make()
    return values[name][1]


def _takes_int8(rows: int) -> bool:
    """Whether products of so many rows of 8-bit integers can be had, and are faster than those of float32."""
    if not rows or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    return rows >= FEW_ROWS or "AVX512" in torch.backends.cpu.get_cpu_capability()


@functools.cache
def _popcount() -> ModuleType | None:
    try:
        return importlib.import_module(f"{__package__}.popcount")
    except ImportError as error:
        _backend.say_once(f"binary products without counting bits ({error}): pip install striate[binary] is faster")
        return None
