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

from .layout import dense, like, rows
from .reference import Neuron, exact_inverse

CHUNK_BYTES = 1 << 20  # of one potential, per thread; 0.5 to 2 MB measured alike, 0.25 MB is 1.2 times slower


def lif(x: Tensor, neuron: Neuron) -> Tensor:
    """See `striate.ops.lif`."""
    return _Lif.apply(x, neuron)


class _Lif(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, neuron: Neuron) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.neuron = neuron
        return forward(x, neuron)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return backward(grad, x, ctx.neuron), None


def forward(x: Tensor, neuron: Neuron) -> Tensor:
    """Spikes in the layout of `dense(x)`."""
    x = dense(x)
    spikes = torch.empty_like(x)
    for currents, fired in _chunks(x, spikes):
        _charge_and_fire(currents, neuron, fired)
    return spikes


def backward(grad: Tensor, x: Tensor, neuron: Neuron) -> Tensor:
    """Gradient of `x` in the layout of `dense(x)`."""
    x = dense(x)
    grad_x = torch.empty_like(x)
    spikes = potentials = torch.empty(0)
    for currents, grads, out in _chunks(x, like(grad, x), grad_x):
        if spikes.shape != currents.shape:
            spikes, potentials = torch.empty_like(currents), torch.empty_like(currents)
        _charge_and_fire(currents, neuron, spikes, potentials)
        _through_time(grads, spikes, potentials, neuron, out)
    return grad_x


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Views `(T, n)` of a few neurons of each dense tensor `(T, ...)`."""
    flat = [rows(t) for t in tensors]
    step = max(1, CHUNK_BYTES * torch.get_num_threads() // flat[0].element_size())
    for i in range(0, flat[0].shape[1], step):
        yield [t[:, i : i + step] for t in flat]


def _charge_and_fire(currents: Tensor, neuron: Neuron, spikes: Tensor, potentials: Tensor | None = None) -> None:
    """Fill `spikes` and, if given, `potentials` before the reset, all `(T, n)`."""
    v = torch.full_like(currents[0], neuron.initial)
    spare = torch.empty_like(v)
    for t, current in enumerate(currents):
        h = v if potentials is None else potentials[t]
        _charge(v, current, neuron, spare, h)
        torch.ge(h, neuron.threshold, out=spikes[t])
        if t == len(currents) - 1:
            return
        if neuron.reset is None:
            torch.sub(h, spikes[t], alpha=neuron.threshold, out=v)
            continue
        torch.addcmul(h, h, spikes[t], value=-1.0, out=v)
        if neuron.reset:
            v.add_(spikes[t], alpha=neuron.reset)


def _charge(v: Tensor, current: Tensor, neuron: Neuron, spare: Tensor, out: Tensor) -> None:
    """Fill `out`, which may be `v`; overwrites `spare`."""
    if neuron.tau is None:
        torch.add(v, current, out=out)
        return
    excess = v - neuron.reset if neuron.reset else v
    change = torch.sub(current, excess, out=spare) if neuron.decay_input else torch.neg(excess, out=spare)
    if exact_inverse(neuron.tau):  # one operator divides and adds
        torch.add(v, change, alpha=1 / neuron.tau, out=out)
    else:
        torch.add(v, change.div_(neuron.tau), out=out)
    if not neuron.decay_input:
        out.add_(current)


def _through_time(grads: Tensor, spikes: Tensor, potentials: Tensor, neuron: Neuron, out: Tensor) -> None:
    """Fill `out` with the gradient of the currents; overwrites `spikes` and `potentials`.

    The gradient of a potential before the reset is that of its spike times the slope of the surrogate, plus a `share`
    of that of the next one. Factors that are the same everywhere wait until the end.
    """
    jump = None  # by which a spike changes the potential
    if not neuron.detach_reset:
        jump = potentials.new_tensor(-neuron.threshold) if neuron.reset is None else neuron.reset - potentials
    smooth, scale = _smooth(potentials.sub_(neuron.threshold), neuron)
    share = None if neuron.reset is None else spikes.neg_().add_(1.0)
    if jump is not None:
        change = _times_slope(jump, smooth, neuron, torch.empty_like(smooth))
        share = torch.add(1.0 if share is None else share, change, alpha=scale)
    decay = 1.0 if neuron.tau is None else 1 - 1 / neuron.tau
    parts = _times_slope(grads, smooth, neuron, smooth)
    for t in range(len(parts) - 2, -1, -1):
        if share is None:
            parts[t].add_(parts[t + 1], alpha=decay)
        else:
            parts[t].addcmul_(parts[t + 1], share[t], value=decay)
    torch.mul(parts, scale / neuron.tau if neuron.tau is not None and neuron.decay_input else scale, out=out)


def _smooth(u: Tensor, neuron: Neuron) -> tuple[Tensor, float]:
    """What `_times_slope` needs of the surrogate at `u`, in its place, and a factor that is still missing there."""
    if neuron.surrogate == "sigmoid":
        return u.mul_(neuron.alpha).sigmoid_(), neuron.alpha
    return u.mul_(math.pi / 2 * neuron.alpha).square_().add_(1.0), neuron.alpha / 2


def _times_slope(t: Tensor, smooth: Tensor, neuron: Neuron, out: Tensor) -> Tensor:
    """Fill `out` with `t` times the derivative of the spike by the potential, without the factor of `_smooth`."""
    if neuron.surrogate == "sigmoid":
        return torch.ops.aten.sigmoid_backward.grad_input(t, smooth, grad_input=out)
    return torch.div(t, smooth, out=out)
