"""Neurons in the order of memory: what lies there without gaps needs no copy, in whatever order its axes are."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """`x` `(T, ...)` if its time steps lie one after the other and have no gaps, otherwise a contiguous copy.

    `torch.empty_like` of either has the same strides.
    """
    steps, *axes = _axes(x)
    size = 1
    for stride, n in sorted(axes):
        if stride != size:
            return x.contiguous()
        size *= n
    return x if steps in ((size, x.shape[0]), (0, 1)) else x.contiguous()


def like(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the layout of a `dense` tensor `x` of the same shape: itself if it has it already."""
    return t if _axes(t) == _axes(x) else torch.empty_like(x, dtype=t.dtype).copy_(t)


def rows(x: Tensor) -> Tensor:
    """A view `(T, neurons)` of a `dense` tensor."""
    neurons = x[0].numel()
    return x.as_strided((x.shape[0], neurons), (neurons, 1))


def _axes(x: Tensor) -> list[tuple[int, int]]:
    """Strides and sizes; the time axis first, `(0, 1)` if it has one step, then the others of more than one element."""
    sizes = list(zip(x.stride(), x.shape, strict=True))
    steps = sizes[0] if x.shape[0] != 1 else (0, 1)
    return [steps, *(axis for axis in sizes[1:] if axis[1] != 1)]
