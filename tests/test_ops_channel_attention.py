"""Channel-group attention against loops over heads and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import relative
from striate.ops import channel_attention
from striate.ops.channel_attention import cpu

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


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_loops(path, monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", path)
    qkv = torch.randn(2, 7, 3 * HEADS * DIM, dtype=torch.float64)
    assert relative(channel_attention(qkv, num_heads=HEADS), by_loops(qkv, DIM**-0.5)) < 1e-13
    assert relative(channel_attention(qkv, num_heads=HEADS, scale=0.3), by_loops(qkv, 0.3)) < 1e-13
    assert relative(channel_attention(qkv, num_heads=HEADS), by_loops(qkv, 7**-0.5)) > 1e-3


def test_gradients() -> None:
    qkv = torch.randn(2, 5, 3 * HEADS * DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: channel_attention(x, num_heads=HEADS, scale=0.3), (qkv,))


def test_autocast_leaves_the_precision_of_the_input() -> None:
    qkv = torch.randn(2, 7, 3 * HEADS * DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = channel_attention(qkv, num_heads=HEADS)
    assert got.dtype == torch.float32
    assert relative(got, by_loops(qkv.double(), DIM**-0.5)) < 1e-5


def test_no_subnormal_weights() -> None:
    k = torch.linspace(0, 30, 2 * 20).view(1, 2, 20)
    unclean = (k.transpose(1, 2) @ k).mul(0.2).softmax(-1)
    tiny = torch.finfo(torch.float32).tiny
    assert ((unclean > 0) & (unclean < tiny)).any()
    weights = cpu._weights(k, k, 0.2)
    assert not ((weights > 0) & (weights < tiny)).any()
    assert torch.equal(weights[weights > 0], unclean[unclean >= tiny])


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"qkv \(1, 3, 10\).*multiple of num_heads=3"):
        channel_attention(torch.randn(1, 3, 10), num_heads=HEADS)
