"""Eager window attention on a CPU.

One gather brings the tokens into window order (rolling and permuting would copy the map two or three times), each kind
of window is one fused attention call, one gather puts the result back. Training saves the gathered q, k, v and nothing
of size tokens x window: the backward recomputes the probabilities, a few windows at a time so that they stay in cache.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..partition import Size, gather_groups, group_order, scatter_groups
from ..position import expand_bias, relative_index

CHUNK_BYTES = 4 << 20  # scores held at once by the backward: two such buffers fit the caches of current cores


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    scale: float | Tensor,
    cosine: bool,
    pad: Tensor | None,
) -> Tensor:
    """See `striate.ops.window_attention`."""
    b, h, w, _ = qkv.shape
    order = group_order(b, (h, w), window, shift, interval, mask_padding)
    tokens = window[0] * window[1]
    rows = gather_groups(qkv, order, pad).view(-1, tokens, 3, num_heads, qkv.shape[-1] // (3 * num_heads))
    if cosine:
        q, k, v = rows.unbind(2)
        rows = torch.stack((F.normalize(q, dim=-1), F.normalize(k, dim=-1), v), 2)
    if isinstance(scale, Tensor):
        factor = torch.stack((scale, torch.ones_like(scale), torch.ones_like(scale)))
        rows, scale = rows * factor[..., None].to(rows.dtype), 1.0
    scores = _added_scores(bias, order.mask, window, rows.dtype)
    if scores is not None and scores.requires_grad and torch.is_grad_enabled():
        out = _BiasedAttention.apply(rows, scores, order.counts, scale)
    else:
        out = _attend(rows, scores, order.counts, scale)
    return scatter_groups(out.flatten(0, 1), order, (b, h, w))


def _added_scores(bias: Tensor | None, mask: Tensor | None, window: Size, dtype: torch.dtype) -> Tensor | None:
    """Bias plus mask for each kind of window: `(kinds, heads, N, N)`, `(kinds, 1, N, N)` or None."""
    if bias is None:
        return None if mask is None else mask[:, None].to(dtype)
    full = expand_bias(bias, window, _relative_index(window))[None]
    return (full if mask is None else full + mask[:, None]).to(dtype)


@functools.lru_cache(maxsize=32)
def _relative_index(window: Size) -> Tensor:
    with torch.inference_mode(False):
        return relative_index(window, torch.device("cpu"))


def _attend(rows: Tensor, scores: Tensor | None, counts: list[int], scale: float) -> Tensor:
    """Attention of gathered q, k, v `(G, N, 3, heads, D)`, kind by kind: `(G, N, heads * D)`."""
    outs = []
    for kind, part in enumerate(rows.split(counts)):
        q, k, v = part.permute(2, 0, 3, 1, 4)
        mask = None if scores is None else scores[kind : kind + 1]
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class _BiasedAttention(torch.autograd.Function):
    """Fused attention whose additive scores are learned: the fused CPU backward has no gradient for them."""

    @staticmethod
    def forward(ctx, rows: Tensor, scores: Tensor, counts: list[int], scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, scores)
        ctx.counts, ctx.scale = counts, scale
        return _attend(
            rows, scores.detach(), counts, scale
        )  # a mask that wants a gradient would rule out the fused kernel

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        rows, scores = ctx.saved_tensors
        _, n, _, heads, dim = rows.shape
        grad_rows, grad_scores = torch.empty_like(rows), torch.zeros_like(scores)
        grad = grad.view(-1, n, heads, dim)
        step = max(1, CHUNK_BYTES // (heads * n * n * rows.element_size()))
        start = 0
        for kind, count in enumerate(ctx.counts):
            for i in range(start, start + count, step):
                part = slice(i, min(i + step, start + count))
                _biased_backward(rows[part], scores[kind], grad[part], ctx.scale, grad_rows[part], grad_scores[kind])
            start += count
        return grad_rows, grad_scores, None, None


def _biased_backward(
    rows: Tensor, scores: Tensor, grad: Tensor, scale: float, grad_rows: Tensor, grad_scores: Tensor
) -> None:
    """Gradients of a few windows: writes `grad_rows` `(G, N, 3, heads, D)`, adds to `grad_scores` `(heads, N, N)`."""
    g, n, _, heads, dim = rows.shape
    q, k, v = rows.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)
    grad = grad.transpose(1, 2).reshape(g * heads, n, dim)
    added = scores.expand(g, heads, n, n).reshape(g * heads, n, n)
    prob = torch.baddbmm(added, q, k.transpose(1, 2), alpha=scale).softmax(-1)
    # masked by -100, probabilities are subnormal numbers, which make a product several times slower
    prob = F.threshold(prob, torch.finfo(prob.dtype).tiny, 0.0, inplace=True)
    grad_prob = torch.bmm(grad, v.transpose(1, 2))
    grad_score = torch._softmax_backward_data(grad_prob, prob, -1, prob.dtype)
    grad_scores += grad_score.view(g, heads, n, n).sum(0)
    grad_score.mul_(scale)
    out = grad_rows.permute(2, 0, 3, 1, 4)
    out[0] = torch.bmm(grad_score, k).view(g, heads, n, dim)
    out[1] = torch.bmm(grad_score.transpose(1, 2), q).view(g, heads, n, dim)
    out[2] = torch.bmm(prob.transpose(1, 2), grad).view(g, heads, n, dim)
