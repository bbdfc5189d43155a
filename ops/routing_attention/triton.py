"""Routing attention on GPUs: launches of the Triton kernels, and the PyTorch operators around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton
from ..partition import Size, padded_size
from . import explicit, kernels

MAX_DIM = 128  # a wider head would need its vectors cut in parts
WORD = 64  # regions that one word of bits can name


class Tile(NamedTuple):
    """Most rows and columns of a tile of scores, and warps for a full one."""

    rows: int
    columns: int
    warps: int


Tiles = dict[int, Tile]  # by the head dim, padded to a power of two that is at least 32


def _by_dim(*tiles: tuple[int, int, int]) -> Tiles:
    return {dim: Tile(*tile) for dim, tile in zip((32, 64, 128), tiles, strict=True)}


# Chosen by compiling for every target: the largest that spill nothing. The kinds are 16-bit numbers, float32 as TF32,
# and float32 in full precision, which takes no matrix instructions on NVIDIA GPUs.
TILES: dict[str, dict[str, dict[str, Tiles]]] = {
    "sm_80": {
        "16-bit": {
            "fwd": _by_dim((128, 32, 8), (64, 64, 4), (64, 64, 8)),
            "bwd_q": _by_dim((64, 64, 4), (64, 64, 4), (64, 32, 8)),
            "bwd_kv": _by_dim((64, 64, 4), (64, 64, 8), (64, 32, 8)),
        },
        "tf32": {
            "fwd": _by_dim((64, 32, 8), (64, 32, 8), (32, 32, 8)),
            "bwd_q": _by_dim((64, 64, 8), (64, 32, 8), (16, 32, 4)),
            "bwd_kv": _by_dim((64, 32, 8), (32, 32, 8), (32, 32, 8)),
        },
        "ieee": {
            "fwd": _by_dim((64, 64, 8), (32, 32, 8), (16, 32, 4)),
            "bwd_q": _by_dim((32, 64, 8), (32, 32, 8), (16, 32, 4)),
            "bwd_kv": _by_dim((32, 32, 8), (32, 16, 4), (16, 32, 4)),
        },
    },
    "sm_90": {
        "16-bit": {
            "fwd": _by_dim((128, 64, 8), (128, 64, 8), (128, 32, 8)),
            "bwd_q": _by_dim((64, 64, 4), (64, 64, 4), (64, 64, 8)),
            "bwd_kv": _by_dim((64, 64, 4), (64, 64, 8), (64, 32, 8)),
        },
        "tf32": {
            "fwd": _by_dim((64, 64, 8), (64, 32, 8), (32, 32, 8)),
            "bwd_q": _by_dim((64, 64, 8), (64, 32, 8), (16, 32, 4)),
            "bwd_kv": _by_dim((64, 32, 8), (32, 32, 8), (32, 32, 8)),
        },
        "ieee": {
            "fwd": _by_dim((64, 64, 8), (32, 32, 8), (16, 16, 4)),
            "bwd_q": _by_dim((32, 64, 8), (32, 32, 8), (32, 16, 4)),
            "bwd_kv": _by_dim((16, 32, 4), (16, 32, 4), (16, 32, 4)),
        },
    },
    "sm_100": {
        "16-bit": {
            "fwd": _by_dim((128, 64, 8), (128, 64, 8), (128, 32, 8)),
            "bwd_q": _by_dim((64, 64, 4), (64, 64, 4), (64, 32, 4)),
            "bwd_kv": _by_dim((64, 64, 4), (64, 64, 8), (64, 32, 8)),
        },
        "tf32": {
            "fwd": _by_dim((64, 64, 8), (64, 32, 8), (32, 32, 8)),
            "bwd_q": _by_dim((64, 64, 8), (64, 32, 8), (16, 32, 4)),
            "bwd_kv": _by_dim((64, 32, 8), (32, 32, 8), (32, 32, 8)),
        },
        "ieee": {
            "fwd": _by_dim((32, 64, 8), (32, 32, 8), (16, 16, 4)),
            "bwd_q": _by_dim((32, 64, 8), (32, 32, 8), (32, 16, 4)),
            "bwd_kv": _by_dim((16, 32, 4), (16, 32, 4), (16, 32, 4)),
        },
    },
    "gfx": {
        "16-bit": {
            "fwd": _by_dim((128, 64, 8), (64, 64, 4), (64, 64, 8)),
            "bwd_q": _by_dim((64, 64, 4), (64, 64, 4), (64, 32, 4)),
            "bwd_kv": _by_dim((64, 32, 4), (64, 32, 4), (32, 32, 4)),
        },
        "ieee": {
            "fwd": _by_dim((64, 64, 8), (32, 32, 8), (32, 32, 8)),
            "bwd_q": _by_dim((32, 64, 8), (32, 32, 8), (16, 32, 4)),
            "bwd_kv": _by_dim((64, 32, 4), (16, 32, 4), (16, 32, 4)),
        },
    },
}


def obstacle(qkv: Tensor, routes: Tensor, num_heads: int, region: Size, scale: float) -> str:
    """What keeps the kernels from these inputs, or an empty string."""
    b, h, w, c = qkv.shape
    height, width = padded_size((h, w), region)
    if qkv.dtype not in _triton.DTYPES:
        return f"no kernel for {qkv.dtype}"
    if c // (3 * num_heads) > MAX_DIM:
        return f"heads of {c // (3 * num_heads)} channels, more than {MAX_DIM}"
    if height * width >= 1 << 20:
        return f"a {h}x{w} map has 2**20 tokens or more"
    span = height * qkv.stride(1) + width * qkv.stride(2) + c
    if max(span, height * width * c) >= 1 << 31:
        return f"a {h}x{w} map of {c} channels has 2**31 elements or more"
    if max(routes.numel(), b * height * width * num_heads) >= 1 << 31:
        return "2**31 programs or more"
    return ""


class _Launch:
    """What the launches of one call share: the numbers that every kernel takes, tiles and grid."""

    def __init__(self, qkv: Tensor, routes: Tensor, num_heads: int, region: Size, scale: float) -> None:
        self.batch, h, w, c = qkv.shape
        self.regions, self.topk = routes.shape[1:]
        self.heads, self.dim = num_heads, c // (3 * num_heads)
        self.block_d = _triton.padded_dim(self.dim)
        self.tokens = region[0] * region[1]
        self.device, self.target = qkv.device, _triton.target(qkv.device)
        self.dtype = qkv.dtype
        columns = padded_size((h, w), region)[1] // region[1]
        self.place = (*qkv.stride()[:3], h, w, *region, columns, self.regions)
        self.scales = (scale, scale * explicit.LOG2E)
        # a routed tile of few rows is mostly padding: the masked scores of all tokens cost less
        routed = 2 * _triton.SMALL * self.topk
        self.dense = self.tokens < _triton.SMALL and self.regions <= WORD and self.regions * self.tokens <= routed

    def words(self, routes: Tensor) -> Tensor:
        """The regions each region is routed to as the bits of one word: `(B, R)` int64."""
        return (1 << routes).sum(-1)

    def tile(self, name: str) -> Tile:
        """The tile of kernel `name` on this target."""
        kind = "16-bit" if self.dtype.itemsize == 2 else _triton.precision(self.dtype)
        return TILES[_triton.family(self.target)][kind][name][max(32, self.block_d)]

    def block(self, name: str) -> int:
        """Rows of a tile of kernel `name`: fewer than the table's where these would be padding."""
        rows = self.regions * self.tokens if self.dense else self.tokens
        block = min(self.tile(name).rows, max(_triton.SMALL, _triton.power_of_two(rows)))
        while block > 64 and (rows - 1) % block < block // 2:  # half as many rows leave the last tile out
            block //= 2
        return block

    def run(self, name: str, *args: Any) -> None:
        """Launch kernel `name`, one program per tile of rows and head."""
        tile, block = self.tile(name), self.block(name)
        tiles = -(-self.regions * self.tokens // block) if self.dense else -(-self.tokens // block) * self.regions
        # a full tile of columns even where the list is shorter: one kernel instead of several
        queries, keys = (tile.columns, block) if name == "bwd_kv" else (block, tile.columns)
        function = getattr(kernels, f"_routing_attention_{name}_kernel")
        with _triton.on_device(self.device):
            function[(self.batch * tiles * self.heads,)](
                *args,
                PRECISION=_triton.precision(self.dtype),
                DENSE=self.dense,
                DIM=self.dim,
                BLOCK_D=self.block_d,
                BLOCK_M=queries,
                BLOCK_N=keys,
                num_warps=max(1, self.block_d // 32, tile.warps * block // tile.rows),  # wide heads fill registers
            )


def launch_forward(qkv: Tensor, routes: Tensor, num_heads: int, region: Size, scale: float) -> tuple[Tensor, Tensor]:
    """Output `(B, H, W, C)`, and `(B, heads, H, W)` float32 for the backward: the log2-sum-exp2 of the scores."""
    qkv, routes = _triton.dense_channels(qkv), routes.contiguous()
    b, h, w, c = qkv.shape
    call = _Launch(qkv, routes, num_heads, region, scale)
    out = qkv.new_empty(b, h, w, c // 3)
    lse = qkv.new_empty(b, num_heads, h, w, dtype=torch.float32)
    table = call.words(routes) if call.dense else routes
    call.run("fwd", qkv, table, out, lse, *call.place, call.topk, call.heads, call.scales[1])
    return out, lse


def launch_backward(
    grad: Tensor, qkv: Tensor, routes: Tensor, out: Tensor, lse: Tensor, num_heads: int, region: Size, scale: float
) -> Tensor:
    """Gradient of qkv `(B, H, W, 3 * C)`; the same from run to run."""
    qkv, routes, grad = _triton.dense_channels(qkv), routes.contiguous(), grad.contiguous()
    call = _Launch(qkv, routes, num_heads, region, scale)
    delta, grad_qkv = torch.empty_like(lse), qkv.new_empty(qkv.shape)
    if call.dense:
        table = sources = starts = call.words(routes)
    else:
        table, (sources, starts) = routes, inverted(routes)
    call.run("bwd_q", qkv, table, out, lse, grad, delta, grad_qkv, *call.place, call.topk, call.heads, *call.scales)
    call.run("bwd_kv", qkv, sources, starts, lse, grad, delta, grad_qkv, *call.place, call.heads, *call.scales)
    return grad_qkv


def inverted(routes: Tensor) -> tuple[Tensor, Tensor]:
    """Who is routed to a region: `sources` `(B * R * topk,)` regions and `starts` `(B * R + 1,)`, both int64.

    Region `r` of image `b` is seen by the regions `sources[starts[g]:starts[g + 1]]` of that image, `g = b * R + r`.
    """
    b, regions, topk = routes.shape
    image = torch.arange(b, device=routes.device)[:, None, None] * regions
    seen, order = (routes + image).flatten().sort(stable=True)
    edges = torch.arange(b * regions + 1, device=routes.device)
    return order // topk % regions, torch.searchsorted(seen, edges)


@torch.library.custom_op("striate::routing_attention", mutates_args=(), device_types="cuda")
def _forward(
    qkv: Tensor, routes: Tensor, num_heads: int, region_h: int, region_w: int, scale: float
) -> tuple[Tensor, Tensor]:
    return launch_forward(qkv, routes, num_heads, (region_h, region_w), scale)


@torch.library.custom_op("striate::routing_attention_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad: Tensor,
    qkv: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    region_h: int,
    region_w: int,
    scale: float,
) -> Tensor:
    return launch_backward(grad, qkv, routes, out, lse, num_heads, (region_h, region_w), scale)


@_forward.register_fake
def _(qkv: Tensor, routes: Tensor, num_heads: int, region_h: int, region_w: int, scale: float) -> tuple[Tensor, Tensor]:
    b, h, w, c = qkv.shape
    return qkv.new_empty(b, h, w, c // 3), qkv.new_empty(b, num_heads, h, w, dtype=torch.float32)


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    region_h: int,
    region_w: int,
    scale: float,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


@_forward.register_kernel("cpu")
def _(qkv: Tensor, routes: Tensor, num_heads: int, region_h: int, region_w: int, scale: float) -> tuple[Tensor, Tensor]:
    run = launch_forward if _triton.interpreting() else explicit.forward
    return run(qkv, routes, num_heads, (region_h, region_w), scale)


@_backward.register_kernel("cpu")
def _(
    grad: Tensor,
    qkv: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    region_h: int,
    region_w: int,
    scale: float,
) -> Tensor:
    run = launch_backward if _triton.interpreting() else explicit.backward
    return run(grad, qkv, routes, out, lse, num_heads, (region_h, region_w), scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, routes, *ctx.rest = inputs
    ctx.save_for_backward(qkv, routes, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return torch.ops.striate.routing_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


_forward.register_autograd(_differentiate, setup_context=_save)


def routing_attention(qkv: Tensor, routes: Tensor, num_heads: int, region: Size, scale: float) -> Tensor:
    """See `striate.ops.routing_attention`."""
    out, _ = torch.ops.striate.routing_attention(qkv, routes, num_heads, *region, scale)
    return out


def configurations() -> list[tuple[str, Callable[[], object]]]:
    """Launches on meta tensors that compile every kernel a registered model can use."""
    wanted = [(torch.bfloat16, shape) for shape in _SHAPES] + [(torch.float32, shape) for shape in _SHAPES]
    wanted += [(torch.float16, shape) for shape in _SHAPES[:2]]  # bfloat16 with other instructions of the same kinds
    return [
        (f"{str(dtype)[6:]} {name} {direction}", _meta_call(dtype, size, region, topk, direction))
        for dtype, (name, size, region, topk) in wanted
        for direction in ("forward", "backward")
    ]


# name, map, region, topk: one for every number of rows that a tile can have; heads have 32 channels in all models
_SHAPES = [
    ("10x10 regions", 70, 10, 4),
    ("8x8 regions", 56, 8, 1),
    ("5x5 regions", 35, 5, 16),
    ("4x4 regions", 28, 4, 4),
    ("2x2 regions of 14x14 in words", 14, 2, 16),
    ("2x2 regions of 8x8 in words", 8, 2, 2),
    ("1x1 regions of 4x4 in words", 4, 1, 4),
]


def _meta_call(dtype: torch.dtype, size: int, region: int, topk: int, direction: str) -> Callable[[], object]:
    def call() -> object:
        qkv = torch.empty(1, size, size, 3 * 64, dtype=dtype, device="meta")
        routes = torch.empty(1, (size // region) ** 2, topk, dtype=torch.int64, device="meta")
        if direction == "forward":
            return launch_forward(qkv, routes, 2, (region, region), 0.125)
        out, lse = qkv.new_empty(1, size, size, 64), qkv.new_empty(1, 2, size, size, dtype=torch.float32)
        return launch_backward(out, qkv, routes, out, lse, 2, (region, region), 0.125)

    return call
