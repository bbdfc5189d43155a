"""Channel-group attention against loops over heads and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import relative
from striate.ops import channel_attention

HEADS, DIM = 3, 4


def by_loops(qkv: Tensor, scale: float) -> Tensor:
    b, n, c = qkv.shape
    out = torch.zeros(b, n, c // 3, dtype=qkv.dtype)
    for i in range(b):
        for head in range(HEADS):
            q, k, v = (qkv[i, :, part * c // 3 + head * DIM :][:, :DIM] for part in range(3))
            weights = torch.stack([(scale * (k[:, a, None] * v).sum(0)).softmax(0) for a in range(DIM)])
            for t in range(n):
                out[i, t, head * DIM : (head + 1) * DIM] = weights @ q[t]
    return out


def test_loops() -> None:
    qkv = torch.randn(2, 7, 3 * HEADS * DIM, dtype=torch.float64)
    assert relative(channel_attention(qkv, num_heads=HEADS), by_loops(qkv, DIM**-0.5)) < 1e-13
    assert relative(channel_attention(qkv, num_heads=HEADS, scale=0.3), by_loops(qkv, 0.3)) < 1e-13
    assert relative(channel_attention(qkv, num_heads=HEADS), by_loops(qkv, 7**-0.5)) > 1e-3


def test_gradients() -> None:
    qkv = torch.randn(1, 3, 3 * HEADS * DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: channel_attention(x, num_heads=HEADS), (qkv,), fast_mode=True)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"qkv \(1, 3, 10\).*multiple of num_heads=3"):
        channel_attention(torch.randn(1, 3, 10), num_heads=HEADS)
