"""Packed binary products on GPUs: launches of the Triton kernels, and the PyTorch operators around them.

Binary activations are packed by one kernel, which reads them once, and multiplied by another, which counts bits. Other
activations meet the weights in matrix instructions, unpacked in registers: never are they in memory but as bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from . import kernels, reference


class Tile(NamedTuple):
    """Rows and columns of the output that a program computes, its warps, and stages of its loads."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


PACK_ROWS, PACK_WORDS, PACK_WARPS = 8, 4, 4  # of a program of the packing: 16 elements a thread
COUNTING = Tile(64, 64, 4)  # of products of bits

PROGRAMS = 128  # about one per multiprocessor

# Of products of other activations by the bytes of an element, the first for outputs that give it `PROGRAMS` programs.
# Chosen by compiling for every target: the largest that spill nothing.
_HALF, _FULL = (Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)), (Tile(64, 64, 8, 2),)
TABLE: dict[str, dict[int, tuple[Tile, ...]]] = {
    "sm_80": {2: _HALF, 4: _FULL},
    "sm_90": {2: _HALF, 4: _FULL},
    "sm_100": {2: _HALF, 4: _FULL},
    "gfx": {2: _HALF, 4: _FULL},
}


def obstacle(x: Tensor) -> str:
    """What keeps the kernels from this input, or an empty string."""
    return "" if x.dtype in _triton.DTYPES else f"no kernel for {x.dtype}"


def packed_matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    """See `striate.ops.packed_matmul`."""
    return torch.ops.striate.packed_matmul(a, b, length)


def binary_linear(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, binary_input: bool) -> Tensor:
    """See `striate.ops.binary_linear`."""
    return torch.ops.striate.binary_linear(x, words, scale, bias, binary_input)


def launch_packed_matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    """Words `(M, W)` and `(N, W)` -> `(M, N)` int32."""
    out = a.new_empty(len(a), len(b), dtype=torch.int32)
    _count(a, None, None, b.contiguous(), None, None, out, length)
    return out


def launch_pack(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(M, K)` -> signs `(M, W)`, what is not zero `(M, W)`, both with rows side by side, and its number `(M,)`."""
    x = _triton.dense_channels(x)
    rows, columns = x.shape
    signs, nonzero = (x.new_empty(-(-columns // reference.WORD), rows, dtype=torch.int64) for _ in range(2))
    counts = x.new_empty(rows, dtype=torch.int32)
    if rows:
        with _triton.on_device(x.device):
            kernels._pack_signs_kernel[(-(-rows // PACK_ROWS),)](
                x, signs, nonzero, counts, rows, columns, x.stride(0),
                ROWS=PACK_ROWS, WORDS=PACK_WORDS, num_warps=PACK_WARPS,
            )  # fmt: skip
    return signs.T, nonzero.T, counts


def launch_binary_linear(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, binary_input: bool) -> Tensor:
    """See `striate.ops.binary_linear`; one launch, or two for a binary input."""
    flat = _triton.dense_channels(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    words, scale, bias = words.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous()
    out = x.new_empty(len(flat), len(words))
    if binary_input:
        _count(*launch_pack(flat), words, scale, bias, out, x.shape[-1])
    else:
        _multiply(flat, words, scale, bias, out)
    return out.view(*x.shape[:-1], len(words))


def _count(
    a: Tensor, nonzero: Tensor | None, counts: Tensor | None, b: Tensor, scale: Tensor | None, bias: Tensor | None,
    out: Tensor, length: int,
) -> None:  # fmt: skip
    if not out.numel():
        return
    with _triton.on_device(a.device):
        kernels._packed_matmul_kernel[_grid(out, COUNTING)](
            a, nonzero, counts, b, scale, bias, out, *out.shape, length, *a.stride(),
            ACTIVATIONS=nonzero is not None, BLOCK_M=COUNTING.rows, BLOCK_N=COUNTING.columns, num_warps=COUNTING.warps,
        )  # fmt: skip


def _multiply(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if not out.numel():
        return
    tile = tile_of(x, out)
    with _triton.on_device(x.device):
        kernels._binary_weight_linear_kernel[_grid(out, tile)](
            x, words.view(torch.int32), scale, bias, out, *out.shape, x.shape[1], x.stride(0),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, PRECISION=_triton.precision(x.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def tile_of(x: Tensor, out: Tensor) -> Tile:
    """How the product of activations `x` that are not binary is divided."""
    tiles = TABLE[_triton.family(_triton.target(x.device))][x.element_size()]
    return next((tile for tile in tiles if math.prod(_grid(out, tile)) >= PROGRAMS), tiles[-1])


def _grid(out: Tensor, tile: Tile) -> tuple[int, int]:
    return -(-out.shape[0] // tile.rows), -(-out.shape[1] // tile.columns)


# ------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("striate::packed_matmul", mutates_args=(), device_types="cuda")
def _packed_matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    return launch_packed_matmul(a, b, length)


@torch.library.custom_op("striate::binary_linear", mutates_args=(), device_types="cuda")
def _binary_linear(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, binary_input: bool) -> Tensor:
    return launch_binary_linear(x, words, scale, bias, binary_input)


@_packed_matmul.register_fake
def _(a: Tensor, b: Tensor, length: int) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)


@_binary_linear.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, binary_input: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


# A graph exported on a GPU reloads on a CPU, where the definition computes the same in float32.


@_packed_matmul.register_kernel("cpu")
def _(a: Tensor, b: Tensor, length: int) -> Tensor:
    return launch_packed_matmul(a, b, length) if _triton.interpreting() else reference.packed_matmul(a, b, length)


@_binary_linear.register_kernel("cpu")
def _(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, binary_input: bool) -> Tensor:
    if _triton.interpreting():
        return launch_binary_linear(x, words, scale, bias, binary_input)
    return reference.binary_linear(x, words, scale, bias, binary_input).contiguous()


def _no_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "layers of packed signs are for inference, they have no gradient; train the model before it is packed"
    )


_binary_linear.register_autograd(_no_derivative)


# ------------------------------------------------------------------------------------------------- what models launch


def configurations() -> list[tuple[str, Callable[[], Any]]]:
    """`(label, launch)` of every configuration that registered models use; `launch()` launches on meta tensors.

    Kernels take sizes as numbers, so that all multiples of 16 compile alike: the layers of DeiT, Swin and BinaryViT.
    """
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    plain = functools.partial(launch_packed_matmul, _words(1568, 384), _words(1536, 384), 384)
    found: list[tuple[str, Callable[[], Any]]] = [("packed_matmul forward", plain)]
    for dtype, name in names.items():
        found.append((f"{name} binary input forward", _layer(384, 1536, dtype, binary_input=True)))
        found.append((f"{name} real input 384 to 1536 forward", _layer(384, 1536, dtype, binary_input=False)))
        if dtype.itemsize == 2:  # too few programs for the large tile
            found.append((f"{name} real input 1536 to 384 forward", _layer(1536, 384, dtype, binary_input=False)))
    return found


def _words(rows: int, length: int) -> Tensor:
    return torch.empty(rows, -(-length // reference.WORD), dtype=torch.int64, device="meta")


def _layer(inputs: int, outputs: int, dtype: torch.dtype, binary_input: bool) -> Callable[[], Tensor]:
    """Launch of a layer of DeiT-S for 8 images."""
    x, scale = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((8, 196, inputs), (outputs,)))
    return functools.partial(launch_binary_linear, x, _words(outputs, inputs), scale, scale, binary_input)
