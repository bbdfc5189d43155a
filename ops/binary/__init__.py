"""Binary operators: signs with the gradients of the papers, binary attention maps, and products of packed signs.

A packed sign is one bit of a 64-bit word, 1 for +1 and 0 for -1; the last word of a row is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from . import cpu, estimators, reference, triton

ESTIMATORS = ("clip", "polynomial")
_PATHS: dict[str, Any] = {"reference": reference, "cpu": cpu, "triton": triton}


def binary_sign(x: Tensor, estimator: str = "clip") -> Tensor:
    """Sign of `x`, 0 at 0, with an estimated gradient.

    `clip` passes the gradient where `|x| < 1` (arXiv 1602.02830, at the ends as BiViT has it); `polynomial` multiplies
    it by `2 - 2 |x|` there (Bi-Real Net, arXiv 1808.00278).

    Raises:
        ValueError: for another estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown; use one of {', '.join(ESTIMATORS)}")
    return estimators.Sign.apply(x, estimator)


def softmax_aware(scores: Tensor) -> Tensor:
    """Softmax-aware binarisation (BiViT, arXiv 2211.07091): 1 for keys with a quarter of the largest weight or more.

    Args:
        scores: `(..., keys)`.

    Returns:
        Zeros and ones like the softmax of `scores` over the keys, whose gradient they have.
    """
    return estimators.softmax_aware(scores)


def pack_signs(x: Tensor) -> Tensor:
    """Signs of `x` `(..., K)` as words `(..., ceil(K / 64))` of int64; what is not positive counts as -1."""
    return reference.pack_signs(x)


def unpack_signs(words: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Undo `pack_signs`: words `(..., ceil(length / 64))` -> +1 and -1 `(..., length)`.

    Raises:
        ValueError: if the words do not hold `length` signs.
    """
    _check_words("words", words, length)
    return reference.unpack_signs(words, length, dtype)


def packed_matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    """Products of packed signs: `length` less twice the number of bits that differ.

    Args:
        a: `(M, W)`, b: `(N, W)`, int64 words of `pack_signs`, `W = ceil(length / 64)`.

    Returns:
        `(M, N)` int32, the matrix product of the signs of `a` and the transposed ones of `b`.

    Raises:
        ValueError: if the words are no matrices or do not hold `length` signs.
    """
    for name, words in (("a", a), ("b", b)):
        _check_words(name, words, length)
        if words.ndim != 2:
            raise ValueError(f"{name} {tuple(words.shape)} must be a matrix of words (rows, ceil(length / 64))")
    path = _backend.choose("packed_matmul", a, lambda: "")
    return _PATHS[path].packed_matmul(a, b, length)


def binary_linear(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None = None, *, binary_input: bool = True
) -> Tensor:
    """Linear layer of packed binary weights: `sign(x) W^T * scale + bias`, or of `x` itself without `binary_input`.

    For inference: it has no gradient. Products of signs are exact, zeros of `x` counting as zeros. Scale and bias are
    applied in float32, or float64 if `x` is that, one after the other; the GPU kernels round once for both.

    Args:
        x: `(..., K)`, floating point.
        words: `(N, ceil(K / 64))`, the weights from `pack_signs`.
        scale: `(N,)`, in the dtype of `x`; bias: `(N,)` or None.

    Returns:
        `(..., N)` in the dtype of `x`.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        RuntimeError: in a backward.
    """
    _check_linear(x, words, scale=scale, bias=bias)
    path = _backend.choose("binary_linear", x, lambda: triton.obstacle(x))
    if path == "triton":  # whose operator refuses the gradient itself
        return triton.binary_linear(x, words, scale, bias, binary_input)
    return _refuse_gradient(lambda x: _PATHS[path].binary_linear(x, words, scale, bias, binary_input), x)


def binary_projection(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    slope: Tensor,
    offset: Tensor,
    shift: Tensor | None = None,
) -> Tensor:
    """A layer of BinaryViT (arXiv 2306.16678): `prelu(sign(x + shift) W^T * scale + bias + shortcut) + offset`.

    For inference, as `binary_linear`; every operator rounds, so that all paths but the GPU's agree to the last bit.

    Args:
        x, words, scale, bias: see `binary_linear`.
        shortcut: `(..., C)`, with N a multiple of C; it is repeated along the channels.
        slope, offset: `(N,)`; shift: `(K,)` or None.

    Returns:
        `(..., N)` in the dtype of `x`.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        RuntimeError: in a backward.
    """
    _check_linear(x, words, scale=scale, bias=bias, slope=slope, offset=offset)
    if shortcut.shape[:-1] != x.shape[:-1] or not shortcut.shape[-1] or words.shape[0] % shortcut.shape[-1]:
        raise ValueError(
            f"shortcut {tuple(shortcut.shape)} must be {(*x.shape[:-1], 'C')}, with C a divisor of {words.shape[0]}"
        )
    if shift is not None and shift.shape != x.shape[-1:]:
        raise ValueError(f"shift {tuple(shift.shape)} must be ({x.shape[-1]},), like the channels of x")
    path = _backend.choose("binary_projection", x, lambda: triton.obstacle(x))

    def compute(x: Tensor) -> Tensor:
        if path == "cpu":
            y = cpu.binary_projection(x, words, scale, bias, shortcut, slope, offset, shift)
            if y is not None:
                return y
        y = binary_linear(x if shift is None else x + shift, words, scale, bias)
        return reference.activate(y, shortcut, slope, offset)

    return _refuse_gradient(compute, x)


def _refuse_gradient(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`compute(x)`, with an error in place of its gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return compute(x)
    return reference.NoGradient.apply(compute(x.detach()), x)


def _check_linear(x: Tensor, words: Tensor, **vectors: Tensor | None) -> None:
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be a floating-point tensor (..., K)")
    _check_words("words", words, x.shape[-1])
    if words.ndim != 2:
        raise ValueError(f"words {tuple(words.shape)} must be a matrix (N, ceil(K / 64))")
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != words.shape[:1] or vector.dtype != x.dtype):
            raise ValueError(
                f"{name} {tuple(vector.shape)} {vector.dtype} must be ({words.shape[0]},) {x.dtype}, like words and x"
            )


def _check_words(name: str, words: Tensor, length: int) -> None:
    count = -(-length // reference.WORD)
    if words.dtype != torch.int64 or words.ndim < 1 or words.shape[-1] != count:
        raise ValueError(
            f"{name} {tuple(words.shape)} {words.dtype} cannot hold {length} signs: pack_signs gives int64 (…, {count})"
        )


__all__ = [
    "binary_linear",
    "binary_projection",
    "binary_sign",
    "pack_signs",
    "packed_matmul",
    "softmax_aware",
    "unpack_signs",
]
