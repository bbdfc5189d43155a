"""The definition of the products of packed signs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import no_autocast

WORD = 64  # signs in one


def pack_signs(x: Tensor) -> Tensor:
    """See `striate.ops.pack_signs`."""
    bits = F.pad(x > 0, (0, -x.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    return (bits.long() << torch.arange(WORD, device=x.device)).sum(-1)  # the bits are disjoint: a sum is their union


def unpack_signs(words: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """See `striate.ops.unpack_signs`."""
    bits = (words[..., None] >> torch.arange(WORD, device=words.device)) & 1
    return (2 * bits.flatten(-2)[..., :length] - 1).to(dtype)


def packed_matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    """See `striate.ops.packed_matmul`."""
    signs = (unpack_signs(words, length, torch.float32) for words in (a, b))  # sums of up to 2^24 ones are exact
    return F.linear(*signs).to(torch.int32)


def binary_linear(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, binary_input: bool) -> Tensor:
    """See `striate.ops.binary_linear`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.sign(x).to(wide) if binary_input else x.to(wide)
    with no_autocast(x):
        y = F.linear(y, unpack_signs(words, x.shape[-1], wide))
    return affine(y, scale.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def affine(dots: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`dots * scale + bias`, rounded after each operator."""
    y = dots * scale
    return y if bias is None else y + bias


def activate(y: Tensor, shortcut: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """`prelu(y + shortcut) + offset`; changes `y` `(..., N)`."""
    y.unflatten(-1, (-1, shortcut.shape[-1])).add_(shortcut.unsqueeze(-2))
    return F.prelu(y.view(-1, y.shape[-1]), slope).view_as(y).add_(offset)


class NoGradient(torch.autograd.Function):
    """`y`, which came from `x` by a layer that has no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("binary_linear has no gradient: packed layers are for inference; train the unpacked model")
