"""Gated linear attention in chunks of tokens: matrix products inside a chunk, one state from chunk to chunk.

With b_t the sum of the log gates from the start of a chunk to token t, tokens of one chunk see each other with the
decay exp(b_t - b_s), and earlier chunks through a state with exp(b_t). The former factors into exp(b_t) exp(-b_s), but
exp(-b_s) overflows where a chunk decays by more than a float holds; such gates take a slower form that exponentiates
only differences, which are never positive. Both directions share one pass: their score matrices are the two triangles
of one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
SMALL_CHUNK = 16  # of the unfactored form, whose cost per token grows with the chunk
LIMIT = 60.0  # exp(60) is 1e26: far from overflow when multiplied with activations, as exp(-60) is from underflow


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Tensor:
    """See `striate.ops.gated_linear_attention`."""
    n, dtype = q.shape[1], v.dtype
    tensors = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q * scale, k, v, gate, reverse_gate)]
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    size = SMALL_CHUNK if traced or _overflows(tensors[3], tensors[4]) else CHUNK
    q, k, v, gate, reverse_gate = (_to_chunks(t, size) for t in tensors)
    before = gate.cumsum(-2)  # (B, heads, chunks, size, K): decay from the start of the chunk through each token
    after = reverse_gate.flip(-2).cumsum(-2).flip(-2)  # and from its end back through each token
    scores = _factored_scores(q, k, before, after) if size == CHUNK else _exact_scores(q, k, before, after)
    forward, backward = _states(k, v, before, after, traced)
    out = scores @ v + (q * before.exp()) @ forward + (q * after.exp()) @ backward
    out = out.flatten(2, 3)
    # a traced slice would be contiguous or not depending on the size
    out = out.index_select(2, torch.arange(n, device=out.device)) if traced else out[:, :, :n]
    return out.transpose(1, 2).to(dtype)


def _to_chunks(x: Tensor, size: int) -> Tensor:
    """`(B, N, heads, D)` -> `(B, heads, chunks, size, D)`, padded at the end with zeros: no decay, nothing added."""
    b, n, heads, dim = x.shape
    chunks = (n + size - 1) // size
    return F.pad(x, (0, 0, 0, 0, 0, chunks * size - n)).reshape(b, chunks, size, heads, dim).permute(0, 3, 1, 2, 4)


def _overflows(*gates: Tensor) -> bool:
    """Whether some chunk decays too far for factored scores."""
    return any(bool((_to_chunks(g.detach(), CHUNK).sum(-2) < -LIMIT).any()) for g in gates)


def _factored_scores(q: Tensor, k: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Scores `(…, size, size)` of both directions; the diagonal counts in both."""
    forward = (q * before.exp()) @ (k * (-before).exp()).transpose(-2, -1)
    backward = (q * after.exp()) @ (k * (-after).exp()).transpose(-2, -1)
    return forward.tril_() + backward.triu_()


def _exact_scores(q: Tensor, k: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The same without factors: every pair's own decay, `size` times the work."""
    t = torch.arange(q.shape[-2], device=q.device)
    later = (t[:, None] >= t)[..., None]
    decay = torch.where(
        later, before[..., :, None, :] - before[..., None, :, :], after[..., :, None, :] - after[..., None, :, :]
    )
    scores = (q[..., :, None, :] * k[..., None, :, :] * decay.exp()).sum(-1)
    return scores * (1 + torch.eye(q.shape[-2], dtype=q.dtype, device=q.device))


def _states(k: Tensor, v: Tensor, before: Tensor, after: Tensor, traced: bool) -> tuple[Tensor, Tensor]:
    """State that enters each chunk from before and from behind: `(B, heads, chunks, K, V)` each."""
    ends = before[..., -1:, :], after[..., :1, :]
    added = [(k * (end - sums).exp()).transpose(-2, -1) @ v for end, sums in zip(ends, (before, after), strict=True)]
    # the backward direction runs through the chunks in reverse: flipped, both are one scan
    gains = torch.stack((added[0], added[1].flip(2)))
    decays = torch.stack((ends[0], ends[1].flip(2))).transpose(-2, -1)
    forward, backward = (_scan_at_once if traced else _scan)(gains, decays)
    return forward, backward.flip(2)


def _scan(gains: Tensor, decays: Tensor) -> Tensor:
    """Exclusive scan over dimension 3 of `state = exp(decay) * state + gain`."""
    state = torch.zeros_like(gains[:, :, :, 0])
    factors = decays.exp()
    states = []
    for i in range(gains.shape[3]):
        states.append(state)
        state = torch.addcmul(gains[:, :, :, i], factors[:, :, :, i], state)
    return torch.stack(states, 3)


def _scan_at_once(gains: Tensor, decays: Tensor) -> Tensor:
    """The same without a loop over the number of chunks, which a traced program may not know."""
    total = decays.squeeze(-1).cumsum(3)  # decay through each chunk
    entering = total - decays.squeeze(-1)
    chunk = torch.arange(gains.shape[3], device=gains.device)
    earlier = (chunk[:, None] > chunk)[..., None]
    decay = (entering[:, :, :, :, None] - total[:, :, :, None, :]).masked_fill(~earlier, float("-inf"))
    return torch.einsum("dbhcek,dbhekv->dbhckv", decay.exp(), gains)
