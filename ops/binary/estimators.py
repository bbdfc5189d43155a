"""Signs and binary attention maps, with the gradients that stand in for theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sign(torch.autograd.Function):
    """Sign, 0 at 0, with a gradient from an estimator; see `striate.ops.binary_sign`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, estimator: str) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        x, ctx.estimator = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.estimator == "polynomial":
            return grad * (2 - 2 * x.abs()).clamp_min(0), None
        return grad * (x.abs() < 1), None


def softmax_aware(scores: Tensor) -> Tensor:
    """See `striate.ops.softmax_aware`."""
    prob = scores.softmax(-1)
    hit = (prob >= 0.25 * prob.amax(-1, keepdim=True)).to(prob.dtype)
    return hit.detach() + (prob - prob.detach())
