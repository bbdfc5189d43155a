"""Spiking neurons on GPUs: launches of the Triton kernels, and the PyTorch operators around them.

Both passes read and write every element once for up to `MAX_STEPS` time steps. A longer backward reads its input
twice, but for the last steps, so that its registers suffice; see `kernels._lif_bwd_kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _triton
from . import cpu, kernels, reference
from .layout import dense, like
from .reference import Neuron, exact_inverse

MAX_STEPS = 16  # whose potentials the backward holds in registers
WARPS = 4
VECTOR = 16  # bytes that a thread loads at once
HELD = 384  # most bytes of inputs, gradients and float32 potentials in the registers of a backward thread


def obstacle(x: Tensor) -> str:
    """What keeps the kernels from this input, or an empty string."""
    return "" if x.dtype in _triton.DTYPES else f"no kernel for {x.dtype}"


def lif(x: Tensor, neuron: Neuron) -> Tensor:
    """See `striate.ops.lif`."""
    return torch.ops.striate.lif(x, *neuron)


def multispike(x: Tensor, levels: int, step: float, slope: float) -> Tensor:
    """See `striate.ops.multispike`."""
    return torch.ops.striate.multispike(x, levels, step, slope)


def segments(steps: int) -> tuple[int, int]:
    """Number and length of the runs of time steps that kernels hold at once."""
    count = -(-steps // MAX_STEPS)
    return count, -(-steps // count)


def launch_forward(x: Tensor, neuron: Neuron) -> Tensor:
    """Spikes in the layout of `dense(x)`."""
    x = dense(x)
    spikes = torch.empty_like(x)
    _run(kernels._lif_fwd_kernel, x[0].numel(), VECTOR, (x, spikes), _numbers(neuron), _constants(x, neuron))
    return spikes


def launch_backward(grad: Tensor, x: Tensor, neuron: Neuron) -> Tensor:
    """Gradient of `x` in the layout of `dense(x)`."""
    x = dense(x)
    grad_x, neurons, (count, steps) = torch.empty_like(x), x[0].numel(), segments(len(x))
    entering = x.new_empty(count - 1, neurons, dtype=torch.float32)
    vector = VECTOR
    while steps * (2 + 4 / x.element_size()) * vector > HELD:
        vector //= 2
    numbers = *_numbers(neuron), float(neuron.alpha)
    constants = _constants(x, neuron) | dict(DETACH=neuron.detach_reset, SURROGATE=neuron.surrogate)
    _run(kernels._lif_bwd_kernel, neurons, vector, (x, like(grad, x), grad_x, entering), numbers, constants)
    return grad_x


def launch_multispike(x: Tensor, levels: int, step: float) -> Tensor:
    """Spikes in the layout of `dense(x[None])`."""
    x = dense(x[None])[0]
    spikes = torch.empty_like(x)
    _run(kernels._multispike_fwd_kernel, x.numel(), VECTOR, (x, spikes), (float(levels), float(step)), {})
    return spikes


def launch_multispike_backward(grad: Tensor, x: Tensor, levels: int, slope: float) -> Tensor:
    """Gradient of `x` in the layout of `dense(x[None])`."""
    x = dense(x[None])[0]
    grad_x = torch.empty_like(x)
    tensors = x, like(grad[None], x[None]), grad_x
    _run(kernels._multispike_bwd_kernel, x.numel(), VECTOR, tensors, (float(levels), float(slope)), {})
    return grad_x


def _run(
    kernel: Any, count: int, vector: int, tensors: Sequence[Tensor], numbers: Sequence[float], constants: dict[str, Any]
) -> None:
    """Launch `kernel` for `count` elements of a time step, `vector` bytes of them per thread."""
    if not count:
        return
    x = tensors[0]
    lanes = 64 if _triton.family(_triton.target(x.device)) == "gfx" else 32
    block = vector // x.element_size() * lanes * WARPS
    with _triton.on_device(x.device):
        kernel[(-(-count // block),)](*tensors, count, *numbers, **constants, BLOCK=block, num_warps=WARPS)


def _numbers(neuron: Neuron) -> tuple[float, float, float, float]:
    """Time constant (its inverse if that is exact, 0 without a leak), threshold, potential at rest and at first."""
    tau = 0.0 if neuron.tau is None else neuron.tau if _divide(neuron) else 1 / neuron.tau
    return float(tau), float(neuron.threshold), float(neuron.reset or 0), float(neuron.initial)


def _divide(neuron: Neuron) -> bool:
    return neuron.tau is not None and not exact_inverse(neuron.tau)


def _constants(x: Tensor, neuron: Neuron) -> dict[str, Any]:
    leak = "none" if neuron.tau is None else "input" if neuron.decay_input else "state"
    return dict(T=len(x), STEPS=segments(len(x))[1], LEAK=leak, DIVIDE=_divide(neuron), HARD=neuron.reset is not None)


# ------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("striate::lif", mutates_args=(), device_types="cuda")
def _forward(
    x: Tensor,
    tau: float | None,
    threshold: float,
    reset: float | None,
    initial: float,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> Tensor:
    neuron = Neuron(tau, threshold, reset, initial, decay_input, detach_reset, surrogate, alpha)
    return launch_forward(x, neuron)


@torch.library.custom_op("striate::lif_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad: Tensor,
    x: Tensor,
    tau: float | None,
    threshold: float,
    reset: float | None,
    initial: float,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> Tensor:
    neuron = Neuron(tau, threshold, reset, initial, decay_input, detach_reset, surrogate, alpha)
    return launch_backward(grad, x, neuron)


@torch.library.custom_op("striate::multispike", mutates_args=(), device_types="cuda")
def _multispike(x: Tensor, levels: int, step: float, slope: float) -> Tensor:
    return launch_multispike(x, levels, step)


@torch.library.custom_op("striate::multispike_backward", mutates_args=(), device_types="cuda")
def _multispike_backward(grad: Tensor, x: Tensor, levels: int, slope: float) -> Tensor:
    return launch_multispike_backward(grad, x, levels, slope)


@_forward.register_fake
def _(x: Tensor, *numbers: Any) -> Tensor:
    return torch.empty_like(dense(x))


@_backward.register_fake
def _(grad: Tensor, x: Tensor, *numbers: Any) -> Tensor:
    return torch.empty_like(dense(x))


@_multispike.register_fake
def _(x: Tensor, levels: int, step: float, slope: float) -> Tensor:
    return torch.empty_like(dense(x[None])[0])


@_multispike_backward.register_fake
def _(grad: Tensor, x: Tensor, levels: int, slope: float) -> Tensor:
    return torch.empty_like(dense(x[None])[0])


# A graph exported on a GPU reloads on a CPU, where plain PyTorch computes the same in float32.


@_forward.register_kernel("cpu")
def _(x: Tensor, *numbers: Any) -> Tensor:
    neuron = Neuron(*numbers)
    return launch_forward(x, neuron) if _triton.interpreting() else cpu.forward(_wide(x), neuron).to(x.dtype)


@_backward.register_kernel("cpu")
def _(grad: Tensor, x: Tensor, *numbers: Any) -> Tensor:
    neuron = Neuron(*numbers)
    if _triton.interpreting():
        return launch_backward(grad, x, neuron)
    return cpu.backward(_wide(grad), _wide(x), neuron).to(x.dtype)


@_multispike.register_kernel("cpu")
def _(x: Tensor, levels: int, step: float, slope: float) -> Tensor:
    if _triton.interpreting():
        return launch_multispike(x, levels, step)
    x = dense(x[None])[0]
    return torch.empty_like(x).copy_(reference.count(_wide(x), levels, step))


@_multispike_backward.register_kernel("cpu")
def _(grad: Tensor, x: Tensor, levels: int, slope: float) -> Tensor:
    if _triton.interpreting():
        return launch_multispike_backward(grad, x, levels, slope)
    x = dense(x[None])[0]
    return torch.empty_like(x).copy_(torch.where(reference.between(_wide(x), levels), _wide(grad) * slope, 0))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.numbers = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.striate.lif_backward(grad, x, *ctx.numbers), *(None for _ in ctx.numbers)


def _differentiate_multispike(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,), (levels, _, slope) = ctx.saved_tensors, ctx.numbers
    return torch.ops.striate.multispike_backward(grad, x, levels, slope), None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the Triton spiking neurons have no second derivative; set STRIATE_BACKEND=reference for one")


_forward.register_autograd(_differentiate, setup_context=_save)
_multispike.register_autograd(_differentiate_multispike, setup_context=_save)
_backward.register_autograd(_no_second_derivative)
_multispike_backward.register_autograd(_no_second_derivative)


# ------------------------------------------------------------------------------------------------- what models launch

HALF, FULL = (torch.bfloat16, torch.float16), (torch.float32,)
_EVERY_OPTION = Neuron(3.0, 0.8, 0.1, 0.2, decay_input=False, detach_reset=False, surrogate="atan", alpha=2.0)
# Neurons and time steps of registered models, types; and the neuron that takes the most registers.
_MODELS: tuple[tuple[str, Neuron, int, tuple[torch.dtype, ...]], ...] = (
    ("lif", Neuron(), 4, HALF + FULL),  # Spikformer, Spike-driven Transformer
    ("lif", Neuron(), 1, HALF[:1]),
    ("lif", Neuron(), 16, HALF[:1] + FULL),  # event frames
    ("if with soft reset", Neuron(tau=None, reset=None, initial=0.5), 32, FULL),  # Masked Spiking Transformer
    ("lif with every option", _EVERY_OPTION, 16, HALF[:1]),
)


def configurations() -> list[tuple[str, Callable[[], Any]]]:
    """`(label, launch)` of every configuration that a registered model uses; `launch()` launches on meta tensors."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    found: list[tuple[str, Callable[[], Any]]] = []
    for kind, neuron, steps, dtypes in _MODELS:
        for dtype in dtypes:
            label, x = f"{names[dtype]} {kind} T {steps}", _example(steps, dtype)
            found.append((f"{label} forward", functools.partial(launch_forward, x, neuron)))
            found.append((f"{label} backward", functools.partial(launch_backward, x, x, neuron)))
    for dtype in HALF[:1] + FULL:  # QSD-Transformer
        label, x = f"{names[dtype]} multispike", _example(1, dtype)
        found.append((f"{label} forward", functools.partial(launch_multispike, x, 4, 0.25)))
        found.append((f"{label} backward", functools.partial(launch_multispike_backward, x, x, 4, 1.0)))
    return found


def _example(steps: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(steps, 8, 512, 14, 14, dtype=dtype, device="meta")
