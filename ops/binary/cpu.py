"""Eager products of packed signs on a CPU.

With numba, bits are counted. Without it, signs are multiplied as 8-bit integers by oneDNN, which is fast on CPUs that
have instructions for that (VNNI, AMX), and as floating-point numbers where PyTorch is built without oneDNN. Both keep
an unpacked copy of the weights, as do products of binary weights and real numbers, for as long as the words exist.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _backend
from . import reference
from .reference import affine, unpack_signs

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
    with _backend.no_autocast(x):
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
    popcount = _popcount()
    if popcount is None or x.dtype not in (torch.float32, torch.float64):
        return None
    weights = _laid_out(popcount, words, x.shape[-1])
    y = popcount.projection(_rows(x), weights, scale, bias, _rows(shortcut.to(x.dtype)), slope, offset, shift)
    return y.view(*x.shape[:-1], len(words))


def _real_product(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return affine(F.linear(x, _unpacked(words, x.shape[-1], x.dtype)), scale, bias)


def _signs_product(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if popcount := _popcount():
        return popcount.linear(x, _laid_out(popcount, words, x.shape[-1]), scale, bias)
    if not _has_int8():
        return _real_product(torch.sign(x), words, scale, bias)
    weight = _derived(words, ("int8", x.shape[-1]), lambda: _Int8Weight(words, x.shape[-1]))
    products = weight.products(torch.sign(x).to(torch.int8)).to(x.dtype).mul_(scale)
    return products if bias is None else products.add_(bias)


class _Int8Weight:
    """Weights of +1 and -1 in oneDNN's layout for 8-bit integers."""

    def __init__(self, words: Tensor, length: int) -> None:
        self.packed = torch.ops.onednn.qlinear_prepack(unpack_signs(words, length, torch.int8), None)
        self.ones, self.zeros = torch.ones(len(words)), torch.zeros(len(words), dtype=torch.int64)

    def products(self, signs: Tensor) -> Tensor:
        """Of int8 `(M, K)`: `(M, N)` float32, exact."""
        return torch.ops.onednn.qlinear_pointwise(
            signs, 1.0, 0, self.packed, self.ones, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
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


def _has_int8() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


@functools.cache
def _popcount() -> ModuleType | None:
    try:
        return importlib.import_module(f"{__package__}.popcount")
    except ImportError as error:
        _backend.say_once(f"binary products without counting bits ({error}): pip install striate[binary] is faster")
        return None
