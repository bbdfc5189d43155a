"""Window attention on a GPU: what the Triton kernels take, how they are launched, and the operators of PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _triton
from ..partition import Size, block_size, padded_size
from . import explicit, kernels, tiled
from .pairs import by_offset, pair_bias

ONE_TILE = 64  # tokens of a group that the kernels of one tile take
MOST_TOKENS = 256
MOST_DIM = 128
# A program of the kernels of one tile goes through several tiles, so that the position bias is read and the gradients
# of the parameters are written less often; this many programs still fill a large GPU. Constants, not the number of its
# processors: the order of summation, and so every bit of the gradient, must not depend on the GPU.
FORWARD_PROGRAMS = 2048
BACKWARD_PROGRAMS = 512


def obstacle(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    scale: float | Tensor,
    cosine: bool,
    pad: Tensor | None,
) -> str:
    """What keeps these arguments from the Triton kernels, or an empty string."""
    if _triton.triton is None:
        return "triton is not installed"
    if qkv.dtype not in _triton.DTYPES:
        return f"kernels for {qkv.dtype} do not exist"
    if qkv.shape[-1] // (3 * num_heads) > MOST_DIM:
        return f"heads of {qkv.shape[-1] // (3 * num_heads)} channels, more than {MOST_DIM}"
    if window[0] * window[1] > MOST_TOKENS:
        return f"windows of {window[0]}x{window[1]} tokens, more than {MOST_TOKENS}"
    if qkv.shape[1] * qkv.shape[2] * qkv.shape[3] >= 2**31:
        return f"images of {qkv.shape[1]}x{qkv.shape[2]}x{qkv.shape[3]} elements, 2^31 or more"
    if not qkv.shape[0] * qkv.shape[1] * qkv.shape[2] * qkv.shape[3]:
        return "an empty map"
    tensors = [t for t in (bias, pad, scale) if isinstance(t, Tensor)]
    if any(t.device != qkv.device for t in tensors):
        return "tensors on several devices"
    if any(not t.is_floating_point() or t.dtype == torch.float64 for t in tensors):
        return "bias, pad or scale in float64"
    return ""


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    scale: float | Tensor,
    cosine: bool,
    pad: Tensor | None,
) -> Tensor:
    """See `striate.ops.window_attention`."""
    factors, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    out, _ = torch.ops.striate.window_attention(
        qkv, bias, pad, factors, factor, num_heads, window, shift, interval, mask_padding, cosine
    )
    return out


# ------------------------------------------------------------------------------------------------------ launch tables

# Warps and pipeline stages, before them what a kernel's tiles hold: queries and keys, or queries alone. Chosen by
# compilation for heads of up to 32 channels in 16 bits, so that nothing spills where it can be avoided.
_LAUNCHES: dict[str, dict[str, tuple[int, ...]]] = {
    "sm_80": {
        "forward": (4, 1),
        "backward": (32, 8, 1),
        "forward_tiled": (64, 32, 4, 2),
        "backward_q": (64, 32, 4, 2),
        "backward_kv": (32, 64, 4, 2),
        "backward_bias": (64, 32, 4, 1),
    },
    "sm_90": {
        "forward": (4, 1),
        "backward": (64, 8, 1),
        "forward_tiled": (64, 32, 4, 2),
        "backward_q": (64, 32, 4, 2),
        "backward_kv": (32, 64, 4, 2),
        "backward_bias": (64, 64, 4, 1),
    },
    "sm_100": {
        "forward": (4, 1),
        "backward": (32, 8, 1),
        "forward_tiled": (64, 32, 4, 1),
        "backward_q": (64, 32, 4, 1),
        "backward_kv": (32, 64, 4, 1),
        "backward_bias": (64, 64, 8, 1),
    },
    "gfx": {
        "forward": (4, 1),
        "backward": (32, 4, 1),
        "forward_tiled": (64, 32, 4, 1),
        "backward_q": (64, 32, 4, 1),
        "backward_kv": (32, 64, 4, 1),
        "backward_bias": (64, 32, 4, 1),
    },
}
# float32, as TF32 or in full precision, which takes no matrix instructions but on AMD: registers hold the operands.
_FLOAT32: dict[str, tuple[int, ...]] = {
    "forward": (8, 1),
    "backward": (32, 8, 1),
    "forward_tiled": (64, 32, 8, 1),
    "backward_q": (64, 32, 8, 1),
    "backward_kv": (32, 64, 8, 1),
    "backward_bias": (32, 32, 4, 1),
}
_FLOAT32_GFX = _FLOAT32 | {"forward": (4, 1), "backward": (32, 4, 1), "backward_kv": (32, 32, 4, 1)}


def _launch(kind: str, arguments: dict[str, Any]) -> dict[str, int]:
    """Warps, pipeline stages and tile sizes of kernel `kind`, from the `qkv` among its arguments (and `BLOCK_D`)."""
    family = _triton.family(_triton.target(arguments["qkv"].device))
    row = _LAUNCHES[family]
    if arguments["qkv"].dtype == torch.float32:
        row = _FLOAT32_GFX if family == "gfx" else _FLOAT32
    *tiles, warps, stages = row[kind]
    if arguments.get("BLOCK_D", 32) > 32 and family != "gfx":
        warps, stages = 8, 1
    names = ("QUERIES",) if len(tiles) == 1 else ("TILE_Q", "TILE_K")
    return dict(zip(names, tiles, strict=False)) | {"num_warps": warps, "num_stages": stages}


# ------------------------------------------------------------------------------------------------------------ launches


def launch_forward(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    factor: float,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, W, C)` and log-sum-exp `(groups, heads, tokens)` float32."""
    arguments = _common(qkv, bias, pad, scale, factor, num_heads, window, shift, interval, mask_padding, cosine)
    qkv, tokens, groups = arguments["qkv"], window[0] * window[1], _groups(qkv, window, interval)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    lse = qkv.new_empty(groups, num_heads, tokens, dtype=torch.float32)
    arguments |= {"out": out, "lse": lse}
    with _triton.on_device(qkv.device):
        if tokens <= ONE_TILE:
            tile = _tile(tokens)
            _, spans = _spans(groups, tile // tokens, num_heads, FORWARD_PROGRAMS)
            launch = _launch("forward", arguments)
            kernels._window_attention_fwd_kernel[(num_heads * spans,)](
                **arguments, **launch, total=groups, spans=spans, TILE=tile
            )
        else:
            launch = _launch("forward_tiled", arguments)
            grid = num_heads * groups * -(-tokens // launch["TILE_Q"])
            tiled._window_attention_fwd_tiled_kernel[(grid,)](**arguments, **launch)
    return out, lse


def launch_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    factor: float,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    cosine: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias, pad and scale; those of the last three are empty unless `wanted` (three flags)."""
    arguments = _common(qkv, bias, pad, scale, factor, num_heads, window, shift, interval, mask_padding, cosine)
    qkv = arguments["qkv"]
    grad_qkv = torch.empty_like(qkv)
    arguments |= {"grad": grad.contiguous(), "lse": lse, "grad_qkv": grad_qkv}
    outside = (arguments["padded_h"], arguments["padded_w"]) != tuple(qkv.shape[1:3])
    flags = {"BIAS_GRAD": wanted[0], "PAD_GRAD": wanted[1] and outside, "SCALE_GRAD": wanted[2]}
    with _triton.on_device(qkv.device):
        if _backward_in_one_tile(arguments):
            scores, pads, scales = _one_tile_backward(arguments, flags)
        else:
            scores, pads, scales = _tiled_backward(arguments, out.contiguous(), flags)
    grad_bias, grad_pad, grad_scale = (qkv.new_empty(0) for _ in range(3))
    if bias is not None and scores is not None:
        grad_bias = by_offset(scores.sum(0), window).to(bias.dtype)
    if pad is not None and wanted[1]:
        third = pad.shape[0] // 3
        keys_and_values = pad.new_zeros(2 * third) if pads is None else pads.sum(0).flatten().to(pad.dtype)
        grad_pad = F.pad(keys_and_values, (third, 0))  # the output of a query outside the map is cut off
    if scale is not None and scales is not None:
        grad_scale = scales.sum(0).to(scale.dtype)
    return grad_qkv, grad_bias, grad_pad, grad_scale


def _backward_in_one_tile(arguments: dict[str, Any]) -> bool:
    """Whether the kernel that holds whole groups takes these; where it would spill, the tiled ones read more often."""
    tokens = arguments["WINDOW_H"] * arguments["WINDOW_W"]
    family = _triton.family(_triton.target(arguments["qkv"].device))
    if tokens > ONE_TILE or family == "gfx" or _triton.interpreting():
        return tokens <= ONE_TILE
    full_norms = arguments["COSINE"] and tokens > ONE_TILE // 2 and family != "sm_100"
    return not full_norms and arguments["qkv"].dtype != torch.float32


Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


def _one_tile_backward(arguments: dict[str, Any], flags: dict[str, bool]) -> Parts:
    """Fill `grad_qkv`; return the parts of the gradients of the scores, of `pad` and of the scale."""
    groups, heads, tokens = arguments["lse"].shape
    tile = _tile(tokens)
    _, spans = _spans(groups, tile // tokens, heads, BACKWARD_PROGRAMS)
    scores, pads, scales = parts = _parts(arguments, flags, spans * (tile // tokens), spans, spans)
    table = arguments.pop("table")
    bias = None if table is None else pair_bias(table, (arguments["WINDOW_H"], arguments["WINDOW_W"]), tile)
    kernels._window_attention_bwd_kernel[(heads * spans,)](
        **arguments, **flags, **_launch("backward", arguments), total=groups, spans=spans, TILE=tile, bias=bias,
        grad_scores=scores, grad_pad=pads, grad_scale=scales,
    )  # fmt: skip
    return parts


def _tiled_backward(arguments: dict[str, Any], out: Tensor, flags: dict[str, bool]) -> Parts:
    """Like `_one_tile_backward`, for large groups."""
    groups, heads, tokens = arguments["lse"].shape
    grad_qkv, bias_grad = arguments.pop("grad_qkv"), flags.pop("BIAS_GRAD")
    arguments["delta"] = torch.empty_like(arguments["lse"])
    q, kv, both = (_launch(kind, arguments) for kind in ("backward_q", "backward_kv", "backward_bias"))
    tiles_q, tiles_k = -(-tokens // q["TILE_Q"]), -(-tokens // kv["TILE_K"])
    pairs = -(-tokens // both["TILE_Q"]) * -(-tokens // both["TILE_K"])
    _, spans = _spans(groups, 1, heads * pairs, BACKWARD_PROGRAMS)
    all_flags = {"BIAS_GRAD": bias_grad, **flags}
    scores, pads, scales = parts = _parts(arguments, all_flags, spans, groups * tiles_k, groups * tiles_q)
    tiled._window_attention_bwd_q_kernel[(heads * groups * tiles_q,)](
        **arguments, **q, out=out, grad_qkv=grad_qkv, grad_scale=scales, SCALE_GRAD=flags["SCALE_GRAD"]
    )
    tiled._window_attention_bwd_kv_kernel[(heads * groups * tiles_k,)](
        **arguments, **kv, grad_qkv=grad_qkv, grad_pad=pads, PAD_GRAD=flags["PAD_GRAD"]
    )
    if bias_grad:
        del arguments["HAS_BIAS"]
        tiled._window_attention_bwd_bias_kernel[(heads * pairs * spans,)](
            **arguments, **both, grad_scores=scores, total=groups, spans=spans
        )
    return parts


def _parts(arguments: dict[str, Any], flags: dict[str, bool], of_scores: int, of_pad: int, of_scale: int) -> Parts:
    """Buffers for so many parts of the gradients that are wanted."""
    heads, tokens = arguments["lse"].shape[1:]

    def new(flag: str, *shape: int) -> Tensor | None:
        return arguments["qkv"].new_empty(shape, dtype=torch.float32) if flags[flag] else None

    return (
        new("BIAS_GRAD", of_scores, heads, tokens, tokens),
        new("PAD_GRAD", of_pad, 2, heads, arguments["DIM"]),
        new("SCALE_GRAD", of_scale, heads),
    )


def _common(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    factor: float,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    cosine: bool,
) -> dict[str, Any]:
    """Arguments that all kernels share."""
    _, h, w, channels = qkv.shape
    padded = padded_size((h, w), block_size(window, interval))
    dim = channels // (3 * num_heads)
    return {
        "qkv": qkv.contiguous(),
        # the offsets of one head side by side: a row of a tile reads neighbours, and several rows the same line
        "table": None if bias is None else bias.t().float().contiguous(),
        "pad": None if pad is None else pad.contiguous(),
        "scale": None if scale is None else scale.contiguous(),
        "factor": factor,
        "heads": num_heads,
        "height": h,
        "width": w,
        "padded_h": padded[0],
        "padded_w": padded[1],
        "interval_h": interval[0],
        "interval_w": interval[1],
        "shift_h": shift[0],
        "shift_w": shift[1],
        "WINDOW_H": window[0],
        "WINDOW_W": window[1],
        "DIM": dim,
        "BLOCK_D": _triton.padded_dim(dim),
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "HAS_PAD": pad is not None and padded != (h, w),
        "COSINE": cosine,
        "SHIFTED": tuple(shift) != (0, 0),
        "MASKED_PADDING": mask_padding and padded != (h, w),
        "PRECISION": _triton.precision(qkv.dtype),
    }


def _tile(tokens: int) -> int:
    """Rows of the tile of a group of `tokens`; small groups share one."""
    return max(32, _triton.power_of_two(tokens))


def _spans(groups: int, pack: int, columns: int, programs: int) -> tuple[int, int]:
    """Tiles of `pack` groups, and how many programs share them for each of `columns` pieces of work.

    At least two where there are two tiles: Triton compiles a kernel of its own for a 1.
    """
    tiles = -(-groups // pack)
    return tiles, min(tiles, max(2, -(-programs // columns)))


def _groups(qkv: Tensor, window: Size, interval: Size) -> int:
    h, w = padded_size((qkv.shape[1], qkv.shape[2]), block_size(window, interval))
    return qkv.shape[0] * (h // window[0]) * (w // window[1])


# ----------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("striate::window_attention", mutates_args=(), device_types="cuda")
def _forward(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    factor: float,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    interval: Sequence[int],
    mask_padding: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    return launch_forward(
        qkv, bias, pad, scale, factor, num_heads, _size(window), _size(shift), _size(interval), mask_padding, cosine
    )


@_forward.register_kernel("cpu")
def _forward_cpu(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    factor: float,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    interval: Sequence[int],
    mask_padding: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    run = launch_forward if _triton.interpreting() else explicit.forward
    return run(
        qkv, bias, pad, scale, factor, num_heads, _size(window), _size(shift), _size(interval), mask_padding, cosine
    )


@_forward.register_fake
def _forward_fake(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    factor: float,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    interval: Sequence[int],
    mask_padding: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    groups = _groups(qkv, _size(window), _size(interval))
    lse = qkv.new_empty(groups, num_heads, window[0] * window[1], dtype=torch.float32)
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), lse


@torch.library.custom_op("striate::window_attention_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    factor: float,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    interval: Sequence[int],
    mask_padding: bool,
    cosine: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(
        grad, qkv, bias, pad, scale, out, lse, factor, num_heads, _size(window), _size(shift), _size(interval),
        mask_padding, cosine, wanted,
    )  # fmt: skip


@_backward.register_kernel("cpu")
def _backward_cpu(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    factor: float,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    interval: Sequence[int],
    mask_padding: bool,
    cosine: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = launch_backward if _triton.interpreting() else explicit.backward
    return run(
        grad, qkv, bias, pad, scale, out, lse, factor, num_heads, _size(window), _size(shift), _size(interval),
        mask_padding, cosine, wanted,
    )  # fmt: skip


@_backward.register_fake
def _backward_fake(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    factor: float,
    num_heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    interval: Sequence[int],
    mask_padding: bool,
    cosine: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [
        t.new_empty(t.shape) if t is not None and flag else qkv.new_empty(0)
        for t, flag in zip((bias, pad, scale), wanted, strict=True)
    ]
    return qkv.new_empty(qkv.shape), grads[0], grads[1], grads[2]


def _size(pair: Sequence[int]) -> Size:
    return pair[0], pair[1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, pad, scale, *ctx.settings = inputs
    ctx.save_for_backward(qkv, bias, pad, scale, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (4 + len(ctx.settings))
    if grad is None:
        return nothing
    wanted = [bool(needed) for needed in ctx.needs_input_grad[1:4]]
    grad_qkv, *others = torch.ops.striate.window_attention_backward(grad, *ctx.saved_tensors, *ctx.settings, wanted)
    return grad_qkv, *(g if w else None for g, w in zip(others, wanted, strict=True)), *nothing[4:]


_forward.register_autograd(_differentiate, setup_context=_setup)


# ------------------------------------------------------------------------------------------------- what models launch

HALF, FULL = (torch.bfloat16, torch.float16), (torch.float32,)
# What sets the kernels of registered models apart: side of the window, what they do, types. All have heads of 32
# channels. A window that is not shifted, or a map without padding, runs a part of the kernel named here.
_MODELS: tuple[tuple[int, str, tuple[torch.dtype, ...]], ...] = (
    (7, "shifted", HALF + FULL),  # Swin, MaxViT
    (12, "shifted", HALF + FULL),
    (16, "dilated", HALF[:1]),  # the grids of MaxViT
    (8, "cosine shifted", HALF[:1]),  # SwinV2
    (16, "cosine shifted", HALF[:1]),
    (7, "unbiased", HALF[:1]),  # DaViT
    (12, "unbiased", HALF[:1]),
    (7, "dilated masked", HALF[:1]),  # CrossFormer
    (4, "dilated masked", HALF[:1]),
    (14, "masked", HALF[:1]),
)


def configurations() -> list[tuple[str, Callable[[], Any]]]:
    """`(label, launch)` of every configuration that a registered model uses; `launch()` launches on meta tensors."""
    found: list[tuple[str, Callable[[], Any]]] = []
    for side, kind, dtypes in _MODELS:
        for dtype in dtypes:
            name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
            for what, launch in (("forward", _example_forward), ("backward", _example_backward)):
                label = f"{name} window {side}x{side} {kind} head 32 {what}"
                found.append((label, functools.partial(launch, side, kind, dtype)))
    return found


def _example(side: int, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of `launch_forward` on meta tensors: an odd map, so that it is padded."""
    heads, channels = 4, 4 * 32

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    return (
        new(3, 7 * side - 1, 7 * side - 1, 3 * channels).to(dtype),
        None if "unbiased" in kind else new((2 * side - 1) ** 2, heads),
        None if "masked" in kind else new(3 * channels),
        new(heads) if "cosine" in kind else None,
        32**-0.5,
        heads,
        (side, side),
        (side // 2, side // 2) if "shifted" in kind else (0, 0),
        (2, 2) if "dilated" in kind else (1, 1),
        "masked" in kind,
        "cosine" in kind,
    )


def _example_forward(side: int, kind: str, dtype: torch.dtype) -> None:
    launch_forward(*_example(side, kind, dtype))


def _example_backward(side: int, kind: str, dtype: torch.dtype) -> None:
    arguments = _example(side, kind, dtype)
    out, lse = _forward_fake(*arguments)
    wanted = [t is not None for t in arguments[1:4]]
    launch_backward(*(torch.empty_like(out), *arguments[:4], out, lse, *arguments[4:], wanted))
