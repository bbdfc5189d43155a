"""Gated linear attention: chunks against the recurrence, and the recurrence against sums over all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import relative, run
from striate.ops import gated_linear_attention
from striate.ops.gated_linear_attention import chunked, reference

EXACT = 1e-12
STRENGTHS = [0.1, 3.0, 60.0]  # of the gates: factored scores; a chunk decays beyond float32; a token nearly does


def inputs(n: int, strength: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    q, k, gate, back = (torch.randn(2, n, 3, 4, generator=generator, dtype=dtype) for _ in range(4))
    v = torch.randn(2, n, 3, 5, generator=generator, dtype=dtype)
    gate, back = (torch.nn.functional.logsigmoid(g) * strength for g in (gate, back))
    return [q, k, v, gate, back]


def by_pairs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, back: Tensor) -> Tensor:
    """Every pair of tokens with the product of the decays between them, one by one."""
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        for s in range(q.shape[1]):
            decay = gate[:, s + 1 : t + 1].sum(1) if s <= t else back[:, t:s].sum(1)
            weight = (q[:, t] * decay.exp() * k[:, s]).sum(-1) * 0.3 * (2 if s == t else 1)
            out[:, t] += weight[..., None] * v[:, s]
    return out


def op(*tensors: Tensor) -> Tensor:
    return gated_linear_attention(*tensors, scale=0.3)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_recurrence_is_the_sum_over_pairs(strength) -> None:
    tensors = inputs(9, strength)
    assert relative(reference.gated_linear_attention(*tensors, 0.3), by_pairs(*tensors)) < EXACT


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("n", [1, 15, 63, 64, 65, 98, 150])
def test_chunks_equal_the_recurrence_with_gradients(n, strength) -> None:
    tensors = inputs(n, strength)
    want = run(lambda *t: reference.gated_linear_attention(*t, 0.3), tensors)
    for a, b in zip(run(op, tensors), want, strict=True):  # not relative: a gate before the first token has gradient 0
        assert (a - b).abs().max() < EXACT * 10


@pytest.mark.parametrize("strength", STRENGTHS)
def test_traced_programs_compute_the_same(strength) -> None:
    tensors = inputs(70, strength)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert relative(compiled(*tensors), reference.gated_linear_attention(*tensors, 0.3)) < EXACT


@pytest.mark.parametrize("strength", STRENGTHS)
def test_float32_stays_finite_and_close(strength) -> None:
    exact = inputs(200, strength)
    tensors = [t.float().requires_grad_() for t in exact]
    out = op(*tensors)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors)
    assert relative(out, reference.gated_linear_attention(*exact, 0.3)) < 1e-5


def test_bfloat16_keeps_its_state_in_float32() -> None:
    exact = inputs(200, 0.1)
    got = op(*(t.bfloat16() for t in exact))
    want = reference.gated_linear_attention(*(t.bfloat16().double() for t in exact), 0.3)
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < 1e-2


def test_autocast_leaves_the_precision_of_the_input() -> None:
    exact = inputs(200, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op(*(t.float() for t in exact))
    assert got.dtype == torch.float32
    assert relative(got, reference.gated_linear_attention(*exact, 0.3)) < 1e-5


def lost_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked._scan
    monkeypatch.setattr(chunked, "_scan", lambda gains, ends, reverse: right(gains, ends * 0, reverse))


def shifted_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked._scan
    monkeypatch.setattr(chunked, "_scan", lambda *args, **kwargs: right(*args, **kwargs).roll(1, 1))


def single_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked._factored

    def wrong(q: Tensor, k: Tensor, decays: chunked.Pair) -> tuple[list[Tensor], list[Tensor], Tensor]:
        queries, keys, scores = right(q, k, decays)
        return queries, keys, scores - torch.diag_embed((q * k).sum(-1))

    monkeypatch.setattr(chunked, "_factored", wrong)


def always_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LIMIT", float("inf"))


@pytest.mark.parametrize("mutate", [lost_decay, shifted_chunks, single_diagonal])
def test_the_comparison_sees_a_wrong_chunk(mutate, monkeypatch) -> None:
    tensors = inputs(150, 0.1)
    want = reference.gated_linear_attention(*tensors, 0.3)
    assert relative(op(*tensors), want) < EXACT
    mutate(monkeypatch)
    assert relative(op(*tensors), want) > 1e-4


def test_factored_scores_would_overflow(monkeypatch) -> None:
    tensors = [t.float() for t in inputs(150, 60.0)]
    always_factored(monkeypatch)
    assert not op(*tensors).isfinite().all()


@pytest.mark.parametrize("index", range(5))
def test_shapes_that_do_not_fit_are_named(index) -> None:
    tensors = inputs(4, 0.1)
    tensors[index] = tensors[index][:, :3]
    with pytest.raises(ValueError, match=r"must be \(B, N, heads, K\).*\(2, 3, 3, "):
        op(*tensors)
