"""Comparisons that several test files use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from striate.train.measure import saved_bytes as saved_bytes


class _LeaveUnset(TorchFunctionMode):
    """Skip what fills tensors in place: on the meta device it changes nothing, and runs in Python."""

    INITIALISERS = ("constant_", "kaiming_uniform_", "normal_", "uniform_")  # of nn.init, where they are overridable
    STEPS = ("add_", "clamp_", "div_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_")
    FILLING = frozenset([getattr(nn.init, n) for n in INITIALISERS] + [getattr(Tensor, n) for n in STEPS])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.device.type == "meta":
                return tensor
        return func(*args, **kwargs)


@contextlib.contextmanager
def outline() -> Iterator[None]:
    """Tensors of shapes alone, on the meta device: for what does not depend on their values."""
    with _LeaveUnset(), torch.device("meta"):
        yield


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
