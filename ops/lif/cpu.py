"""Eager spiking neurons on a CPU.

The neurons are taken a few at a time through all time steps, forward and backward, so that their potentials stay in
cache. Training saves the input alone: the potentials are cheap to compute again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import Neuron

CHUNK_BYTES = 1 << 20  # of one potential; 0.5 to 1 MB measured alike, all neurons at once are 1.2 times slower


def lif(x: Tensor, neuron: Neuron) -> Tensor:
    """See `striate.ops.lif`."""
    return _Lif.apply(x, neuron)


class _Lif(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, neuron: Neuron) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.neuron = neuron
        spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
        for currents, out in _chunks(x, spikes):
            _charge_and_fire(currents, neuron, out)
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for currents, grads, out in _chunks(x, grad, grad_x):
            spikes, potentials = torch.empty_like(currents), torch.empty_like(currents)
            _charge_and_fire(currents, ctx.neuron, spikes, potentials)
            _through_time(grads, spikes, potentials, ctx.neuron, out)
        return grad_x, None


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Views `(T, n)` of a few neurons of each tensor `(T, ...)`; inputs are copied if they are not contiguous."""
    flat = [t.contiguous().flatten(1) if t.ndim > 1 else t.contiguous()[:, None] for t in tensors]
    step = max(1, CHUNK_BYTES // flat[0].element_size())
    for i in range(0, flat[0].shape[1], step):
        yield [t[:, i : i + step] for t in flat]


def _charge_and_fire(currents: Tensor, neuron: Neuron, spikes: Tensor, potentials: Tensor | None = None) -> None:
    """Fill `spikes` and, if given, `potentials` before the reset, all `(T, n)`."""
    v = torch.full_like(currents[0], neuron.initial)
    change = torch.empty_like(v)
    rest = neuron.reset or 0.0
    for t, current in enumerate(currents):
        if neuron.tau is None:
            v.add_(current)
        elif neuron.decay_input:
            torch.sub(current, v if rest == 0 else v - rest, out=change)
            v.add_(change.div_(neuron.tau))
        else:
            v.sub_(torch.div(v if rest == 0 else v - rest, neuron.tau, out=change)).add_(current)
        if potentials is not None:
            potentials[t] = v
        torch.ge(v, neuron.threshold, out=spikes[t])
        if neuron.reset is None:
            v.sub_(spikes[t], alpha=neuron.threshold)
        else:
            v.addcmul_(v, spikes[t], value=-1.0)
            if rest:
                v.add_(spikes[t], alpha=rest)


def _through_time(grads: Tensor, spikes: Tensor, potentials: Tensor, neuron: Neuron, out: Tensor) -> None:
    """Fill `out` with the gradient of the currents; overwrites `spikes` and `potentials`."""
    grad_v = torch.zeros_like(out[0])  # of the potential after the reset
    for t in range(len(grads) - 1, -1, -1):
        h, fired = potentials[t], spikes[t]
        slope = _surrogate(h - neuron.threshold, neuron)
        if neuron.detach_reset:
            grad_s = grads[t]
        elif neuron.reset is None:
            grad_s = grads[t] - grad_v * neuron.threshold
        else:
            grad_s = grads[t] + grad_v * (neuron.reset - h)
        if neuron.reset is not None:
            grad_v.addcmul_(grad_v, fired, value=-1.0)
        grad_h = grad_v.addcmul_(grad_s, slope)
        if neuron.tau is None:
            out[t] = grad_h
        elif neuron.decay_input:
            torch.div(grad_h, neuron.tau, out=out[t])
            grad_v.sub_(out[t])
        else:
            out[t] = grad_h
            grad_v.sub_(grad_h / neuron.tau)


def _surrogate(u: Tensor, neuron: Neuron) -> Tensor:
    """Derivative of the spike by the potential, in place of `u`."""
    if neuron.surrogate == "sigmoid":
        step = u.mul_(neuron.alpha).sigmoid_()
        return torch.addcmul(step, step, step, value=-1.0).mul_(neuron.alpha)
    return u.mul_(math.pi / 2 * neuron.alpha).square_().add_(1.0).reciprocal_().mul_(neuron.alpha / 2)
