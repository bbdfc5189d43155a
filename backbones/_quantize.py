"""Weights of a few bits whose step sizes are learned (LSQ, arXiv 1902.08153)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def quantize(weight: Tensor, alpha: Tensor, bits: int = 4) -> Tensor:
    """Round `weight` to multiples of a step size: `round(clamp(weight / alpha, -2^(bits-1), 2^(bits-1) - 1)) * alpha`.

    Halves go to the even neighbour. The gradient passes straight through the rounding, and to `weight` only inside the
    range; that of `alpha` is divided by `sqrt(numel(weight) * (2^(bits-1) - 1))`.

    Args:
        weight: `(out, ...)`.
        alpha: `(out,)`, the step size of every output channel.
    """
    return _Quantize.apply(weight, alpha.view(-1, *[1] * (weight.ndim - 1)), bits)


class _Quantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, step: Tensor, bits: int) -> Tensor:
        low, high = _range(bits)
        return (weight / step).clamp(low, high).round() * step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        weight, step, ctx.bits = inputs
        ctx.save_for_backward(weight, step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, step = ctx.saved_tensors
        low, high = _range(ctx.bits)
        scaled = weight / step
        inside = (scaled >= low) & (scaled <= high)
        slope = scaled.clamp(low, high).round() - scaled * inside
        scale = 1 / math.sqrt(weight.numel() * high)
        grad_step = (grad * slope).sum(list(range(1, weight.ndim)), keepdim=True) * scale
        return grad * inside, grad_step, None


def _range(bits: int) -> tuple[int, int]:
    """Smallest and largest level."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


class Quantized(nn.Module):
    """What quantised layers have beyond the plain ones.

    Attributes:
        alpha: `(out,)` step sizes. They begin as `2 mean|weight| / sqrt(largest level)`, by the weights at construction
            and once more by those of the first forward in training.
        init_state: `(1,)`, not 0 after that forward.
    """

    weight: Tensor
    alpha: nn.Parameter
    init_state: Tensor

    def start(self, bits: int) -> None:
        """Add the step sizes."""
        self.bits, self.settled = bits, False
        self.alpha = nn.Parameter(self._initial_alpha())
        self.register_buffer("init_state", self.alpha.detach().new_zeros(1))

    def _initial_alpha(self) -> Tensor:
        weight = self.weight.detach()
        mean = weight.abs().mean().clamp_min(torch.finfo(weight.dtype).eps)  # a step of 0 has no levels
        return (2 * mean / math.sqrt(_range(self.bits)[1])).expand(len(weight)).clone()

    def quantized_weight(self) -> Tensor:
        """What the layer computes with."""
        if self.training and not self.settled:
            with torch.no_grad():
                self.alpha.copy_(self._initial_alpha())
                self.init_state.fill_(1)
            self.settled = True
        return quantize(self.weight, self.alpha, self.bits)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if (state := state_dict.get(f"{prefix}init_state")) is not None:
            self.settled = state.is_meta or bool(state.any())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class QuantizedLinear(Quantized, nn.Linear):
    """`nn.Linear` with quantised weights; made by `quantize_weights`."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantized_weight(), self.bias)


class QuantizedConv2d(Quantized, nn.Conv2d):
    """`nn.Conv2d` with quantised weights; made by `quantize_weights`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.quantized_weight(), self.bias)


_LAYERS: dict[type[nn.Module], type[Quantized]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}


def quantize_weights(model: nn.Module, bits: int = 4) -> None:
    """Make every linear layer and convolution of `model` a quantised one, in place; names of parameters stay.

    Raises:
        ValueError: if `bits` is less than 2, which leaves no level above 0.
    """
    if bits < 2:
        raise ValueError(f"bits={bits} must be at least 2: a sign, and one for the levels")
    for module in model.modules():
        if quantized := _LAYERS.get(type(module)):
            module.__class__ = quantized
            module.start(bits)  # type: ignore[operator]


def effective_weight(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The weight that `layer` computes with, quantised or not."""
    return quantize(layer.weight, layer.alpha, layer.bits) if isinstance(layer, Quantized) else layer.weight


def weight_sources(layer: nn.Linear | nn.Conv2d) -> list[Tensor]:
    """The parameters that `effective_weight` depends on."""
    return [layer.weight, layer.alpha] if isinstance(layer, Quantized) else [layer.weight]
