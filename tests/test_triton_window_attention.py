"""Triton window attention in the interpreter against the definition in float64; what it reads, writes and keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers import relative, run, saved_bytes, worst

pytest.importorskip("triton")

from striate.ops import _triton
from striate.ops.partition import grid_interval
from striate.ops.window_attention import kernels, reference, tiled
from striate.ops.window_attention import triton as ours
from triton_tools import interpreted, metered, mutated, poisoned

HEADS = 2
PLAIN = {"shift": (0, 0), "interval": (1, 1), "mask_padding": False, "cosine": False}


def case(size: tuple[int, int], window: tuple[int, int], dim: int = 16, **options: Any) -> dict[str, Any]:
    return {"size": size, "window": window, "dim": dim, "batch": 1, **PLAIN, **options}


ONE_TILE = {
    "packed": case((7, 9), (3, 4), shift=(1, 2), batch=2),
    "divisible": case((6, 8), (3, 4)),
    "seven": case((8, 15), (7, 7), 24, shift=(3, 3)),
    "seven-divisible": case((14, 14), (7, 7), 32, shift=(3, 3)),
    "full-tile-cosine": case((9, 8), (8, 8), shift=(4, 4), cosine=True),
    "rows-shifted": case((7, 9), (3, 4), shift=(1, 0)),
    "dilated": case((7, 11), (3, 2), interval=(2, 3), mask_padding=True),
    "dilated-cosine": case((7, 11), (3, 2), interval=(2, 3), cosine=True),
    "grid": case((9, 11), (4, 3), interval=grid_interval((9, 11), (4, 3))),
    "smaller-than-window": case((2, 3), (4, 4), shift=(2, 2)),
    "window-of-one": case((3, 5), (1, 1)),
    "wide-heads": case((5, 5), (5, 5), 72, mask_padding=True),
    "heads-of-64": case((6, 9), (7, 7), 64, shift=(3, 3)),
    "heads-of-128": case((8, 8), (8, 8), 128, cosine=True),
}
TILED = {
    "tiled": case((8, 9), (9, 10), 24, shift=(3, 4)),
    "tiled-divisible-cosine": case((12, 6), (12, 6), cosine=True),
    "tiled-dilated": case((9, 13), (9, 8), interval=(1, 2), mask_padding=True),
    "tiled-heads-of-64": case((9, 9), (9, 10), 64, shift=(3, 4)),
    "tiled-heads-of-128": case((12, 6), (12, 6), 128),
}
LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of the output; gradients: four times


def inputs(setting: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """qkv, bias, pad and a scale per head."""
    (wh, ww), width = setting["window"], 3 * HEADS * setting["dim"]
    return [
        torch.randn(setting["batch"], *setting["size"], width).to(dtype),
        torch.randn((2 * wh - 1) * (2 * ww - 1), HEADS),
        torch.randn(width),
        torch.rand(HEADS) * 3 / setting["dim"] ** 0.5 + (3 if setting["cosine"] else 0),
    ]


def op(function: Callable[..., Tensor], setting: dict[str, Any], factor: float = 0.3) -> Callable[..., Tensor]:
    def call(qkv: Tensor, bias: Tensor | None, pad: Tensor | None, scale: Tensor | None) -> Tensor:
        return function(
            qkv, bias, HEADS, setting["window"], setting["shift"], setting["interval"], setting["mask_padding"],
            factor if scale is None else scale, setting["cosine"], pad,
        )  # fmt: skip

    return call


def definition(setting: dict[str, Any], tensors: list[Tensor | None]) -> list[Tensor]:
    exact = [None if t is None else t.double() for t in tensors]
    return run(op(reference.window_attention, setting), exact)


def kernel(setting: dict[str, Any], tensors: list[Tensor | None]) -> list[Tensor]:
    with interpreted(), poisoned():
        return run(op(ours.window_attention, setting), tensors)


def errors(setting: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Of the output, and the worst of the gradients."""
    tensors = inputs(setting, dtype)
    pairs = zip(kernel(setting, tensors), definition(setting, tensors), strict=True)
    forward, *backward = (relative(got, want) for got, want in pairs)
    return forward, max(backward)


@pytest.mark.parametrize("name", [*ONE_TILE, *TILED])
def test_output_and_gradients_are_those_of_the_definition(name) -> None:
    forward, backward = errors({**ONE_TILE, **TILED}[name])
    assert forward < LIMITS[torch.float32]
    assert backward < 4 * LIMITS[torch.float32]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("packed", torch.float16),
        ("tiled", torch.float16),
        ("seven", torch.bfloat16),
        ("full-tile-cosine", torch.bfloat16),
        ("tiled", torch.bfloat16),
        ("tiled-divisible-cosine", torch.bfloat16),
    ],
)
def test_half_precision_maps_with_float_parameters(name, dtype) -> None:
    """Inputs are rounded first, so that only the arithmetic differs."""
    setting = {**ONE_TILE, **TILED}[name]
    forward, backward = errors(setting, dtype)
    assert forward < LIMITS[dtype]
    assert backward < 4 * LIMITS[dtype]


@pytest.mark.parametrize("name", ["packed", "seven", "tiled"])
def test_programs_that_take_several_groups(name, monkeypatch) -> None:
    """The last program of a head has fewer tiles than the others."""
    monkeypatch.setattr(ours, "FORWARD_PROGRAMS", 4)
    monkeypatch.setattr(ours, "BACKWARD_PROGRAMS", 4)
    setting = {**ONE_TILE, **TILED}[name] | {"batch": 2 if name == "packed" else 3}
    assert max(errors(setting)) < 4 * LIMITS[torch.float32]


@pytest.mark.parametrize("given", [(0,), (0, 1), (0, 2), (0, 3)])
@pytest.mark.parametrize("name", ["packed", "tiled"])
def test_optional_inputs(given, name) -> None:
    setting = {**ONE_TILE, **TILED}[name]
    tensors = [t if i in given else None for i, t in enumerate(inputs(setting))]
    assert worst(kernel(setting, tensors), definition(setting, tensors)) < 4 * LIMITS[torch.float32]


@pytest.mark.parametrize("index", range(4))
def test_gradient_of_one_input_alone(index) -> None:
    setting = ONE_TILE["packed"]
    tensors = inputs(setting)
    tensors[index].requires_grad_()
    with interpreted(), poisoned():
        out = op(ours.window_attention, setting)(*tensors)
        out.pow(2).sum().backward()
    exact = [t.detach().double() for t in tensors]
    exact[index].requires_grad_()
    op(reference.window_attention, setting)(*exact).pow(2).sum().backward()
    assert relative(tensors[index].grad, exact[index].grad) < 4 * LIMITS[torch.float32]


@pytest.mark.parametrize("name", ["packed", "tiled"])
def test_the_same_bits_every_time_and_no_atomics(name) -> None:
    setting = {**ONE_TILE, **TILED}[name] | {"batch": 1}
    tensors = inputs(setting)
    first, second = kernel(setting, tensors), kernel(setting, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(
        "atomic" in vars(module)[n].src for module in (kernels, tiled) for n in dir(module) if "_kernel" in n
    )


def test_views_are_taken_as_they_are() -> None:
    setting = ONE_TILE["packed"]
    tensors = inputs(setting)
    want = definition(setting, tensors)
    tensors[0] = tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    tensors[1], tensors[2] = tensors[1].t().contiguous().t(), torch.stack((tensors[2], tensors[2]), 1)[:, 1]
    assert not any(t.is_contiguous() for t in tensors[:3])
    assert worst(kernel(setting, tensors), want) < 4 * LIMITS[torch.float32]


# ------------------------------------------------------------------------------------------------------------- traffic


def launches(setting: dict[str, Any]) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The meter, what went in (qkv, gradient of the output, output) and what came out (output, lse, gradients)."""
    qkv, bias, pad, scale = inputs(setting)
    options = (
        1.0, HEADS, setting["window"], setting["shift"], setting["interval"], setting["mask_padding"], setting["cosine"]
    )  # fmt: skip
    with interpreted(), metered() as forward:
        out, lse = ours.launch_forward(qkv, bias, pad, scale, *options)
    grad = torch.randn_like(out)
    with interpreted(), metered() as backward:
        grads = ours.launch_backward(grad, qkv, bias, pad, scale, out, lse, *options, (True, True, True))
    return (forward, backward), [qkv, grad, out], [out, lse, *grads]


@pytest.mark.parametrize("name", ["packed", "seven", "seven-divisible", "full-tile-cosine", "dilated", "grid"])
def test_groups_of_one_tile_are_read_once_and_written_once(name) -> None:
    (forward, backward), (qkv, grad, out), (_, lse, grad_qkv, *_) = launches(ONE_TILE[name])
    assert forward.read_counts(qkv).eq(1).all()
    assert forward.write_counts(out).eq(1).all()
    assert forward.write_counts(lse).eq(1).all()
    assert backward.read_counts(qkv).eq(1).all()
    assert backward.read_counts(grad).eq(1).all()
    assert backward.read_counts(out).eq(0).all()
    assert backward.write_counts(grad_qkv).eq(1).all()


@pytest.mark.parametrize("name", TILED)
def test_tiled_groups_read_what_their_tiles_demand(name) -> None:
    setting = TILED[name]
    (forward, backward), (qkv, _, out), (_, lse, grad_qkv, *_) = launches(setting)
    q, k, v = forward.read_counts(qkv).chunk(3, -1)
    tiles = -(-setting["window"][0] * setting["window"][1] // 64)
    assert q.eq(1).all()
    assert torch.cat((k, v)).eq(tiles).all()
    assert forward.write_counts(out).eq(1).all()
    assert forward.write_counts(lse).eq(1).all()
    assert backward.read_counts(out).eq(1).all()
    assert backward.write_counts(grad_qkv).eq(1).all()


@pytest.mark.parametrize("name", ["packed", "tiled"])
def test_training_keeps_inputs_output_and_log_sum_exp(name) -> None:
    setting = {**ONE_TILE, **TILED}[name]
    tensors = [t.requires_grad_() for t in inputs(setting)]
    groups, tokens = ours._groups(tensors[0], setting["window"], setting["interval"]), setting["window"]
    out = tensors[0].numel() // 3 * 4
    with interpreted():
        kept = saved_bytes(lambda: op(ours.window_attention, setting)(*tensors), skip=tensors)
    assert kept == out + groups * HEADS * tokens[0] * tokens[1] * 4


# ----------------------------------------------------------------------------------------------------------- mutations

FORWARD, BACKWARD = kernels._window_attention_fwd_kernel, kernels._window_attention_bwd_kernel
FORWARD_TILED, BACKWARD_Q = tiled._window_attention_fwd_tiled_kernel, tiled._window_attention_bwd_q_kernel
BACKWARD_KV, BACKWARD_BIAS = tiled._window_attention_bwd_kv_kernel, tiled._window_attention_bwd_bias_kernel
MUTATIONS = {
    "seam one row late": (kernels._locate, "y >= padded_h - shift_h", "y > padded_h - shift_h", "packed"),
    "shifted by one more": (kernels._locate, "x += shift_w", "x += shift_w + 1", "packed"),
    "not wrapped around": (kernels._locate, "tl.where(y >= padded_h, y - padded_h, y)", "y", "packed"),
    "interval forgotten": (kernels._locate, "+ block % interval_h", "", "dilated"),
    "padded keys not masked": (kernels._mask, "tl.where(outside, PADDING, 0.0)", "0.0", "dilated"),
    "mask of queries": (kernels._mask, "row_side[:, None] != column_side[None, :]", "row_side[:, None] > 0", "packed"),
    "zeros for padding": (kernels._load_part, "fill[None, :]", "0.0", "packed"),
    "no guard of the norm": (kernels._through_norm, "grad - unit", "grad + unit", "full-tile-cosine"),
    "no bias": (FORWARD, "scores += bias", "scores += bias * 0", "seven"),
    "bias by key - query": (FORWARD, "index[:, None] - index[None, :]", "index[None, :] - index[:, None]", "seven"),
    "groups of a tile mixed": (FORWARD, "(slot[:, None] == slot[None, :]) & ", "", "packed"),
    "one scale": (FORWARD, "tl.load(scale + head)", "tl.load(scale)", "packed"),
    "no sum of the row": (kernels._bwd_queries, "- tl.sum(prob * dprob, 0)[None, :]", "", "packed"),
    "keys not scaled": (BACKWARD, "dk *= factor", "dk *= 1.0", "packed"),
    "second half of the queries": (BACKWARD, "QUERIES, QUERIES, WINDOW_H", "0, QUERIES, WINDOW_H", "seven"),
    "padding inside counted": (BACKWARD, "tl.where(outside[:, None], dv, 0.0)", "dv", "packed"),
    "no rescaling": (FORWARD_TILED, "o * keep[:, None]", "o", "tiled"),
    "keys beyond the group": (FORWARD_TILED, "tl.where(real_k[None, :], scores, NEVER)", "scores", "tiled"),
    "bias by key - query, tiled": (tiled._bias, "rows + middle + index", "rows + middle - index", "tiled"),
    "queries without mean": (BACKWARD_Q, "dprob - mean[:, None]", "dprob", "tiled"),
    "values of other queries": (BACKWARD_KV, "tl.trans(do)", "tl.trans(q)", "tiled"),
    "last group only": (BACKWARD_BIAS, "score_sum += prob", "score_sum = prob", "tiled"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_sees_a_wrong_kernel(name, monkeypatch) -> None:
    monkeypatch.setattr(ours, "BACKWARD_PROGRAMS", 1)
    function, old, new, which = MUTATIONS[name]
    setting = {**ONE_TILE, **TILED}[which] | ({"batch": 3} if function is BACKWARD_BIAS else {})
    with mutated(function, old, new):
        assert max(errors(setting)) > 1e-3


# --------------------------------------------------------------------------------------------------------- integration


@pytest.mark.parametrize("name", ["packed", "full-tile-cosine", "tiled"])
@pytest.mark.parametrize("interpreter", [True, False], ids=["interpreter", "plain"])
def test_opcheck(name, interpreter) -> None:
    setting = {**ONE_TILE, **TILED}[name]
    qkv, bias, pad, scale = inputs(setting)
    rest = (
        HEADS, setting["window"], setting["shift"], setting["interval"], setting["mask_padding"], setting["cosine"]
    )  # fmt: skip
    wanted = ["test_schema", "test_faketensor"] + (["test_autograd_registration"] if name == "packed" else [])
    with interpreted() if interpreter else contextlib.nullcontext():
        leaves = [t.requires_grad_() for t in (qkv, bias, pad, scale)]
        torch.library.opcheck(torch.ops.striate.window_attention, (*leaves, 1.0, *rest), test_utils=wanted)
        with torch.no_grad():
            out, lse = torch.ops.striate.window_attention(qkv, bias, pad, scale, 1.0, *rest)
            arguments = (out, qkv, bias, pad, scale, out.clone(), lse, 1.0, *rest, [True, True, False])
        torch.library.opcheck(torch.ops.striate.window_attention_backward, arguments, test_utils=wanted[:2])


@pytest.mark.parametrize("name", [*ONE_TILE, *TILED])
def test_on_a_cpu_without_interpreter(name) -> None:
    setting = {**ONE_TILE, **TILED}[name]
    tensors = inputs(setting)
    got = run(op(ours.window_attention, setting), tensors)
    assert worst(got, definition(setting, tensors)) < 4 * LIMITS[torch.float32]


def test_compile_as_one_graph_for_any_size() -> None:
    torch.compiler.reset()
    setting = ONE_TILE["packed"]
    call = op(ours.window_attention, setting)
    graph = torch.compile(call, fullgraph=True, backend="aot_eager")

    def compiled(qkv: Tensor, *others: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(qkv, (1, 2))  # fails if the graph would serve one size only
        return graph(qkv, *others)

    with interpreted():
        for size in [(7, 9), (6, 8)]:
            tensors = inputs(setting | {"size": size})
            want = definition(setting, tensors)
            assert worst(run(compiled, tensors), want) < 4 * LIMITS[torch.float32]


def test_activation_checkpointing_and_autocast() -> None:
    setting = ONE_TILE["packed"]
    call = op(ours.window_attention, setting)
    tensors = inputs(setting)
    weight = torch.eye(tensors[0].shape[-1])

    def model(qkv: Tensor, *others: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = call(torch.nn.functional.linear(qkv, weight), *others)
        assert out.dtype == torch.bfloat16
        return out.float()

    with interpreted():
        got = run(lambda *args: checkpoint(model, *args, use_reentrant=False), tensors)
        plain = run(model, tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert worst(got, definition(setting, tensors)) < 4 * LIMITS[torch.bfloat16]


def test_second_derivatives_are_refused() -> None:
    qkv, *others = inputs(ONE_TILE["divisible"])
    qkv.requires_grad_()
    out = op(ours.window_attention, ONE_TILE["divisible"])(qkv, *others)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="window_attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"qkv": torch.empty(1, 4, 4, 24, dtype=torch.float64)}, "float64"),
        ({"qkv": torch.empty(1, 4, 4, 6 * 129)}, "heads of 129 channels, more than 128"),
        ({"window": (16, 17)}, "windows of 16x17 tokens, more than 256"),
        ({"window": (16, 16)}, ""),
        ({"qkv": torch.empty(1, 2**14, 2**14, 24, device="meta")}, "2\\^31 or more"),
        ({"qkv": torch.empty(0, 4, 4, 24)}, "an empty map"),
        ({"pad": torch.empty(24, device="meta")}, "several devices"),
        ({"scale": torch.empty(2, dtype=torch.float64)}, "float64"),
    ],
)
def test_obstacles(change, reason) -> None:
    arguments = {
        "qkv": torch.empty(1, 4, 4, 24), "bias": None, "num_heads": 2, "window": (4, 4), "shift": (0, 0),
        "interval": (1, 1), "mask_padding": False, "scale": 1.0, "cosine": False, "pad": None, **change,
    }  # fmt: skip
    said = ours.obstacle(**arguments)
    assert (reason.replace("\\", "") in said) if reason else said == ""


def test_configurations_have_names_of_their_own() -> None:
    labels = [label for label, _ in ours.configurations()]
    assert len(set(labels)) == len(labels) > 10


@pytest.mark.parametrize("name", ["packed", "seven", "full-tile-cosine"])
def test_small_groups_on_the_tiled_backward(name, monkeypatch) -> None:
    """What a GPU runs where the kernel of one tile would spill; the interpreter has no registers to spill."""
    monkeypatch.setattr(ours, "_backward_in_one_tile", lambda arguments: False)
    _, gradients = errors(ONE_TILE[name])
    assert gradients < 4 * LIMITS[torch.float32]


@pytest.mark.parametrize(
    ("target", "dtype", "cosine", "side", "whole"),
    [
        ("sm_90", torch.bfloat16, False, 7, True),
        ("sm_90", torch.float32, False, 7, False),
        ("gfx942", torch.float32, False, 7, True),
        ("sm_80", torch.bfloat16, True, 8, False),
        ("sm_80", torch.bfloat16, True, 4, True),
        ("sm_100", torch.bfloat16, True, 8, True),
        ("sm_90", torch.bfloat16, False, 9, False),
        ("interpreter", torch.float32, True, 8, True),
    ],
)
def test_which_backward_takes_small_groups(target, dtype, cosine, side, whole) -> None:
    arguments = {"qkv": torch.empty(1, dtype=dtype), "WINDOW_H": side, "WINDOW_W": side, "COSINE": cosine}
    with _triton.forced_target(target):
        assert ours._backward_in_one_tile(arguments) == whole
