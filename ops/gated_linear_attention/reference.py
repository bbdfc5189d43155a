"""The definition of bidirectional gated linear attention (ViG, arXiv 2405.18425; GLA, arXiv 2312.06635)."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Tensor:
    """See `striate.ops.gated_linear_attention`."""
    forward = _scan(q, k, v, gate, scale)
    backward = _scan(q.flip(1), k.flip(1), v.flip(1), reverse_gate.flip(1), scale)
    return forward + backward.flip(1)


def _scan(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float) -> Tensor:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = (scale q_t)^T S_t, token by token."""
    b, n, heads, dim = k.shape
    state = v.new_zeros(b, heads, dim, v.shape[-1])
    out = []
    for t in range(n):
        state = gate[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(((scale * q[:, t])[..., None, :] @ state).squeeze(-2))
    return torch.stack(out, 1)
