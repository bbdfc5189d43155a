"""Bytes and FLOPs of the operators on paper: of our kernels, of plain PyTorch, and the least that any code needs.

The counts of the kernels follow from how they divide the work; the tests compare them with what a meter counts while
the kernels run in an interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from . import _triton
from .binary import reference as binary_reference
from .binary import triton as binary
from .gated_linear_attention import chunked
from .gated_linear_attention import triton as gated
from .lif import reference as lif_reference
from .lif import triton as spiking
from .partition import block_size, grid_interval, padded_size, to_size
from .routing_attention import reference as routing_reference
from .routing_attention import triton as routing
from .window_attention import reference as window_reference
from .window_attention import triton as window


@dataclass(frozen=True)
class Device:
    """A GPU as its maker specifies it: bytes, dense FLOPs and words of 32 bits whose ones it counts per second.

    `target` is what kernels are compiled for.
    """

    target: str
    bandwidth: float
    flops: Mapping[torch.dtype, float]
    popcounts: float


def _device(target: str, bandwidth: float, half: float, single: float, popcounts: float) -> Device:
    rates = {torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: single * 1e12}
    return Device(target, bandwidth * 1e12, rates, popcounts * 1e12)


# TB/s, TFLOP/s in 16 bits with float32 sums and in float32 without TF32. Per cycle a multiprocessor of NVIDIA's counts
# the ones of 16 words (CUDA C++ Programming Guide, "Arithmetic Instructions"), a compute unit of AMD's those of 64.
DEVICES = {
    "a100": _device("sm_80", 2.039, 312, 19.5, 108 * 16 * 1.41e-3),
    "h100": _device("sm_90", 3.35, 989, 66.9, 132 * 16 * 1.83e-3),
    "b200": _device("sm_100", 8.0, 2250, 75, 148 * 16 * 1.85e-3),
    "mi300x": _device("gfx942", 5.3, 1307, 163.4, 304 * 64 * 2.1e-3),
}


@dataclass
class Traffic:
    """Bytes read and written, with multiplicity, and FLOPs (two per multiply-add of the matrix products).

    `popcounts` are words of 32 bits whose ones are counted: 32 multiply-adds of signs each. `reads` and `writes` say
    how often each element of a tensor is read and written on average, where that is known.
    """

    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    popcounts: float = 0.0
    reads: dict[str, float] = field(default_factory=dict)
    writes: dict[str, float] = field(default_factory=dict)

    def count(self, name: str, size: float, reads: float = 0.0, writes: float = 0.0) -> None:
        """Add a tensor of `size` bytes."""
        self.read += size * reads
        self.written += size * writes
        self.reads[name] = self.reads.get(name, 0.0) + reads
        self.writes[name] = self.writes.get(name, 0.0) + writes


@dataclass(frozen=True)
class Roofline:
    """What an operator moves and computes at one shape.

    `kernel` counts the loads and stores of our kernels (re-reads mostly hit the cache), `eager` those of the
    definition's PyTorch operators run one by one, `bound` inputs once and outputs once.
    """

    op: str
    device: str
    dtype: torch.dtype
    backward: bool
    kernel: Traffic
    eager: Traffic
    bound: Traffic

    def seconds(self, traffic: Traffic) -> float:
        """The least time for `traffic` on this device: of its bytes or of what it computes, whichever is longer."""
        device = DEVICES[self.device]
        computed = traffic.flops / device.flops[self.dtype] + traffic.popcounts / device.popcounts
        return max((traffic.read + traffic.written) / device.bandwidth, computed)

    def __str__(self) -> str:
        lines = [f"{self.op}, {'backward' if self.backward else 'forward'}, {self.dtype}, {self.device}"]
        for name in ("kernel", "eager", "bound"):
            t = getattr(self, name)
            moved = f"{t.read / 1e6:10.2f} MB read {t.written / 1e6:10.2f} MB written"
            counted = f" {t.popcounts / 1e9:9.3f} G popcounts" if t.popcounts else ""
            least = f"at least {self.seconds(t) * 1e6:8.1f} us"
            lines.append(f"  {name:<7}{moved} {t.flops / 1e9:9.3f} GFLOP{counted}  {least}")
        return "\n".join(lines)


def roofline(
    op: str | Callable[..., Any],
    shapes: Mapping[str, Any],
    device: str = "h100",
    *,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
) -> Roofline:
    """Bytes moved and FLOPs of an operator's forward or backward: of our kernel, of eager PyTorch, and the bound.

    Args:
        op: `window_attention`, `routing_attention`, `gated_linear_attention`, `lif` or `binary_linear`, the function or
            its name.
        shapes: the operator's arguments with shapes in place of tensors, e.g.
            `dict(qkv=(8, 56, 56, 288), bias=(169, 3), num_heads=3, window=7)`; `routes=(8, 64, 4)`.
        device: one of `DEVICES`.
        dtype: of the tensors; float32, float16 or bfloat16.

    Raises:
        ValueError: for an unknown operator, device or dtype, or arguments that the operator's kernels do not take;
            for the backward of `binary_linear`, which has none.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _COUNTS:
        raise ValueError(f"op={name!r} has no roofline; choose one of {', '.join(_COUNTS)}")
    if device not in DEVICES:
        raise ValueError(f"device={device!r} is unknown; choose one of {', '.join(DEVICES)}")
    if dtype not in DEVICES[device].flops:
        raise ValueError(f"dtype={dtype} has no kernels; use float32, float16 or bfloat16")
    tensors = {
        key: torch.empty(value, dtype=torch.int64 if key in ("routes", "words") else dtype, device="meta")
        for key, value in shapes.items()
        if key in _TENSORS and isinstance(value, Sequence)
    }
    options = {key: value for key, value in shapes.items() if key not in tensors}
    with _triton.forced_target(DEVICES[device].target):
        kernel, bound, eager = _COUNTS[name](tensors, options, backward)
    return Roofline(name, device, dtype, backward, kernel, _eager(eager, tensors, backward), bound)


_TENSORS = ("qkv", "bias", "pad", "routes", "q", "k", "v", "gate", "reverse_gate", "x", "words", "scale")

Counts = tuple[Traffic, Traffic, Callable[..., Tensor]]


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _bound(inputs: Sequence[Tensor], out: int, flops: float, backward: bool) -> Traffic:
    """Inputs once and outputs once: forward `inputs` -> `out` bytes; backward also the gradient -> those of inputs."""
    read = sum(map(_bytes, inputs))
    if not backward:
        return Traffic(read, out, flops)
    return Traffic(read + out, read, 2 * flops)


def _window(tensors: dict[str, Tensor], options: dict[str, Any], backward: bool) -> Counts:
    qkv, bias = tensors["qkv"], tensors.get("bias")
    heads, size = options["num_heads"], to_size(options["window"], "window")
    shift = options.get("shift", 0)
    shift = (shift, shift) if isinstance(shift, int) else shift
    interval = to_size(options.get("interval", 1), "interval")
    if options.get("grid"):
        interval = grid_interval((qkv.shape[1], qkv.shape[2]), size)
    full = (qkv, bias, heads, size, shift, interval, options.get("mask_padding", False), 1.0,
            options.get("cosine", False), tensors.get("pad"))  # fmt: skip
    _refuse(window.obstacle(*full))
    tokens, dim = size[0] * size[1], qkv.shape[3] // (3 * heads)
    height, width = padded_size((qkv.shape[1], qkv.shape[2]), block_size(size, interval))
    groups = qkv.shape[0] * height * width // tokens
    shape = {"qkv": qkv, "WINDOW_H": size[0], "WINDOW_W": size[1], "COSINE": options.get("cosine", False)}
    whole = window._backward_in_one_tile(shape) if backward else tokens <= window.ONE_TILE
    count = _window_one_tile if whole else _window_tiled
    kernel = count(qkv, bias, heads, groups, tokens, dim, backward)
    inputs = [qkv] if bias is None else [qkv, bias]
    bound = _bound(inputs, _bytes(qkv) // 3, 4.0 * groups * heads * tokens**2 * dim, backward)

    def eager(qkv: Tensor, bias: Tensor | None = None, pad: Tensor | None = None) -> Tensor:
        return window_reference.window_attention(qkv, bias, *full[2:-1], pad)

    return kernel, bound, eager


def _window_one_tile(
    qkv: Tensor, bias: Tensor | None, heads: int, groups: int, tokens: int, dim: int, backward: bool
) -> Traffic:
    tile, block = window._tile(tokens), _triton.padded_dim(dim)
    pack = tile // tokens
    programs = window.BACKWARD_PROGRAMS if backward else window.FORWARD_PROGRAMS
    _, spans = window._spans(groups, pack, heads, programs)
    found = Traffic(flops=(10.0 if backward else 4.0) * -(-groups // pack) * heads * tile**2 * block)
    found.count("qkv", _bytes(qkv), reads=1)
    found.count("lse", 4 * groups * heads * tokens, reads=backward, writes=not backward)
    if bias is not None:  # the backward expands it to pairs of tokens and reads it anew for every tile
        repeats, size = (-(-groups // pack), 4 * heads * tile**2) if backward else (spans, _bytes(bias))
        found.count("bias", size, reads=repeats)
    if backward:
        found.count("grad", _bytes(qkv) // 3, reads=1)
        found.count("grad_qkv", _bytes(qkv), writes=1)
        if bias is not None:  # parts of the gradient of the scores, then their sum
            found.count("grad_scores", 4 * spans * pack * heads * tokens**2, reads=1, writes=1)
    else:
        found.count("out", _bytes(qkv) // 3, writes=1)
    return found


def _window_tiled(
    qkv: Tensor, bias: Tensor | None, heads: int, groups: int, tokens: int, dim: int, backward: bool
) -> Traffic:
    third, block, found = _bytes(qkv) // 3, _triton.padded_dim(dim), Traffic()
    statistics = 4 * groups * heads * tokens

    def tiles(kind: str) -> tuple[int, int]:
        launch = window._launch(kind, {"qkv": qkv})
        counts = -(-tokens // launch["TILE_Q"]), -(-tokens // launch["TILE_K"])
        pairs = counts[0] * counts[1] * launch["TILE_Q"] * launch["TILE_K"]
        found.flops += {"forward_tiled": 4, "backward_q": 6, "backward_kv": 8, "backward_bias": 4}[kind] * (
            groups * heads * pairs * block
        )
        if bias is not None:
            repeats = window._spans(groups, 1, heads * counts[0] * counts[1], window.BACKWARD_PROGRAMS)[1]
            times = repeats if kind == "backward_bias" else groups
            found.count("bias", _bytes(bias), reads=times * heads * pairs / bias.numel())
        return counts

    if not backward:
        rows, _ = tiles("forward_tiled")
        found.count("q", third, reads=1)
        found.count("kv", 2 * third, reads=rows)
        found.count("out", third, writes=1)
        found.count("lse", statistics, writes=1)
        return found
    rows, _ = tiles("backward_q")
    _, columns = tiles("backward_kv")
    q, kv = 1 + columns, rows + 1
    found.count("out", third, reads=1)
    found.count("grad_qkv", 3 * third, writes=1)
    if bias is not None:
        more_rows, more_columns = tiles("backward_bias")
        q, kv, columns = q + more_columns, kv + more_rows, columns + more_columns
        spans = window._spans(groups, 1, heads * more_rows * more_columns, window.BACKWARD_PROGRAMS)[1]
        found.count("grad_scores", 4 * spans * heads * tokens**2, reads=1, writes=1)
    found.count("q", third, reads=q)
    found.count("kv", 2 * third, reads=kv)
    found.count("grad", third, reads=q)
    found.count("lse", statistics, reads=1 + columns)
    found.count("delta", statistics, reads=columns, writes=1)
    return found


def _routing(tensors: dict[str, Tensor], options: dict[str, Any], backward: bool) -> Counts:
    qkv, routes = tensors["qkv"], tensors["routes"]
    heads, region = options["num_heads"], to_size(options["region"], "region")
    scale = options.get("scale") or 1.0
    _refuse(routing.obstacle(qkv, routes, heads, region, scale))
    call = routing._Launch(qkv, routes, heads, region, scale)
    third, rows = _bytes(qkv) // 3, 4 * qkv.shape[0] * qkv.shape[1] * qkv.shape[2] * heads
    everything = call.regions * call.tokens
    listed = everything if call.dense else call.topk * call.tokens  # keys that a tile of queries meets

    def tiles(name: str) -> tuple[int, float]:
        """How often a tile's other side is read per token, and FLOPs of one product."""
        block = call.block(name)
        count = -(-everything // block) if call.dense else -(-call.tokens // block)
        columns = call.tile(name).columns
        programs = call.batch * heads * (count if call.dense else count * call.regions)
        return count, 2.0 * programs * block * -(-listed // columns) * columns * call.block_d

    found = Traffic()
    again = 1 if call.dense else call.topk  # dense: every tile of rows meets all tokens once
    count, product = tiles("bwd_q" if backward else "fwd")
    found.count("q", third, reads=1)
    found.count("kv", 2 * third, reads=count * again)
    if not backward:
        found.flops = 2 * product
        found.count("out", third, writes=1)
        found.count("lse", rows, writes=1)
    else:
        columns, other = tiles("bwd_kv")
        found.flops = 3 * product + 4 * other
        found.count("kv", 2 * third, reads=1)
        found.count("q", third, reads=columns * again)
        found.count("grad", third, reads=1 + columns * again)
        found.count("out", third, reads=1)
        found.count("lse", rows, reads=1 + columns * again)
        found.count("delta", rows, reads=columns * again, writes=1)
        found.count("grad_qkv", 3 * third, writes=1)
    pairs = call.batch * call.regions * call.topk * call.tokens**2
    bound = _bound([qkv], third, 4.0 * pairs * heads * call.dim, backward)

    def eager(qkv: Tensor, routes: Tensor) -> Tensor:
        return routing_reference.routing_attention(qkv, routes, heads, region, scale)

    return found, bound, eager


def _gated(tensors: dict[str, Tensor], options: dict[str, Any], backward: bool) -> Counts:
    names = ("q", "k", "v", "gate", "reverse_gate")
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"shapes lacks {', '.join(missing)}; gated_linear_attention needs {', '.join(names)}")
    inputs = [tensors[name] for name in names]
    scale = options.get("scale") or 1.0
    q, k, v, gate, reverse_gate = inputs
    _refuse(gated.obstacle(q, k, v, gate, reverse_gate, scale))
    plan = gated.Plan(q, k, v, gate, reverse_gate, backward)
    found, scans = Traffic(), 4 if backward else 2
    for name, t in zip(names, inputs, strict=True):
        found.count(name, _bytes(t), reads=1)
    kernels = plan.b * plan.heads * plan.chunks
    if plan.chunks > 1:
        columns = -(-plan.v // gated.STATE_COLUMNS)
        found.count("k", _bytes(k), reads=2 * columns)
        found.count("v", _bytes(v), reads=2)
        for name, t in (("gate", gate), ("reverse_gate", reverse_gate)):  # of the token and of its neighbour
            found.count(name, _bytes(t), reads=columns * scans)
        if backward:
            found.count("q", _bytes(q), reads=2 * columns)
            found.count("grad", _bytes(v), reads=2)
        states = 4 * scans * kernels * plan.k * plan.v
        found.count("states", states, reads=1, writes=1)
        if plan.segments > 1:
            found.count("decays", 4 * scans * kernels * plan.k, reads=1, writes=1)
            ends = 4 * scans * plan.b * plan.heads * plan.segments * plan.k * plan.v
            found.count("ends", ends, reads=1 + plan.chunks / plan.segments, writes=2)
        found.flops += 2.0 * scans * kernels * plan.launch.chunk * plan.k * plan.v
    if backward:
        found.count("grad", _bytes(v), reads=1)
        for name, t in zip(names, inputs, strict=True):
            found.count(f"grad_{name}", _bytes(t), writes=1)
    else:
        found.count("out", _bytes(v), writes=1)
    pairs = plan.launch.chunk**2 * (plan.levels + 1)
    products = (
        (3 * plan.k * pairs + 2 * plan.v * plan.launch.chunk**2)
        if backward
        else (plan.k * pairs + plan.v * plan.launch.chunk**2)
    )
    found.flops += 2.0 * kernels * (products + scans * plan.launch.chunk * plan.k * plan.v)
    bound = _bound(inputs, _bytes(v), 8.0 * math.prod(q.shape[:3]) * plan.k * plan.v, backward)

    def eager(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor) -> Tensor:
        return chunked.gated_linear_attention(q, k, v, gate, reverse_gate, scale)

    return found, bound, eager


def _lif(tensors: dict[str, Tensor], options: dict[str, Any], backward: bool) -> Counts:
    if "x" not in tensors:
        raise ValueError("shapes lacks x; lif needs x=(T, ...)")
    x, found = tensors["x"], Traffic()
    _refuse(spiking.obstacle(x))
    found.count("x", _bytes(x), reads=1)
    if backward:
        segments, steps = spiking.segments(len(x))
        again = (segments - 1) * steps  # time steps that potentials are computed for twice
        found.count("x", _bytes(x), reads=again / len(x))
        found.count("entering", 4 * (segments - 1) * x[0].numel(), reads=1, writes=1)
        found.count("grad", _bytes(x), reads=1)
        found.count("grad_x", _bytes(x), writes=1)
    else:
        found.count("spikes", _bytes(x), writes=1)
    neuron = lif_reference.Neuron(**options)

    def eager(x: Tensor) -> Tensor:
        return lif_reference.lif(x, neuron)

    return found, _bound([x], _bytes(x), 0.0, backward), eager


def _binary(tensors: dict[str, Tensor], options: dict[str, Any], backward: bool) -> Counts:
    if missing := [name for name in ("x", "words", "scale") if name not in tensors]:
        raise ValueError(f"shapes lacks {', '.join(missing)}; binary_linear needs x=(..., K), words=(N, W), scale=(N,)")
    x, words = tensors["x"], tensors["words"]
    _refuse(binary.obstacle(x) if not backward else "binary_linear has no backward, it is for inference")
    binary_input = options.get("binary_input", True)
    rows, outputs = x.numel() // x.shape[-1], len(words)
    out = x.new_empty(rows, outputs)
    tile = binary.COUNTING if binary_input else binary.tile_of(x, out)
    down, across = -(-rows // tile.rows), -(-outputs // tile.columns)
    found = Traffic()
    found.count("x", _bytes(x), reads=1 if binary_input else across)
    found.count("words", _bytes(words), reads=down)
    for name in ("scale", "bias"):
        if name in tensors:
            found.count(name, _bytes(tensors[name]), reads=down)
    found.count("out", _bytes(out), writes=1)
    if binary_input:
        found.count("planes", 2 * 8 * rows * words.shape[1], reads=across, writes=1)
        found.count("counts", 4 * rows, reads=across, writes=1)
        found.popcounts = 2.0 * down * tile.rows * across * tile.columns * words.shape[1]
    else:
        found.flops = 2.0 * down * tile.rows * across * tile.columns * words.shape[1] * binary_reference.WORD
    flops = 0.0 if binary_input else 2.0 * rows * outputs * x.shape[-1]  # signs can be multiplied in many ways
    bound = _bound(list(tensors.values()), _bytes(out), flops, backward)

    def eager(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = x.new_empty(len(words), x.shape[-1])  # unpacked beforehand
        dots = torch.nn.functional.linear(torch.sign(x) if binary_input else x, weight)
        return binary_reference.affine(dots, scale, bias)

    return found, bound, eager


_COUNTS: dict[str, Callable[[dict[str, Tensor], dict[str, Any], bool], Counts]] = {
    "window_attention": _window,
    "routing_attention": _routing,
    "gated_linear_attention": _gated,
    "lif": _lif,
    "binary_linear": _binary,
}


def _refuse(obstacle: str) -> None:
    if obstacle:
        raise ValueError(f"the kernels do not take these arguments: {obstacle}")


_aten = torch.ops.aten
_MOVE_NOTHING = (_aten.empty_like.default, _aten.new_empty.default, _aten._unsafe_view.default)


class _Meter(TorchDispatchMode):
    """Bytes of all tensors that go into and come out of operators, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func in _MOVE_NOTHING):
            self.traffic.read += sum(map(_touched, _tensors((args, kwargs))))
            self.traffic.written += sum(map(_touched, _tensors(out)))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _touched(t: Tensor) -> int:
    """Bytes of the different elements of a tensor: those of an expanded one are read from the cache."""
    return math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) * t.element_size()


def _eager(call: Callable[..., Tensor], tensors: dict[str, Tensor], backward: bool) -> Traffic:
    """Traffic of the definition's operators, or of autograd's after them."""
    leaves = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    with _Meter() as forward, FlopCounterMode(display=False) as forward_flops:
        out = call(**leaves)
    if not backward:
        return Traffic(forward.traffic.read, forward.traffic.written, forward_flops.get_total_flops())
    wanted = [t for t in leaves.values() if t.requires_grad]
    with _Meter() as meter, FlopCounterMode(display=False) as flops:
        torch.autograd.grad(out, wanted, torch.empty_like(out), allow_unused=True)
    return Traffic(meter.traffic.read, meter.traffic.written, flops.get_total_flops())
