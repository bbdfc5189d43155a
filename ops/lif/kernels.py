"""Triton kernels of spiking neurons. `triton.py` launches them.

A program takes a block of neurons through all time steps; potentials never leave its registers. Tensors are
`(T, neurons)` in the order of memory. The arithmetic is that of the definition in float32, operator by operator, for
inputs of any dtype: spikes are those of the definition for the input in float32, to the last bit.

Time steps come in segments of `STEPS`, unrolled. The tensors of a segment are loaded before anything of it is stored,
since a load cannot pass a store.
"""

from __future__ import annotations

from .._triton import kernel, tl


@kernel
def _load(base, place, inside):
    return tl.load(base + place, mask=inside, other=0.0)


@kernel
def _store(base, place, value, inside):
    tl.store(base + place, value.to(base.dtype.element_ty), mask=inside)


@kernel
def _leaked(x, tau, DIVIDE: tl.constexpr):
    """`x / tau`; `tau` comes as its inverse where that is exact, which is as good and faster."""
    return tl.div_rn(x, tau) if DIVIDE else x * tau


@kernel
def _charge(potential, current, tau, rest, LEAK: tl.constexpr, DIVIDE: tl.constexpr):
    if LEAK == "none":
        charged = potential + current
    elif LEAK == "input":
        charged = potential + _leaked(current - (potential - rest), tau, DIVIDE)
    else:
        charged = potential - _leaked(potential - rest, tau, DIVIDE) + current
    return charged


@kernel
def _fire(charged, threshold):
    return tl.where(charged >= threshold, 1.0, 0.0)


@kernel
def _reset(charged, spikes, threshold, rest, HARD: tl.constexpr):
    return ((1.0 - spikes) * charged + spikes * rest) if HARD else (charged - spikes * threshold)


@kernel
def _slope(u, alpha, SURROGATE: tl.constexpr):
    """Derivative of the spike by the potential."""
    if SURROGATE == "sigmoid":
        decay = tl.exp(-tl.abs(alpha * u))  # of either sign's, which cannot overflow
        slope = alpha * decay / ((1.0 + decay) * (1.0 + decay))
    else:
        angle = 1.5707963267948966 * alpha * u
        slope = 0.5 * alpha / (1.0 + angle * angle)
    return slope


@kernel
def _step_back(
    grad_v, grad_s, charged, tau, threshold, rest, alpha,
    LEAK: tl.constexpr, DIVIDE: tl.constexpr, HARD: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    """Gradients of a current and of the potential before it, from those of the potential after it and of its spike."""
    if not DETACH:
        grad_s += grad_v * ((rest - charged) if HARD else -threshold)
    if HARD:
        grad_v *= 1.0 - _fire(charged, threshold)
    grad_v += grad_s * _slope(charged - threshold, alpha, SURROGATE)
    grad_current = grad_v
    if LEAK != "none":
        leaked = _leaked(grad_v, tau, DIVIDE)
        grad_v -= leaked
        if LEAK == "input":
            grad_current = leaked
    return grad_current, grad_v


@kernel
def _lif_fwd_kernel(
    x, spikes, neurons, tau, threshold, rest, initial,
    T: tl.constexpr, STEPS: tl.constexpr, LEAK: tl.constexpr, DIVIDE: tl.constexpr, HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Spikes of `BLOCK` neurons; reads `x` once and writes `spikes` once."""
    step = tl.cast(neurons, tl.int64)
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < neurons
    potential = tl.zeros((BLOCK,), tl.float32) + initial
    for first in range(0, T, STEPS):
        currents = ()
        for i in tl.static_range(STEPS):
            currents += (_load(x, lane + (first + i) * step, inside & (first + i < T)),)  # type: ignore[assignment]  # unrolled
        for i in tl.static_range(STEPS):
            charged = _charge(potential, currents[i].to(tl.float32), tau, rest, LEAK, DIVIDE)
            fired = _fire(charged, threshold)
            potential = _reset(charged, fired, threshold, rest, HARD)
            _store(spikes, lane + (first + i) * step, fired, inside & (first + i < T))


@kernel
def _lif_bwd_kernel(
    x, grad, grad_x, entering, neurons, tau, threshold, rest, initial, alpha,
    T: tl.constexpr, STEPS: tl.constexpr, LEAK: tl.constexpr, DIVIDE: tl.constexpr, HARD: tl.constexpr,
    DETACH: tl.constexpr, SURROGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the currents of `BLOCK` neurons, with the potentials computed again.

    Goes through all segments but the last, to leave in `entering` `(segments - 1, neurons)` the potential that enters
    the one after each; then from the last segment to the first: forward to the potentials of its steps, kept in
    registers, and back. Reads `grad` once and writes `grad_x` once. A single segment reads `x` once and leaves
    `entering` alone; several read `x` twice but for the last.
    """
    SEGMENTS: tl.constexpr = (T + STEPS - 1) // STEPS
    step = tl.cast(neurons, tl.int64)
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < neurons
    potential = tl.zeros((BLOCK,), tl.float32) + initial
    for segment in range(SEGMENTS - 1):
        for i in tl.static_range(STEPS):
            current = _load(x, lane + (segment * STEPS + i) * step, inside).to(tl.float32)
            charged = _charge(potential, current, tau, rest, LEAK, DIVIDE)
            potential = _reset(charged, _fire(charged, threshold), threshold, rest, HARD)
        _store(entering, lane + segment * step, potential, inside)
    if SEGMENTS > 1:
        tl.debug_barrier()  # loads below may be divided among threads in another way

    grad_v = tl.zeros((BLOCK,), tl.float32)  # of the potential after the reset
    for back in range(SEGMENTS):
        first = (SEGMENTS - 1 - back) * STEPS
        currents, grads = (), ()
        for i in tl.static_range(STEPS):
            there = inside & (first + i < T)
            currents += (_load(x, lane + (first + i) * step, there),)  # type: ignore[assignment]
            grads += (_load(grad, lane + (first + i) * step, there),)  # type: ignore[assignment]
        if SEGMENTS > 1:
            segment = SEGMENTS - 2 - back
            place = entering + lane + segment * step
            potential = tl.load(place, mask=inside & (segment >= 0), other=initial)
        potentials = ()
        for i in tl.static_range(STEPS):
            charged = _charge(potential, currents[i].to(tl.float32), tau, rest, LEAK, DIVIDE)
            potential = _reset(charged, _fire(charged, threshold), threshold, rest, HARD)
            potentials += (charged,)
        for i in tl.static_range(STEPS - 1, -1, -1):
            grad_current, grad_v = _step_back(
                grad_v, grads[i].to(tl.float32), potentials[i], tau, threshold, rest, alpha,
                LEAK, DIVIDE, HARD, DETACH, SURROGATE,
            )  # fmt: skip
            _store(grad_x, lane + (first + i) * step, grad_current, inside & (first + i < T))


@kernel
def _multispike_fwd_kernel(x, spikes, elements, levels, step, BLOCK: tl.constexpr):
    """Reads `x` once and writes `spikes` once, in the order of memory; NaN stays NaN."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    scaled = _load(x, place, inside).to(tl.float32) * levels
    scaled = tl.maximum(scaled, 0.0, propagate_nan=tl.PropagateNan.ALL)
    scaled = tl.minimum(scaled, levels, propagate_nan=tl.PropagateNan.ALL)
    _store(spikes, place, tl.floor(scaled + 0.5) * step, inside)


@kernel
def _multispike_bwd_kernel(x, grad, grad_x, elements, levels, slope, BLOCK: tl.constexpr):
    """Reads `x` and `grad` once and writes `grad_x` once."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    scaled = _load(x, place, inside).to(tl.float32) * levels
    grads = _load(grad, place, inside).to(tl.float32) * slope
    _store(grad_x, place, tl.where((scaled > 0.0) & (scaled < levels), grads, 0.0), inside)
