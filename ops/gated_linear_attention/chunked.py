"""Gated linear attention in chunks of tokens: matrix products inside a chunk, one state from chunk to chunk.

With b_t the sum of the log gates from the start of a chunk to token t, tokens of one chunk see each other with the
decay exp(b_t - b_s), and earlier chunks through a state with exp(b_t). The former factors into exp(b_t) / exp(b_s), but
that overflows where a chunk decays by more than a float holds; such gates take a slower form that exponentiates only
differences, which are never positive. Both directions share one pass over the chunks: their scores are the two
triangles of one matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend

CHUNK = 64
SMALL_CHUNK = 16  # of the unfactored form, whose cost per token grows with the chunk
LIMIT = 60.0  # exp(60) is 1e26: far from overflow when multiplied with activations, as exp(-60) is from underflow

Pair = tuple[Tensor, Tensor]  # the same of the forward and of the backward direction


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Tensor:
    """See `striate.ops.gated_linear_attention`."""
    tensors = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q * scale, k, v, gate, reverse_gate)]
    with _backend.no_autocast(q):  # which would round the sums of gates and the states
        return _both_directions(*tensors).to(v.dtype)


def _both_directions(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor) -> Tensor:
    b, n, heads, _ = q.shape
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    size = SMALL_CHUNK if traced else _chunk(n)
    decays = _decays(gate, reverse_gate, size)
    exact = traced or any(map(_too_strong, _ends(decays)))
    if exact and not traced:
        size = SMALL_CHUNK
        decays = _decays(gate, reverse_gate, size)
    q, k, v = (_to_chunks(t, size) for t in (q, k, v))
    queries, keys, scores = (_exact if exact else _factored)(q, k, decays)
    out = torch.bmm(scores, v)
    chunks = (n + size - 1) // size
    for i, end in enumerate(_ends(decays)):
        gains = torch.bmm(keys[i].transpose(1, 2), v).unflatten(0, (b, chunks, heads))
        states = (_scan_at_once if traced else _scan)(gains, end.unflatten(0, (b, chunks, heads)), reverse=i == 1)
        out = torch.baddbmm(out, queries[i], states.flatten(0, 2))
    out = out.view(b, chunks, heads, size, v.shape[-1]).transpose(2, 3).flatten(1, 2)
    # a traced slice would be contiguous or not depending on the size
    return out.index_select(1, torch.arange(n, device=out.device)) if traced else out[:, :n]


def _too_strong(end: Tensor) -> bool:
    """Whether some chunk decays too far for factors; tensors without values are taken for harmless."""
    return end.device.type != "meta" and bool((end < -LIMIT).any())


def _chunk(n: int) -> int:
    """The largest chunk without padding, if it is not too small: 64, 56 and 49 tokens at 224 pixels."""
    return next((size for size in range(CHUNK, CHUNK // 2, -1) if n % size == 0), CHUNK)


def _to_chunks(x: Tensor, size: int) -> Tensor:
    """`(B, N, heads, D)` -> `(B * chunks * heads, size, D)`, padded at the end with zeros: no decay, nothing added."""
    b, n, heads, dim = x.shape
    chunks = (n + size - 1) // size
    x = F.pad(x, (0, 0, 0, 0, 0, chunks * size - n)).reshape(b, chunks, size, heads, dim)
    return x.transpose(2, 3).flatten(0, 2)


def _decays(gate: Tensor, reverse_gate: Tensor, size: int) -> Pair:
    """Log decays from the start of a chunk through each token, and from its end back through each token."""
    sum_before = gate.new_ones(size, size).tril_()  # as a product several times faster than cumsum, and without flips
    return sum_before @ _to_chunks(gate, size), sum_before.t() @ _to_chunks(reverse_gate, size)


def _ends(decays: Pair) -> Pair:
    """Of decays `(…, size, K)` those through the whole chunk, `(…, K)`."""
    return decays[0][:, -1], decays[1][:, 0]


def _factored(q: Tensor, k: Tensor, decays: Pair) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Queries decayed since the state that enters the chunk, keys decayed until the state that leaves it, and scores
    `(B * chunks * heads, size, size)`, whose diagonal counts in both directions."""
    decays = decays[0].exp(), decays[1].exp()
    queries = [q * decay for decay in decays]
    keys = [k / decay for decay in decays]
    forward, backward = (torch.bmm(queries[i], keys[i].transpose(1, 2)) for i in (0, 1))
    lower = q.new_ones(q.shape[1], q.shape[1]).tril_()
    scores = forward.mul_(lower).addcmul_(backward, lower.t())  # a third of the time of tril, triu and their sum
    return queries, [key * end[:, None] for key, end in zip(keys, _ends(decays), strict=True)], scores


def _exact(q: Tensor, k: Tensor, decays: Pair) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The same without factors: every pair's own decay, `size` times the work."""
    before, after = (decay[:, :, None] - decay[:, None] for decay in decays)
    t = torch.arange(q.shape[1], device=q.device)
    decay = torch.where((t[:, None] >= t)[..., None], before, after)
    scores = (q[:, :, None] * k[:, None] * decay.exp()).sum(-1)
    scores = scores * (1 + torch.eye(q.shape[1], dtype=q.dtype, device=q.device))
    keys = [k * (end[:, None] - decay).exp() for decay, end in zip(decays, _ends(decays), strict=True)]
    return [q * decay.exp() for decay in decays], keys, scores


def _scan(gains: Tensor, ends: Tensor, reverse: bool) -> Tensor:
    """The state that enters each chunk, `(B, chunks, heads, K, V)`, of `state = exp(end) * state + gain`."""
    steps = list(zip(gains.unbind(1), ends.exp()[..., None].unbind(1), strict=True))
    state, states = torch.zeros_like(gains[:, 0]), []
    for gain, factor in reversed(steps) if reverse else steps:
        states.append(state)
        state = torch.addcmul(gain, factor, state)
    return torch.stack(states[::-1] if reverse else states, 1)


def _scan_at_once(gains: Tensor, ends: Tensor, reverse: bool) -> Tensor:
    """The same without a loop over the number of chunks, which a traced program may not know."""
    if reverse:
        return _scan_at_once(gains.flip(1), ends.flip(1), reverse=False).flip(1)
    index = torch.arange(gains.shape[1], device=gains.device)
    later = (index[:, None] > index)[..., None, None]  # (chunk, other chunk, 1, 1)
    through = ends.cumsum(1)  # decay from the first chunk through each
    decay = ((through - ends)[:, :, None] - through[:, None]).masked_fill(~later, float("-inf"))
    return torch.einsum("bcehk,behkv->bchkv", decay.exp(), gains)
