"""Eager window attention on a CPU.

A few windows at a time are gathered from the map (rolling and permuting would copy it two or three times), head by
head, and multiplied while they and their scores are in cache. The softmax goes without the maximum of each row, which
costs as much as the exponentials, as long as no row comes near the range of its numbers. Training saves the gathered
q, k, v, the log-sum-exp and nothing of size tokens x window: the backward finds the probabilities with one exponential.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from ..partition import Chunk, GroupOrder, Size, group_order, read_chunk, write_chunk
from ..position import relative_index

CHUNK_BYTES = 1 << 20  # scores held at once per thread: fewer are not worth their calls, more leave the caches
LOG2E = math.log2(math.e)  # scores are exponents of two, whose powers take half the time of those of e
LEAST_SUM, LARGEST_SUM = 2.0**-90, 2.0**100  # of a row: what underflows is below rounding, and nothing overflows


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
    order = group_order(qkv.shape[0], (qkv.shape[1], qkv.shape[2]), window, shift, interval, mask_padding)
    factors, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    most = CHUNK_BYTES * torch.get_num_threads() // (order.group_tokens**2 * _wide(qkv).itemsize)
    call = _Call(order, num_heads, window, factor, cosine, most)
    if torch.is_grad_enabled():
        return _Attention.apply(qkv, bias, pad, factors, call)
    return _attend(qkv, _kept_scores(bias, call, _wide(qkv)), pad, factors, call)[0]


class _Call(NamedTuple):
    """What an attention has besides tensors."""

    order: GroupOrder
    heads: int
    window: Size
    scale: float
    cosine: bool
    most: int  # matrices of scores in a chunk: the same in the backward, whatever its number of threads

    @property
    def matrices(self) -> int:
        """One per group and head."""
        return sum(self.order.counts) * self.heads

    def chunks(self, parts: int) -> list[Chunk]:
        return self.order.chunks(parts, self.heads, self.most)


class _Attention(torch.autograd.Function):
    """Attention of a map `(B, H, W, 3 * C)` with bias table, padding and a factor of the scores per head, if any."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, qkv: Tensor, bias: Tensor | None, pad: Tensor | None, factors: Tensor | None, call: _Call
    ) -> Tensor:
        added = _added_scores(bias, call, _wide(qkv))
        rows = qkv.new_empty(3 * call.matrices, call.order.group_tokens, qkv.shape[-1] // (3 * call.heads))
        out, lse = _attend(qkv, added, pad, factors, call, rows)
        ctx.save_for_backward(rows, lse, added, factors)
        ctx.call, ctx.shape = call, qkv.shape
        ctx.bias_dtype, ctx.pad_dtype = (None if t is None else t.dtype for t in (bias, pad))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        rows, lse, added, factors = ctx.saved_tensors
        call, (_, of_bias, of_pad, of_factors, _) = ctx.call, ctx.needs_input_grad
        sums = _Sums(
            torch.zeros_like(added[0]) if of_bias else None,
            lse.new_zeros(3, call.heads, rows.shape[-1]) if of_pad else None,
            lse.new_zeros(call.heads) if of_factors else None,
        )
        grad_qkv = _differentiate(grad, rows, lse, added, factors, call, sums).view(ctx.shape)
        grad_bias = None if sums.scores is None else _by_table_row(sums.scores, call.window).to(ctx.bias_dtype)
        grad_pad = None if sums.pad is None else sums.pad.flatten().to(ctx.pad_dtype)
        return grad_qkv, grad_bias, grad_pad, None if sums.factors is None else sums.factors.to(factors.dtype), None


class _Sums(NamedTuple):
    """Gradients that every chunk adds to, where they are wanted."""

    scores: Tensor | None  # (heads, N, N)
    pad: Tensor | None  # (3, heads, D)
    factors: Tensor | None  # (heads,)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to compute in: not every CPU has products of 16-bit numbers, and their sums need more digits."""
    return torch.promote_types(x.dtype, torch.float32)


def _added_scores(bias: Tensor | None, call: _Call, dtype: torch.dtype) -> Tensor | None:
    """Bias plus mask of each kind of group, as exponents of two: `(kinds, heads, N, N)`, or None without both."""
    mask, n = call.order.mask, call.order.group_tokens
    full = None if mask is None else (mask * LOG2E)[:, None].to(dtype)
    if bias is not None:
        of_heads = (bias.t().to(dtype) * LOG2E).index_select(1, _pairs(call.window)).view(-1, n, n)
        full = of_heads if full is None else of_heads + full
    return None if full is None else full.expand(len(call.order.counts), call.heads, n, n)


_scores_of = WeakTensorKeyDictionary()  # parameter -> what its scores were made of, and they


def _kept_scores(bias: Tensor | None, call: _Call, dtype: torch.dtype) -> Tensor | None:
    """`_added_scores`, made again for a parameter only when it or the call has changed.

    Its numbers are compared: `.data` changes them without a new version.
    """
    if not isinstance(bias, torch.nn.Parameter):
        return _added_scores(bias, call, dtype)
    mask, made_of = call.order.mask, (call.window, len(call.order.counts), dtype)
    old_mask, old_made_of, numbers, scores = _scores_of.get(bias, (None, None, None, None))
    if made_of != old_made_of or mask is not old_mask or not torch.equal(numbers, bias):
        scores = _added_scores(bias, call, dtype)
        _scores_of[bias] = mask, made_of, bias.detach().clone(), scores
    return scores


@functools.lru_cache(maxsize=32)
def _pairs(window: Size) -> Tensor:
    """Row of the bias table for every pair of tokens: `(N * N,)`."""
    with torch.inference_mode(False):
        return relative_index(window, torch.device("cpu")).flatten()


def _by_table_row(scores: Tensor, window: Size) -> Tensor:
    """Sum `(heads, N, N)` over the pairs of each row of the bias table: `(rows, heads)`."""
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    return scores.new_zeros(scores.shape[0], rows).index_add_(1, _pairs(window), scores.flatten(1)).t()


# ------------------------------------------------------------------------------------------------------ chunk by chunk


def _length(chunk: Chunk) -> int:
    return chunk.matrices.stop - chunk.matrices.start


def _parts(room: Tensor, count: int, parts: int = 3) -> Tensor:
    """The start of room for rows `(matrices, N, D)` as `(parts, count, N, D)`."""
    return room[: parts * count].view(parts, count, *room.shape[1:])


def _kept(rows: Tensor, chunk: Chunk) -> Tensor:
    """What training keeps of a chunk: all parts of it, after those of the chunks before."""
    return _parts(rows[3 * chunk.matrices.start :], _length(chunk))


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length one, as `F.normalize` makes them, and one over the lengths they had."""
    inverse = 1 / x.norm(dim=-1, keepdim=True).clamp_min_(1e-12)
    return x * inverse, inverse


def _of_matrices(factors: Tensor | None, chunk: Chunk, x: Tensor) -> Tensor | None:
    """Factors by head for every matrix of a chunk `x`, `(matrices, 1, 1)`, if there are any."""
    if factors is None:
        return None
    some = factors[chunk.heads].to(x.dtype)
    return some.repeat(len(x) // len(some))[:, None, None]


def _add_products(
    scores: Tensor, q: Tensor, k: Tensor, added: Tensor | None, call: _Call, chunk: Chunk, level: Tensor | None = None
) -> None:
    """Let `scores` be the products of queries and keys, plus what is added, less `level` `(matrices, N, 1)`."""
    if added is not None:
        bias = added[chunk.kind, chunk.heads]
        by_group = scores.view(-1, *bias.shape)
        if level is None:
            by_group.copy_(bias)
        else:
            torch.sub(bias, level.view(*by_group.shape[:3], 1), out=by_group)
    elif level is not None:
        scores.copy_(-level)
    beta = 0 if added is None and level is None else 1
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=beta, alpha=call.scale * LOG2E, out=scores)


def _powers_of_two(scores: Tensor, call: _Call, chunk: Chunk) -> Tensor:
    scores.exp2_()
    if call.order.masked[chunk.kind]:  # by -100: subnormal numbers make a product several times slower on many CPUs
        F.threshold(scores, torch.finfo(scores.dtype).tiny, 0.0, inplace=True)
    return scores


def _attend(
    qkv: Tensor,
    added: Tensor | None,
    pad: Tensor | None,
    factors: Tensor | None,
    call: _Call,
    rows: Tensor | None = None,
    bounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, W, C)` and log-sum-exp `(groups * heads, N, 1)` to the base 2; keeps q, k, v in `rows`, if given.

    Where sums leave the safe range, starts again `bounded`, which takes the maximum of every row off its scores.
    """
    dtype, n, dim = _wide(qkv), call.order.group_tokens, qkv.shape[-1] // (3 * call.heads)
    chunks, x = call.chunks(3), qkv.reshape(-1, dim)
    most = max(map(_length, chunks), default=0)
    read, of_scores = qkv.new_empty(3 * most, n, dim), qkv.new_empty(most, n, n, dtype=dtype)
    of_results = None if rows is None else qkv.new_empty(most, n, dim, dtype=dtype)
    out = qkv.new_empty(qkv.shape[:3].numel(), 1, call.heads, dim)
    sums = qkv.new_empty(call.matrices, n, 1, dtype=dtype)
    by_part = None if pad is None else pad.to(qkv.dtype).view(3, call.heads, dim)
    for chunk in chunks:
        count = _length(chunk)
        room = _parts(read, count)
        parts = room if rows is None else _kept(rows, chunk)
        read_chunk(x, chunk, parts, by_part)
        q, k, v = parts.to(dtype)
        if call.cosine:
            q, k = _unit(q)[0], _unit(k)[0]
        scale = _of_matrices(factors, chunk, q)
        q = q if scale is None else q * scale
        scores = of_scores[:count]
        _add_products(scores, q, k, added, call, chunk)
        top = scores.amax(-1, keepdim=True) if bounded else None
        prob = _powers_of_two(scores if top is None else scores.sub_(top), call, chunk)
        total = torch.sum(prob, -1, keepdim=True, out=sums[chunk.matrices])
        result = torch.bmm(prob, v, out=q if of_results is None else of_results[:count]).div_(total)
        write_chunk(result[None], chunk, out, room[1])
        if top is not None:
            total.log2_().add_(top)
    out = out.view(*qkv.shape[:3], call.heads * dim)
    if bounded or not sums.numel():
        return out, sums
    least, largest = sums.aminmax()
    if least.item() > LEAST_SUM and largest.item() < LARGEST_SUM:
        return out, sums.log2_() if rows is not None else sums
    return _attend(qkv, added, pad, factors, call, rows, bounded=True)


def _differentiate(
    grad: Tensor,
    rows: Tensor,
    lse: Tensor,
    added: Tensor | None,
    factors: Tensor | None,
    call: _Call,
    sums: _Sums,
) -> Tensor:
    """Gradient of the map from that of the output and what `_attend` keeps; the others are added to `sums`."""
    dtype, n, dim = lse.dtype, call.order.group_tokens, rows.shape[-1]
    chunks, of_out, x = call.chunks(3), call.chunks(1), grad.reshape(-1, dim)
    most = max(map(_length, chunks), default=0)
    of_do, of_grads = grad.new_empty(most, n, dim), grad.new_empty(3 * most, n, dim, dtype=dtype)
    of_scores, to_write = grad.new_empty(2 * most, n, n, dtype=dtype), rows.new_empty(3 * most, n, dim)
    grad_map = rows.new_empty(len(x) // call.heads, 3, call.heads, dim)
    for chunk, chunk_of_out in zip(chunks, of_out, strict=True):
        count = _length(chunk)
        q, k, v = _kept(rows, chunk).to(dtype)
        room = _parts(of_do, count, 1)
        read_chunk(x, chunk_of_out, room)
        do = room[0].to(dtype)
        if call.cosine:
            (q, q_inverse), (k, k_inverse) = _unit(q), _unit(k)
        scale = _of_matrices(factors, chunk, q)
        scaled = q if scale is None else q * scale
        scores, grad_score = _parts(of_scores, count, 2)
        _add_products(scores, scaled, k, added, call, chunk, lse[chunk.matrices])
        prob = _powers_of_two(scores, call, chunk)
        torch.bmm(do, v.transpose(1, 2), out=grad_score)
        torch._softmax_backward_data(grad_score, prob, -1, dtype, grad_input=grad_score)
        if sums.scores is not None:
            some = sums.scores[chunk.heads]
            some += grad_score.view(-1, *some.shape).sum(0)
        dq, dk, dv = grads = _parts(of_grads, count)
        torch.baddbmm(dq, grad_score, k, beta=0, alpha=call.scale, out=dq)
        torch.baddbmm(dk, grad_score.transpose(1, 2), scaled, beta=0, alpha=call.scale, out=dk)
        torch.bmm(prob.transpose(1, 2), do, out=dv)
        if sums.factors is not None:
            some = sums.factors[chunk.heads]
            some += (dq * q).view(-1, len(some), n * dim).sum((0, 2))
        if scale is not None:
            dq *= scale
        if call.cosine:
            for dx, unit, inverse in ((dq, q, q_inverse), (dk, k, k_inverse)):
                dx.sub_(unit * (dx * unit).sum(-1, keepdim=True)).mul_(inverse)
        if sums.pad is not None and chunk.padding is not None:
            padding, head = chunk.padding
            sums.pad.index_add_(1, head, grads.flatten(1, 2).index_select(1, padding))
        write_chunk(grads, chunk, grad_map, _parts(to_write, count))
    return grad_map
