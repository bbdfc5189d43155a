"""Comparisons that several test files use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from striate.train.measure import saved_bytes as saved_bytes


def relative(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of `want`; infinite for other shapes and for NaN."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-300)
    return float(error) if torch.isfinite(error) else float("inf")


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Output of `function(*inputs)` and the gradient of a fixed random projection of it for every tensor input."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out, *torch.autograd.grad(out, wanted, probe, materialize_grads=True)]


def worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest relative difference of two lists of tensors."""
    return max(relative(a, b) for a, b in zip(got, want, strict=True))
