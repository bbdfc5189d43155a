"""Rooflines: the counts of the kernels are those that a meter sees, the others those that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from striate.ops import pack_signs, roofline, window_attention
from striate.ops.binary import triton as binary
from striate.ops.gated_linear_attention import triton as gated
from striate.ops.lif import reference as lif_reference
from striate.ops.lif import triton as spiking
from striate.ops.roofline import DEVICES
from striate.ops.routing_attention import triton as routing
from striate.ops.window_attention import triton as window
from triton_tools import interpreted, metered

DEVICE = "a100"  # the interpreter takes the launch tables of its target

WINDOWS = {
    "7x7": dict(qkv=(2, 14, 7, 96), bias=(169, 2), num_heads=2, window=7),
    "3x3, several per tile": dict(qkv=(1, 9, 6, 96), bias=(25, 2), num_heads=2, window=3),
    "9x9, tiled": dict(qkv=(1, 18, 9, 96), bias=(289, 2), num_heads=2, window=9),
    "no bias": dict(qkv=(1, 8, 8, 48), num_heads=1, window=4),
}
ROUTES = {
    "8x8, top 2": dict(qkv=(1, 24, 16, 96), routes=(1, 6, 2), num_heads=2, region=8),
    "2x2, dense": dict(qkv=(1, 8, 8, 96), routes=(1, 16, 8), num_heads=2, region=2),
}
LAYER = dict(x=(70, 128), words=(50, 2), scale=(50,), binary_input=False)
GATED = {
    "one chunk": dict(n=16, k=16, v=32),
    "several chunks": dict(n=150, k=16, v=64),
}


def same(found: dict[str, float], measured: dict[str, float]) -> None:
    assert {k: v for k, v in found.items() if k in measured} == pytest.approx(measured)


def parts(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """q, and k and v, as views."""
    c = qkv.shape[-1] // 3
    return qkv[..., :c], qkv[..., c:]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", WINDOWS)
def test_window_attention_moves_what_the_meter_sees(name, backward) -> None:
    shapes: dict[str, Any] = WINDOWS[name]
    found = roofline("window_attention", shapes, DEVICE, backward=backward).kernel
    qkv = torch.randn(shapes["qkv"]).bfloat16()
    bias = torch.randn(shapes["bias"]) if "bias" in shapes else None
    size, heads = (shapes["window"],) * 2, shapes["num_heads"]
    rest = (0.2, heads, size, (0, 0), (1, 1), False, False)
    with interpreted():
        out, lse = window.launch_forward(qkv, bias, None, None, *rest)
        grad = torch.randn_like(out)
        with metered() as meter:
            if backward:
                grads = window.launch_backward(grad, qkv, bias, None, None, out, lse, *rest, (bias is not None, 0, 0))
            else:
                out, lse = window.launch_forward(qkv, bias, None, None, *rest)
    q, kv = parts(qkv)
    if size[0] * size[1] <= window.ONE_TILE:
        same(found.reads, {"qkv": meter.reads(qkv)})
        assert meter.reads(qkv) == 1
    else:
        same(found.reads, {"q": meter.reads(q), "kv": meter.reads(kv)})
    if backward:
        same(found.reads, {"grad": meter.reads(grad), "lse": meter.reads(lse)})
        same(found.writes, {"grad_qkv": meter.writes(grads[0])})
    else:
        same(found.writes, {"out": meter.writes(out), "lse": meter.writes(lse)})


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ROUTES)
def test_routing_attention_moves_what_the_meter_sees(name, backward) -> None:
    shapes: dict[str, Any] = ROUTES[name]
    found = roofline("routing_attention", shapes, DEVICE, dtype=torch.float32, backward=backward).kernel
    qkv = torch.randn(shapes["qkv"])
    _, regions, topk = shapes["routes"]
    routes = (torch.arange(regions)[:, None] + torch.arange(topk) + 1).remainder(regions)[None]
    size = (shapes["region"],) * 2
    with interpreted():
        out, lse = routing.launch_forward(qkv, routes, shapes["num_heads"], size, 0.2)
        grad = torch.randn_like(out)
        with metered() as meter:
            if backward:
                grads = routing.launch_backward(grad, qkv, routes, out, lse, shapes["num_heads"], size, 0.2)
            else:
                out, lse = routing.launch_forward(qkv, routes, shapes["num_heads"], size, 0.2)
    q, kv = parts(qkv)
    same(found.reads, {"q": meter.reads(q), "kv": meter.reads(kv)})
    if backward:
        same(found.reads, {"grad": meter.reads(grad), "lse": meter.reads(lse), "out": meter.reads(out)})
        same(found.writes, {"grad_qkv": meter.writes(grads)})
    else:
        same(found.writes, {"out": meter.writes(out), "lse": meter.writes(lse)})


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", GATED)
def test_gated_linear_attention_moves_what_the_meter_sees(name, backward) -> None:
    n, k, v = GATED[name].values()
    shapes = dict.fromkeys(("q", "k", "gate", "reverse_gate"), (1, n, 2, k)) | {"v": (1, n, 2, v)}
    found = roofline("gated_linear_attention", shapes, DEVICE, dtype=torch.float32, backward=backward).kernel
    tensors = {key: torch.rand(shapes[key]) for key in ("q", "k", "v", "gate", "reverse_gate")}
    tensors |= {key: -tensors[key] for key in ("gate", "reverse_gate")}
    grad = torch.randn(shapes["v"])
    with interpreted(), metered() as meter:
        if backward:
            grads = gated.launch_backward(grad, *tensors.values(), 0.2)
        else:
            out = gated.launch_forward(*tensors.values(), 0.2)
    for key, t in tensors.items():  # neighbours of the first and last token are not there to be read
        assert found.reads[key] == pytest.approx(float(meter.reads(t)), rel=0.02), key
    if backward:
        same(found.reads, {"grad": meter.reads(grad)})
        same(found.writes, {f"grad_{key}": meter.writes(g) for key, g in zip(tensors, grads, strict=True)})
    else:
        same(found.writes, {"out": meter.writes(out)})


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("steps", [4, 16, 33])
def test_spiking_neurons_move_what_the_meter_sees(steps, backward) -> None:
    shape = (steps, 3, 7, 13)
    found = roofline("lif", dict(x=shape, tau=None), DEVICE, dtype=torch.bfloat16, backward=backward)
    x, grad = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    neuron = lif_reference.Neuron(tau=None)
    with interpreted(), metered() as meter:
        if backward:
            grad_x = spiking.launch_backward(grad, x, neuron)
        else:
            spikes = spiking.launch_forward(x, neuron)
    same(found.kernel.reads, {"x": meter.reads(x)})
    if backward:
        same(found.kernel.reads, {"grad": meter.reads(grad)})
        same(found.kernel.writes, {"grad_x": meter.writes(grad_x)})
    else:
        same(found.kernel.writes, {"spikes": meter.writes(spikes)})
    assert (found.kernel.read, found.kernel.written) == (meter.bytes_read, meter.bytes_written)
    if steps <= spiking.MAX_STEPS:
        assert (found.kernel.read, found.kernel.written) == (found.bound.read, found.bound.written)
    assert found.eager.read + found.eager.written > 3 * (found.bound.read + found.bound.written)


@pytest.mark.parametrize("binary_input", [True, False])
def test_binary_layers_move_what_the_meter_sees(binary_input) -> None:
    m, n, k = 70, 130, 140
    shapes = dict(x=(2, 35, k), words=(n, 3), scale=(n,), bias=(n,), binary_input=binary_input)
    found = roofline("binary_linear", shapes, DEVICE)
    x, words, scale, bias = torch.randn(2, 35, k).bfloat16(), pack_signs(torch.randn(n, k)), *torch.randn(2, n)
    with interpreted(), metered() as meter:
        out = binary.launch_binary_linear(x, words, scale.bfloat16(), bias.bfloat16(), binary_input)
    same(found.kernel.reads, {"x": meter.reads(x)})
    same(found.kernel.writes, {"out": meter.writes(out)})
    assert (found.kernel.read, found.kernel.written) == (meter.bytes_read, meter.bytes_written)
    unpacked, written = 2 * n * k, 2 * m * (n + n + n)  # product, scale and bias
    assert found.eager.flops == 2 * m * n * k
    assert found.eager.written == written + (2 * m * k if binary_input else 0)
    assert found.eager.read > unpacked + 2 * m * k
    (none, some) = ("flops", "popcounts") if binary_input else ("popcounts", "flops")
    assert getattr(found.kernel, none) == 0
    assert getattr(found.kernel, some) == 128 * 192 * 3 * 64 * (1 / 32 if binary_input else 2)
    assert ("G popcounts" in str(found)) == binary_input
    assert found.bound.read == 2 * m * k + 8 * n * 3 + 2 * 2 * n


def test_time_for_counting_bits() -> None:
    shapes = dict(x=(4096, 4096), words=(4096, 64), scale=(4096,))
    found = roofline("binary_linear", shapes, "h100")
    assert found.kernel.popcounts == 4096**3 / 32
    assert found.seconds(found.kernel) == pytest.approx(4096**3 / 32 / (132 * 16 * 1.83e9))


def test_the_bound_is_inputs_and_outputs_once() -> None:
    found = roofline(window_attention, WINDOWS["7x7"], dtype=torch.float16)
    qkv, bias, out = 2 * 14 * 7 * 96 * 2, 169 * 2 * 2, 2 * 14 * 7 * 32 * 2
    assert (found.bound.read, found.bound.written) == (qkv + bias, out)
    assert found.bound.flops == 4 * 4 * 2 * 49**2 * 16
    assert found.seconds(found.bound) == max((qkv + bias + out) / 3.35e12, found.bound.flops / 989e12)
    back = roofline(window_attention, WINDOWS["7x7"], dtype=torch.float16, backward=True)
    assert (back.bound.read, back.bound.written) == (qkv + bias + out, qkv + bias)


def test_eager_counts_every_operator() -> None:
    """A grid of one window without bias: copies, scaling, two products, softmax; each read and written by itself."""
    found = roofline("window_attention", dict(qkv=(1, 4, 4, 48), num_heads=1, window=4), dtype=torch.float32).eager
    assert found.flops == 4 * 16**2 * 16
    scores, third = 4 * 16 * 16, 4 * 16 * 16
    assert found.written >= 2 * scores + 2 * third
    more = roofline("window_attention", WINDOWS["7x7"], dtype=torch.float32)
    assert more.eager.read + more.eager.written > 3 * (more.kernel.read + more.kernel.written)


def test_kernels_never_go_below_the_bound() -> None:
    cases = [("window_attention", shapes) for shapes in WINDOWS.values()]
    cases += [("routing_attention", shapes) for shapes in ROUTES.values()]
    cases += [("lif", dict(x=(20, 3, 7), reset=None, surrogate="atan"))]
    cases += [("binary_linear", LAYER), ("binary_linear", LAYER | dict(binary_input=True))]
    for op, shapes in cases:
        for backward in (False, True) if op != "binary_linear" else (False,):
            found = roofline(op, shapes, "mi300x", backward=backward)
            assert found.kernel.read + found.kernel.written >= (found.bound.read + found.bound.written) * 0.9
            assert found.kernel.flops >= found.bound.flops
            assert str(found).count("GFLOP") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(op="softmax"), "op='softmax' has no roofline; choose one of window_attention, "),
        (dict(device="toaster"), f"device='toaster' is unknown; choose one of {', '.join(DEVICES)}"),
        (dict(dtype=torch.float64), "dtype=torch.float64 has no kernels"),
        (
            dict(shapes=dict(qkv=(1, 20, 20, 48), num_heads=1, window=20)),
            "kernels do not take these arguments: windows",
        ),
        (dict(op="gated_linear_attention", shapes=dict(q=(1, 2, 3, 4))), "shapes lacks k, v, gate, reverse_gate"),
        (dict(op="lif"), "shapes lacks x"),
        (dict(op="binary_linear", shapes=dict(x=(2, 64))), "shapes lacks words, scale"),
        (dict(op="binary_linear", shapes=LAYER, backward=True), "binary_linear has no backward"),
    ],
)
def test_bad_requests(changes, message) -> None:
    arguments: dict[str, Any] = dict(op="window_attention", shapes=WINDOWS["7x7"], device="h100") | changes
    with pytest.raises(ValueError, match=message):
        roofline(**arguments)
