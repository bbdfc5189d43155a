"""Spiking neurons over all time steps: leaky and plain integrate-and-fire, and the integer ("multispike") neuron."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import _backend
from . import cpu, reference, triton

SURROGATES = {"sigmoid": 4.0, "atan": 2.0}  # and their usual sharpness
_PATHS: dict[str, Any] = {"reference": reference, "cpu": cpu, "triton": triton}


def lif(
    x: Tensor,
    *,
    tau: float | None = 2.0,
    threshold: float = 1.0,
    reset: float | None = 0.0,
    initial: float = 0.0,
    decay_input: bool = True,
    detach_reset: bool = True,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
) -> Tensor:
    """Spikes of (leaky) integrate-and-fire neurons; nothing outlives the call.

    With the potential `V`, at first `initial`, each step charges `H = V + (X - V) / tau` (`decay_input`), or
    `H = V - V / tau + X`, or without a leak `H = V + X`; fires `S = 1` where `H >= threshold`; and resets to `reset`
    where it fired, or with None subtracts the threshold there. The GPU kernels compute in float32 whatever the dtype;
    elsewhere float16 and bfloat16 are rounded at every step.

    Args:
        x: `(T, ...)` input currents, floating point; T time steps, at least 1. A layout such as channels last, with
            the time steps one after the other, is read as it is.
        tau: time constant, more than 1; None for no leak (an IF neuron).
        threshold: of firing.
        reset: potential after a spike; None for a soft reset, which subtracts the threshold.
        detach_reset: no gradient through the reset.
        surrogate: derivative of the spike by the potential, with `u = H - threshold`: `sigmoid`, that of
            `1 / (1 + exp(-alpha u))`, or `atan`, that of `atan(pi / 2 alpha u) / pi`.
        alpha: sharpness of the surrogate; default 4 for `sigmoid`, 2 for `atan`.

    Returns:
        `(T, ...)` zeros and ones in the dtype of `x`.

    Raises:
        ValueError: for arguments outside their range.
    """
    if x.ndim < 1 or x.shape[0] < 1 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be a floating-point tensor (T, ...) of at least one step")
    if tau is not None and not tau > 1:
        raise ValueError(f"tau={tau} must be more than 1, or None for no leak")
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate={surrogate!r} is unknown; use one of {', '.join(SURROGATES)}")
    alpha = SURROGATES[surrogate] if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} must be positive and finite")
    neuron = reference.Neuron(tau, threshold, reset, initial, decay_input, detach_reset, surrogate, alpha)
    return _PATHS[_backend.choose("lif", x, lambda: triton.obstacle(x))].lif(x, neuron)


def multispike(x: Tensor, *, levels: int = 4, step: float | None = None, slope: float | None = None) -> Tensor:
    """Integer neurons: `round(clamp(levels * x, 0, levels))` spikes at once, times `step`; halves round up.

    The gradient is `slope` strictly inside the range and 0 outside. The GPU kernels compute in float32 whatever the
    dtype; elsewhere float16 and bfloat16 are rounded after every operator.

    Args:
        x: any shape, floating point.
        levels: most spikes.
        step: value of one spike; default `1 / levels`.
        slope: default `levels * step`, the mean slope.

    Raises:
        ValueError: if `levels` is less than 1.
    """
    if levels < 1:
        raise ValueError(f"levels={levels} must be at least 1")
    step = 1 / levels if step is None else step
    slope = levels * step if slope is None else slope
    path = _backend.choose("multispike", x, lambda: triton.obstacle(x))
    return (triton if path == "triton" else reference).multispike(x, levels, step, slope)


__all__ = ["lif", "multispike"]
