"""`striate benchmark --ops`: the operators at the shapes of published models, against other ways to compute them.

Everything that is compared runs in one process in turns, as in `benchmark`. Inference is one call without gradients,
`train` a forward and a backward.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import (
    binary_linear,
    channel_attention,
    explain,
    gated_linear_attention,
    lif,
    pack_signs,
    route_regions,
    routing_attention,
    unpack_signs,
    window_attention,
)
from ..ops.partition import crop, grid_interval, group_mask, merge, pad_map, padded_size, split
from ..ops.position import expand_bias
from .benchmark import Spread, Task, interleave, timed
from .evaluate import choose_device
from .measure import cpu_threads, environment, reference_path, seconds_per_call

OURS, DEFINITION, PLAIN, SDPA, COMPILED = "striate", "definition", "matmul-softmax", "sdpa", "torch.compile"
LINEAR = "linear"
RECURRENCE_TOKENS = 256  # beyond, the token-by-token definition takes seconds

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """An operator at one shape: `op(*inputs, **options)`, and other ways to compute it from `inputs`, by name.

    All ways but `natten` agree. `definition` says whether the definition is among them, `train` whether there is a
    backward.
    """

    op: Call
    name: str
    inputs: tuple[Tensor, ...]
    options: Mapping[str, Any]
    rivals: Mapping[str, Call]
    definition: bool = True
    train: bool = True

    def ways(self) -> dict[str, Call]:
        """Every way by name, ours first."""
        ours = functools.partial(self.op, **self.options)
        defined = {DEFINITION: _defined(ours)} if self.definition else {}
        compiled = _defined(torch.compile(ours, dynamic=False)) if self.definition else torch.compile(ours)
        return {OURS: ours, **defined, **self.rivals, COMPILED: compiled}


@dataclass(frozen=True)
class OpSettings:
    """What to measure; `ops` and `ways` are names, all of them if empty."""

    ops: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    batch: int = 8
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    train: bool = True
    rounds: int | None = None
    seconds: float | None = 60.0


def window_cases(batch: int, make: Callable[..., Tensor]) -> Iterator[Case]:
    """The blocks of Swin-T at 224 pixels and a grid of MaxViT-T."""
    blocks = [(side, heads, shift, False) for side, heads in ((56, 3), (28, 6), (14, 12)) for shift in (0, 3)]
    for side, heads, shift, grid in (*blocks, (7, 24, 0, False), (56, 2, 0, True)):
        inputs = make(batch, side, side, 3 * 32 * heads), torch.nn.Parameter(make(13 * 13, heads).detach())
        plain = functools.partial(PlainWindows, side, heads, shift, grid, inputs[0].device)
        rivals: dict[str, Call] = {PLAIN: plain(fused=False), SDPA: plain(fused=True)}
        if not grid:
            rivals["natten"] = functools.partial(neighbourhood, heads=heads)
        name = f"{side}x{side}, {heads} heads of 32, {'grid' if grid else 'window'} 7x7, shift {shift}"
        options = dict(num_heads=heads, window=7, shift=shift, grid=grid)
        yield Case(window_attention, name, inputs, options, rivals)


class PlainWindows:
    """Window attention as most code writes it: partition, attend with bias and a mask made once, and back."""

    def __init__(self, side: int, heads: int, shift: int, grid: bool, device: torch.device, fused: bool) -> None:
        self.size, self.window, self.shift = (side, side), (7, 7), (shift, shift)
        self.interval = grid_interval(self.size, self.window) if grid else (1, 1)
        self.heads, self.fused = heads, fused
        self.mask = group_mask(self.size, self.window, self.shift, self.interval, False, device) if shift else None

    def __call__(self, qkv: Tensor, bias: Tensor) -> Tensor:
        groups = split(qkv, self.window, self.shift, self.interval)
        b, g, n, _ = groups.shape
        q, k, v = groups.view(b * g, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        added = expand_bias(bias, self.window).to(q.dtype)[None]
        if self.mask is not None:
            added = (added + self.mask[:, None].to(q.dtype)).repeat(b, 1, 1, 1)
        attend = F.scaled_dot_product_attention if self.fused else _matmul_softmax_matmul
        out = attend(q, k, v, attn_mask=added).transpose(1, 2).reshape(b, g, n, -1)
        return merge(out, self.size, self.window, self.shift, self.interval)


def _matmul_softmax_matmul(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores + attn_mask).softmax(-1) @ v


def routing_cases(batch: int, make: Callable[..., Tensor]) -> Iterator[Case]:
    """BiFormer-S at 512 pixels: 8x8 regions, the published top-k of stages 1 to 3."""
    for side, heads, topk in ((128, 2, 1), (64, 4, 4), (32, 8, 16)):
        qkv, region = make(batch, side, side, 3 * 32 * heads), side // 8
        routes = route_regions(qkv.detach(), region=region, topk=topk)
        rivals = {SDPA: functools.partial(gather_then_sdpa, routes=routes, heads=heads, region=(region, region))}
        name = f"{side}x{side}, {heads} heads of 32, regions {region}x{region}, top {topk}"
        yield Case(routing_attention, name, (qkv,), dict(routes=routes, num_heads=heads, region=region), rivals)


def gather_then_sdpa(qkv: Tensor, routes: Tensor, heads: int, region: tuple[int, int]) -> Tensor:
    """Routing attention from PyTorch's fused attention: a copy of the keys and values of every route first."""
    b, h, w, c = qkv.shape
    groups = split(pad_map(qkv, region), region)
    regions, tokens = groups.shape[1:3]
    q, k, v = groups.chunk(3, -1)
    index = routes[..., None, None].expand(-1, -1, -1, tokens, c // 3)
    k, v = (t[:, None].expand(b, regions, *t.shape[1:]).gather(2, index).flatten(2, 3) for t in (k, v))
    q, k, v = (t.unflatten(-1, (heads, -1)).flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, regions, tokens, c // 3)
    return crop(merge(out, padded_size((h, w), region), region), (h, w))


def gated_cases(batch: int, make: Callable[..., Tensor]) -> Iterator[Case]:
    """ViG-H-T at 224 pixels."""
    for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24)):
        n = side * side
        q, k, *gates = (make(batch, n, heads, 16) for _ in range(4))
        gates = [(F.logsigmoid(g.detach()) / 16).requires_grad_() for g in gates]
        inputs = (q, k, make(batch, n, heads, 32), *gates)
        name = f"{n} tokens, {heads} heads of 16 and 32"
        rivals = {"flash-linear-attention": flash_both_ways}
        yield Case(gated_linear_attention, name, inputs, {}, rivals, definition=n <= RECURRENCE_TOKENS)


def channel_cases(batch: int, make: Callable[..., Tensor]) -> Iterator[Case]:
    """DaViT-T at 224 pixels."""
    for side, heads in ((56, 3), (28, 6), (14, 12)):
        inputs = (make(batch, side * side, 3 * 32 * heads),)
        yield Case(channel_attention, f"{side * side} tokens, {heads} heads of 32", inputs, dict(num_heads=heads), {})


def lif_cases(batch: int, make: Callable[..., Tensor]) -> Iterator[Case]:
    """Meta-SpikeFormer (55M) at 224 pixels and 4 time steps, and the MLP of Spikformer-8-512."""
    for channels, side in ((128, 56), (256, 28), (512, 14), (2048, 14)):
        inputs = (make(4, batch, channels, side, side),)
        rivals = {"spikingjelly": spikingjelly_neurons}
        yield Case(lif, f"4 steps, {channels} channels, {side}x{side}", inputs, {}, rivals)


def binary_cases(batch: int, make: Callable[..., Tensor]) -> Iterator[Case]:
    """The MLP of DeiT-S at 224 pixels with packed weights, against unpacked weights in the dtype of the input."""
    for inputs, outputs in ((384, 1536), (1536, 384)):
        x, scale, words = make(batch * 196, inputs), make(outputs), pack_signs(make(outputs, inputs))
        weight = unpack_signs(words, inputs, x.dtype)
        for binary_input in (True, False):
            rivals = {LINEAR: functools.partial(unpacked_linear, weight=weight, binary_input=binary_input)}
            name = f"{len(x)}x{inputs} to {outputs}, {'binary' if binary_input else 'real'} input"
            options = dict(binary_input=binary_input)
            yield Case(binary_linear, name, (x, words, scale), options, rivals, train=False)


def unpacked_linear(x: Tensor, words: Tensor, scale: Tensor, weight: Tensor, binary_input: bool) -> Tensor:
    """A linear layer with the weights as numbers."""
    return F.linear(torch.sign(x) if binary_input else x, weight) * scale


CASES: dict[str, Callable[[int, Callable[..., Tensor]], Iterator[Case]]] = {
    "window_attention": window_cases,
    "routing_attention": routing_cases,
    "gated_linear_attention": gated_cases,
    "channel_attention": channel_cases,
    "lif": lif_cases,
    "binary_linear": binary_cases,
}
WAYS = (OURS, DEFINITION, PLAIN, SDPA, LINEAR, COMPILED, "flash-linear-attention", "natten", "spikingjelly")


class MissingError(Exception):
    """A way to compute an operator that this machine lacks; with the reason."""


def _defined(call: Call) -> Call:
    """The same on the `reference` path."""

    def run(*tensors: Tensor) -> Tensor:
        with reference_path():
            return call(*tensors)

    return run


def flash_both_ways(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, reverse_gate: Tensor) -> Tensor:
    """Both directions with the chunked kernel of the package `fla`, the backward one on flipped tokens."""
    chunk = _imported("fla.ops.gla").chunk_gla
    forward, _ = chunk(q, k, v, gate, scale=q.shape[-1] ** -0.5)
    backward, _ = chunk(*(t.flip(1) for t in (q, k, v, reverse_gate)), scale=q.shape[-1] ** -0.5)
    return forward + backward.flip(1)


def neighbourhood(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Neighbourhood attention of 7x7 keys per query: another operator, with as many products, for its speed alone."""
    del bias
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(3)
    return _imported("natten").na2d(q, k, v, kernel_size=7).flatten(3)


def spikingjelly_neurons(x: Tensor) -> Tensor:
    """The same neurons by the package `spikingjelly`, which keep their potential until they are told to forget it."""
    neurons = _spikingjelly_neurons()
    neurons.reset()
    return neurons(x)


@functools.cache
def _spikingjelly_neurons() -> Any:
    package = "spikingjelly.activation_based"
    neuron, surrogate = _imported(f"{package}.neuron"), _imported(f"{package}.surrogate")
    return neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.Sigmoid(4.0), step_mode="m")


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingError(f"{package.partition('.')[0]} is not installed") from error


def benchmark_ops(settings: OpSettings, progress: bool = False) -> dict[str, Any]:
    """Measure and return `rows` and the `environment`.

    A row has `op`, `case`, `way`, `mode` (`inference` or `train`), `path` (what `explain` says, for `striate`),
    `seconds` (median and quartiles), `speedup` (of `striate` over this way: above 1, `striate` is faster; median of
    single rounds), or `missing` with the reason why this way does not run here.

    Raises:
        ValueError: an unknown operator, way or device.
    """
    from tqdm import tqdm

    for known, asked in ((tuple(CASES), settings.ops), (WAYS, settings.ways)):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"{unknown[0]!r} is unknown; choose from {', '.join(known)}")
    device = choose_device(settings.device)
    with cpu_threads(settings.threads):
        found = environment(str(device))
        cases = [case for op in settings.ops or CASES for case in CASES[op](settings.batch, _maker(settings, device))]
        rows = []
        seconds = settings.seconds and settings.seconds / len(cases)
        for case in tqdm(cases, "shapes", file=sys.stderr, disable=None if progress else True):
            for mode in ("inference", "train") if settings.train and case.train else ("inference",):
                rows += _measure(case, mode, settings, seconds, device)
        return {"rows": rows, "environment": found}


def _maker(settings: OpSettings, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(device, getattr(torch, settings.dtype))
        return x.requires_grad_()

    return make


def _measure(
    case: Case, mode: str, settings: OpSettings, seconds: float | None, device: torch.device
) -> list[dict[str, Any]]:
    ways = {way: call for way, call in case.ways().items() if not settings.ways or way in settings.ways or way == OURS}
    tasks: list[Task] = []
    missing = {}
    for way, call in ways.items():
        run = _inference(call, case.inputs) if mode == "inference" else _train(call, case.inputs)
        try:
            run()
        except Exception as error:  # a rival that fails here must not end the measurement
            if way == OURS:
                raise
            missing[way] = _one_line(error)
            continue
        tasks.append(timed(way, run, device, seconds_per_call(run, 1, device)))
    timings = interleave(tasks, settings.rounds, seconds)
    row = {"op": case.op.__name__, "case": case.name, "mode": mode}
    return [row | _entry(way, case, timings, missing) for way in ways]


def _entry(way: str, case: Case, timings: Mapping[str, Sequence[float]], missing: Mapping[str, str]) -> dict[str, Any]:
    if way in missing:
        return {"way": way, "missing": missing[way]}
    return {
        "way": way,
        "path": explain(case.op, *case.inputs, **case.options) if way == OURS else None,
        "seconds": vars(Spread.of(timings[way])),
        "speedup": Spread.of_ratios(timings[way], timings[OURS]).median,
    }


def _inference(call: Call, inputs: Sequence[Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            call(*inputs)

    return run


def _train(call: Call, inputs: Sequence[Tensor]) -> Callable[[], object]:
    def run() -> None:
        out = call(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    return run


def _one_line(error: Exception) -> str:
    if isinstance(error, MissingError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]


def format_ops(report: Mapping[str, Any]) -> str:
    """The report as a table, what is missing below it."""
    lines = []
    for (op, case, mode), rows in _grouped(report["rows"]).items():
        lines.append(f"{op}: {case}, {mode}")
        for row in rows:
            if "missing" in row:
                continue
            seconds = row["seconds"]
            spread = f"({seconds['q1'] * 1e3:.2f}-{seconds['q3'] * 1e3:.2f})"
            lines.append(f"  {row['way']:<24}{seconds['median'] * 1e3:9.2f} ms {spread:>18}  {row['speedup']:6.2f}x")
    lines += ["", "x: time over that of striate, median of single rounds; above 1, striate is faster"]
    absent = {(row["way"], row["missing"]) for row in report["rows"] if "missing" in row}
    lines += [f"not measured: {way}: {reason}" for way, reason in sorted(absent)]
    speedups = [row["speedup"] for row in report["rows"] if row.get("way") == DEFINITION and "speedup" in row]
    if speedups:
        lines.append(f"over the definition: {statistics.geometric_mean(speedups):.2f}x in the geometric mean")
    return "\n".join(lines)


def _grouped(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"], row["mode"]), []).append(row)
    return groups
