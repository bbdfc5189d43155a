"""The backward of `triton.py` on CPU tensors, in plain PyTorch: a graph that was exported on a GPU trains here.

Autograd is off inside an operator, so the gradient is written out. Every pair of tokens of a chunk has its own decay,
the exponential of the sum of the gates between them: however strong one is, nothing overflows and others keep their
digits. The forward is that of `chunked`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from .chunked import SMALL_CHUNK, _scan, _to_chunks

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Grads:
    """See `launch_backward` in `triton.py`."""
    tensors = q, k, v, gate, reverse_gate
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (dout * scale, *tensors)]
    with _backend.no_autocast(q):
        *shared, dgate = _one_direction(*wide[:5])
        *others, dreverse = (t.flip(1) for t in _one_direction(*(t.flip(1) for t in (*wide[:4], wide[5]))))
    grads = [*(a + b for a, b in zip(shared, others, strict=True)), dgate, dreverse]
    dq, dk, dv, dgate, dreverse = (g.to(t.dtype).contiguous() for g, t in zip(grads, tensors, strict=True))
    return dq, dk, dv, dgate, dreverse


def _one_direction(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gate of the forward recurrence with a scale of 1."""
    b, n, heads, _ = q.shape
    dout, q, k, v, gate = (_to_chunks(t, SMALL_CHUNK) for t in (dout, q, k, v, gate))
    lower = q.new_ones(SMALL_CHUNK, SMALL_CHUNK).tril_()
    strict, between = lower.tril(-1), _between(q.dtype)
    decay = (between.t() @ gate).unflatten(1, lower.shape)  # (chunks, queries, keys, K)
    decay = decay.masked_fill(lower[..., None] == 0, float("-inf")).exp()
    since, until = (lower @ gate).exp(), (strict.t() @ gate).exp()  # from the start of a chunk, to its end
    end = gate.sum(1)

    def walk(gains: Tensor, reverse: bool) -> Tensor:
        gains, ends = (t.unflatten(0, (b, -1, heads)) for t in (gains, end))
        return _scan(gains, ends, reverse).flatten(0, 2)

    before = walk((k * until).transpose(1, 2) @ v, reverse=False)  # the state that enters a chunk
    behind = walk((q * since).transpose(1, 2) @ dout, reverse=True)  # the gradient of the state that leaves it
    slopes = (dout @ v.transpose(1, 2))[..., None] * decay
    dq, dk = since * (dout @ before.transpose(1, 2)), until * (v @ behind.transpose(1, 2))
    dgate = lower.t() @ (q * dq) + strict @ (k * dk) + (end.exp() * (before * behind).sum(-1))[:, None]
    dgate += between @ (slopes * q[:, :, None] * k[:, None]).flatten(1, 2)
    dq += torch.einsum("ctsk,csk->ctk", slopes, k)
    dk += torch.einsum("ctsk,ctk->csk", slopes, q)
    scores = torch.einsum("ctk,csk,ctsk->cts", q, k, decay)
    dv = scores.transpose(1, 2) @ dout + (k * until) @ behind
    dq, dk, dv, dgate = (
        t.unflatten(0, (b, -1, heads)).transpose(2, 3).flatten(1, 2)[:, :n] for t in (dq, dk, dv, dgate)
    )
    return dq, dk, dv, dgate


def _between(dtype: torch.dtype) -> Tensor:
    """Which gates lie between the tokens of a pair of a chunk: 1 or 0, `(gates, queries * keys)`."""
    t = torch.arange(SMALL_CHUNK)
    return ((t[:, None] >= t[:, None, None]) & (t < t[:, None, None])).flatten(1).to(dtype)
