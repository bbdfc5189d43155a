"""Gated linear attention as Triton kernels and as the operators `striate::gated_linear_attention(_backward)`.

Two launches (one where a single chunk holds every token, three where there are too few heads to fill a GPU otherwise):
states that enter the chunks, for both directions at once; the scan over segments of chunks; the outputs. The backward
pass saves the inputs alone and does the same, with the states of the gradients beside those of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from .._triton import DTYPES, tl, triton
from . import chunked, explicit, kernels

MAX_DIM = 128
PROGRAMS = 1024  # of the walk through the chunks: about eight per multiprocessor of the largest GPUs
MAX_SEGMENTS = 64
MIN_CHUNKS = 4  # of a segment
STATE_COLUMNS = 32  # value columns of one program of the walk
SLICE = 16  # key dims that the forward and backward kernels hold at once

Grads = explicit.Grads


class Launch(NamedTuple):
    """Tokens of a chunk and numbers of warps: of the walk through the chunks, and of the kernel after it."""

    chunk: int
    state_warps: int
    warps: int


# Forward and backward, by the padded value dim; chosen by compilation for each target, so that nothing spills.
_HALF = {
    32: (Launch(64, 4, 8), Launch(32, 4, 8)),
    64: (Launch(64, 4, 8), Launch(32, 4, 8)),
    128: (Launch(32, 4, 8), Launch(16, 4, 8)),
}
_FULL = {
    32: (Launch(64, 8, 8), Launch(16, 4, 4)),
    64: (Launch(64, 8, 8), Launch(16, 8, 8)),
    128: (Launch(32, 8, 8), Launch(16, 8, 8)),
}
_AMD = {
    32: (Launch(64, 4, 4), Launch(64, 4, 4)),
    64: (Launch(64, 4, 4), Launch(64, 4, 4)),
    128: (Launch(32, 4, 4), Launch(32, 4, 4)),
}
_NVIDIA = {torch.bfloat16: _HALF, torch.float16: _HALF, torch.float32: _FULL}
TABLE = {
    "sm_80": _NVIDIA,
    "sm_90": _NVIDIA,
    "sm_100": {**_NVIDIA, torch.float16: {**_HALF, 64: (Launch(64, 4, 8), Launch(16, 4, 4))}},
    "gfx": dict.fromkeys(DTYPES, _AMD),
}


class Plan:
    """How one call is divided: sizes, strides and constants that all its kernels take."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, backward: bool) -> None:
        self.b, self.n, self.heads, self.k = q.shape
        self.v = v.shape[-1]
        self.q, self.keys = _alike(q, k)
        self.gates = _alike(gate, reverse_gate)
        self.values = _triton.dense_channels(v)
        self.block_v = _triton.padded_dim(self.v)
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        table = TABLE[_triton.family(_triton.target(q.device))][dtype]
        self.stages = 2 if dtype.itemsize == 2 else 1  # of the walk; products of float32 take too many registers for 2
        self.launch = table[max(32, self.block_v)][backward]
        self.chunks = triton.cdiv(self.n, self.launch.chunk)
        wanted = triton.cdiv(PROGRAMS, 2 * self.b * self.heads)
        self.per_segment = max(triton.cdiv(self.chunks, min(wanted, MAX_SEGMENTS)), min(MIN_CHUNKS, self.chunks))
        self.segments = triton.cdiv(self.chunks, self.per_segment)
        self.constants: dict[str, Any] = dict(
            K=self.k,
            V=self.v,
            CHUNK=self.launch.chunk,
            DTYPE={torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype],
            PRECISION=_triton.precision(dtype),
        )
        self.levels = int(math.log2(self.launch.chunk))

    def sizes(self) -> tuple[int, ...]:
        return self.heads, self.n, self.chunks, self.segments, self.per_segment

    def states(self, kinds: int, dout: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The states that enter each chunk for `kinds` scans, and what `_entering` adds for the segment before."""
        if self.chunks == 1:
            nothing = self.q.new_empty(1, dtype=torch.float32)
            return nothing, nothing, nothing
        scans, segments = self.b * self.heads * kinds, self.segments if self.segments > 1 else 0
        states = self.q.new_empty(scans, self.chunks, self.k, self.v, dtype=torch.float32)
        decays = self.q.new_empty(scans, self.chunks if segments else 0, self.k, dtype=torch.float32)
        ends = self.q.new_empty(scans, segments, self.k, self.v, dtype=torch.float32)
        end_decays = self.q.new_empty(scans, segments, self.k, dtype=torch.float32)
        dout = self.values if dout is None else dout
        columns = triton.cdiv(self.v, STATE_COLUMNS)
        kernels._gated_linear_attention_state_kernel[(self.b * self.heads * self.segments, kinds, columns)](
            self.q, self.keys, self.values, dout, *self.gates, states, decays, ends, end_decays,
            *self.sizes(), *_strides(self.q), *_strides(self.values), *_strides(dout), *_strides(self.gates[0]),
            KINDS=kinds, BLOCK_K=_triton.padded_dim(self.k), BLOCK_V=STATE_COLUMNS, **self.constants,
            num_warps=self.launch.state_warps, num_stages=self.stages,
        )  # fmt: skip
        if segments:
            rows = 16
            kernels._gated_linear_attention_scan_kernel[(scans, triton.cdiv(self.k, rows))](
                ends, end_decays, segments, K=self.k, V=self.v, ROWS=rows, BLOCK_V=self.block_v, num_warps=4
            )
        return states, decays, ends


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one dtype that one set of strides describes: as they are when parts of one projection."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if x.stride() == y.stride() and x.stride(-1) == 1:
        return x, y
    return x.contiguous(), y.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def obstacle(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> str:
    """What keeps these arguments from the kernels, in a few words, or an empty string."""
    tensors = q, k, v, gate, reverse_gate
    if triton is None:
        return "Triton is not installed"
    if any(t.dtype not in DTYPES for t in tensors):
        return f"dtype {next(t.dtype for t in tensors if t.dtype not in DTYPES)}"
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        return f"head dims {q.shape[-1]} and {v.shape[-1]}, the largest is {MAX_DIM}"
    if not all(t.numel() for t in tensors):
        return "an empty tensor"
    if any(max(t.stride(1), t.shape[2] * t.shape[3]) * (t.shape[1] + 128) >= 2**31 for t in tensors):
        return "an image of 2^31 elements or more"
    return ""


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Tensor:
    """See `striate.ops.gated_linear_attention`."""
    return torch.ops.striate.gated_linear_attention(q, k, v, gate, reverse_gate, scale)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Tensor:
    """Output `(B, N, heads, V)` in the dtype of `v`."""
    plan = Plan(q, k, v, gate, reverse_gate, backward=False)
    out = v.new_empty(v.shape)
    with _triton.on_device(q.device):
        states = plan.states(2)
        kernels._gated_linear_attention_fwd_kernel[(plan.b * plan.heads * plan.chunks,)](
            plan.q, plan.keys, plan.values, *plan.gates, out, *states, scale,
            *plan.sizes(), *_strides(plan.q), *_strides(plan.values), *_strides(plan.gates[0]),
            **plan.constants, SLICE=SLICE, BLOCK_V=plan.block_v, LEVELS=plan.levels,
            num_warps=plan.launch.warps, num_stages=1,
        )  # fmt: skip
    return out


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float
) -> Grads:
    """Gradients of the five tensors, contiguous, in their dtypes."""
    plan = Plan(q, k, v, gate, reverse_gate, backward=True)
    dout = _triton.dense_channels(dout)
    dq, dk, dv, dgate, dreverse = (t.new_empty(t.shape) for t in (q, k, v, gate, reverse_gate))
    with _triton.on_device(q.device):
        states = plan.states(4, dout)
        kernels._gated_linear_attention_bwd_kernel[(plan.b * plan.heads * plan.chunks,)](
            plan.q, plan.keys, plan.values, *plan.gates, dout, dq, dk, dv, dgate, dreverse, *states, scale,
            *plan.sizes(), *_strides(plan.q), *_strides(plan.values), *_strides(dout), *_strides(plan.gates[0]),
            **plan.constants, SLICE=SLICE, BLOCK_V=plan.block_v, LEVELS=plan.levels,
            num_warps=plan.launch.warps, num_stages=1,
        )  # fmt: skip
    return dq, dk, dv, dgate, dreverse


@torch.library.custom_op("striate::gated_linear_attention", mutates_args=(), device_types="cuda")
def _forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Tensor:
    return launch_forward(q, k, v, gate, reverse_gate, scale)


@torch.library.custom_op("striate::gated_linear_attention_backward", mutates_args=(), device_types="cuda")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(dout, q, k, v, gate, reverse_gate, scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Grads:
    dq, dk, dv, dgate, dreverse = (t.new_empty(t.shape) for t in (q, k, v, gate, reverse_gate))
    return dq, dk, dv, dgate, dreverse


@_forward.register_kernel("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Tensor:
    run = launch_forward if _triton.interpreting() else chunked.gated_linear_attention
    return run(q, k, v, gate, reverse_gate, scale).contiguous()  # a graph exported on a GPU reloads here


@_backward.register_kernel("cpu")
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor, scale: float) -> Grads:
    run = launch_backward if _triton.interpreting() else explicit.backward
    return run(dout, q, k, v, gate, reverse_gate, scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.striate.gated_linear_attention_backward(dout, *ctx.saved_tensors, ctx.scale), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the Triton gated_linear_attention has no second derivative; set STRIATE_BACKEND=reference for one"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_no_second_derivative)


def configurations() -> list[tuple[str, Callable[[], Any]]]:
    """What registered models launch, as `(label, run on meta tensors)`: head dims, dtypes, one chunk or many."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found = []
    for name, dtype in dtypes.items():
        for key_dim, value_dim in ((16, 32), (32, 64)):
            for launch in (launch_forward, launch_backward):
                label = f"{name} key {key_dim} value {value_dim} {launch.__name__.removeprefix('launch_')}"
                found.append((label, _on_meta(launch, dtype, key_dim, value_dim)))
    return found


def _on_meta(launch: Callable[..., Any], dtype: torch.dtype, key_dim: int, value_dim: int) -> Callable[[], Any]:
    """Shapes of ViG-H and ViG at 896 pixels, with float32 gates as under autocast."""

    def run() -> Any:
        def empty(dim: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(1, 3136, 3, dim, dtype=dtype, device="meta")

        q, k, v = empty(key_dim, dtype), empty(key_dim, dtype), empty(value_dim, dtype)
        gates = [empty(key_dim, torch.float32) for _ in range(2)]
        dout = [torch.empty_like(v)] if launch is launch_backward else []
        return launch(*dout, q, k, v, *gates, key_dim**-0.5)

    return run
