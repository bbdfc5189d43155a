"""The definition of the spiking neurons (spikingjelly's formulas; surrogates as in Spikformer, arXiv 2209.15425)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Neuron(NamedTuple):
    """The arguments of `striate.ops.lif`, and its defaults."""

    tau: float | None = 2.0
    threshold: float = 1.0
    reset: float | None = 0.0
    initial: float = 0.0
    decay_input: bool = True
    detach_reset: bool = True
    surrogate: str = "sigmoid"
    alpha: float = 4.0


def exact_inverse(tau: float) -> bool:
    """Whether dividing by `tau` is multiplying by its inverse, to the last bit: for powers of two."""
    return math.frexp(tau)[0] == 0.5


def lif(x: Tensor, neuron: Neuron) -> Tensor:
    """See `striate.ops.lif`."""
    potential = torch.full_like(x[0], neuron.initial)
    spikes = []
    for current in x.unbind():
        potential = _charge(potential, current, neuron)
        spike = _fire(potential - neuron.threshold, neuron)
        spikes.append(spike)
        fired = spike.detach() if neuron.detach_reset else spike
        if neuron.reset is None:
            potential = potential - fired * neuron.threshold
        else:
            potential = (1 - fired) * potential + fired * neuron.reset
    return torch.stack(spikes)


def _charge(potential: Tensor, current: Tensor, neuron: Neuron) -> Tensor:
    if neuron.tau is None:
        return potential + current
    if neuron.decay_input:
        return potential + (current - (potential - (neuron.reset or 0.0))) / neuron.tau
    return potential - (potential - (neuron.reset or 0.0)) / neuron.tau + current


def _fire(u: Tensor, neuron: Neuron) -> Tensor:
    """One where `u >= 0`; the gradient is that of a smooth step."""
    spike = (u >= 0).to(u.dtype)
    if neuron.surrogate == "sigmoid":
        smooth = torch.sigmoid(neuron.alpha * u)
    else:
        smooth = torch.atan(math.pi / 2 * neuron.alpha * u) / math.pi
    return spike.detach() + (smooth - smooth.detach())


def multispike(x: Tensor, levels: int, step: float, slope: float) -> Tensor:
    """See `striate.ops.multispike`."""
    smooth = torch.where(between(x, levels), x, 0) * slope
    return count(x.detach(), levels, step) + (smooth - smooth.detach())


def count(x: Tensor, levels: int, step: float) -> Tensor:
    """The spikes of `multispike`."""
    return torch.floor((x * levels).clamp(0, levels) + 0.5) * step


def between(x: Tensor, levels: int) -> Tensor:
    """Where `multispike` has a slope."""
    scaled = x * levels
    return (scaled > 0) & (scaled < levels)
