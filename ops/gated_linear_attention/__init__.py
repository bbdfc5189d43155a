"""Bidirectional gated linear attention: two gated recurrences over the tokens, computed in chunks."""

from __future__ import annotations

from torch import Tensor

from .. import _backend
from . import chunked, reference, triton


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, *, scale: float | None = None
) -> Tensor:
    """Sum of a forward and a backward gated linear attention over the same queries, keys and values.

    Per head, forward: `S_t = diag(exp(gate_t)) S_{t-1} + k_t v_t^T`, `o_t = (scale q_t)^T S_t`; backward the same from
    the last token to the first with `reverse_gate`. A gate decays what came before its token, which itself is counted
    undecayed in both directions. Time and memory are linear in the number of tokens.

    Args:
        q, k: `(B, N, heads, K)`.
        v: `(B, N, heads, V)`.
        gate, reverse_gate: `(B, N, heads, K)` logarithms of the decay, at most 0; however strong, nothing overflows.
        scale: factor of the queries; default `K ** -0.5`.

    Returns:
        `(B, N, heads, V)` in the dtype of `v`; states and decays are at least float32.

    Raises:
        ValueError: if shapes do not fit together.
    """
    if not q.shape == k.shape == gate.shape == reverse_gate.shape or q.ndim != 4 or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v, gate, reverse_gate))
        raise ValueError(f"q, k, gates must be (B, N, heads, K) and v (B, N, heads, V); got q, k, v, gates {shapes}")
    arguments = (q, k, v, gate, reverse_gate, q.shape[-1] ** -0.5 if scale is None else scale)
    path = _backend.choose("gated_linear_attention", q, lambda: triton.obstacle(*arguments))
    # the definition goes token by token, so that nothing but its name makes it run
    run = reference if _backend.forced_path() == "reference" else triton if path == "triton" else chunked
    return run.gated_linear_attention(*arguments)
