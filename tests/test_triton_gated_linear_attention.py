"""The Triton kernels of gated linear attention, in the interpreter, against the recurrence in float64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers import relative, run, worst
from striate.ops.gated_linear_attention import kernels, reference
from striate.ops.gated_linear_attention import triton as path
from triton_tools import OutOfBoundsError, interpreted, metered, mutated, poisoned

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # rounding a result to bfloat16: 4e-3
STRENGTHS = [0.1, 3.0, 60.0]  # of the gates: as in models; a chunk decays beyond float32; a token nearly does
SCALE = 0.3


def inputs(
    n: int, strength: float = 0.1, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (1, 2),
    key_dim: int = 4, value_dim: int = 5, gates: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(n)
    sizes = [(shape[0], n, shape[1], dim) for dim in (key_dim, key_dim, value_dim, key_dim, key_dim)]
    q, k, v, gate, back = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    gate, back = (torch.nn.functional.logsigmoid(g) * strength for g in (gate, back))
    return [t.to(dtype) for t in (q, k, v)] + [t.to(gates or dtype) for t in (gate, back)]


def op(*tensors: Tensor) -> Tensor:
    return path.gated_linear_attention(*tensors, SCALE)


def exact(tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients of the definition, for the gradient that `run` sends into an output of this dtype."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    out = reference.gated_linear_attention(*leaves, SCALE)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    probe = probe.to(tensors[2].dtype).double()
    return [out, *torch.autograd.grad(out, leaves, probe, materialize_grads=True)]


def kernel_run(tensors: list[Tensor]) -> list[Tensor]:
    with interpreted(), poisoned():
        return run(op, tensors)


def check(tensors: list[Tensor], tolerance: float = TOLERANCE[torch.float32]) -> None:
    got = kernel_run(tensors)
    assert [g.dtype for g in got] == [tensors[2].dtype, *(t.dtype for t in tensors)]
    assert worst(got, exact(tensors)) < tolerance


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("n", [2, 31, 65])
def test_output_and_gradients_equal_the_recurrence(n, strength) -> None:
    check(inputs(n, strength))


def test_one_token_passes_no_gate() -> None:
    tensors = inputs(1)
    got, want = kernel_run(tensors), exact(tensors)
    assert worst(got[:4], want[:4]) < TOLERANCE[torch.float32]
    assert not torch.stack(got[4:]).any()


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_with_the_float32_gates_of_autocast(dtype, strength) -> None:
    check(inputs(100, strength, dtype, gates=torch.float32), TOLERANCE[dtype])


def test_16_bit_gates() -> None:
    check(inputs(70, dtype=torch.float16), TOLERANCE[torch.float16])
    check(inputs(70, dtype=torch.bfloat16), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 8), (16, 32), (32, 64), (24, 40), (100, 128), (128, 7)])
def test_head_dims(key_dim, value_dim) -> None:
    check(inputs(40, key_dim=key_dim, value_dim=value_dim, shape=(1, 1)))


def test_images_and_heads() -> None:
    check(inputs(40, shape=(2, 3)))


def test_segments_of_chunks(monkeypatch) -> None:
    short_chunks(monkeypatch)
    tensors = inputs(110, shape=(1, 1))
    with interpreted():
        assert path.Plan(*tensors, backward=False).segments == 3
    check(tensors)


def test_parts_of_a_projection_are_read_in_place() -> None:
    q, k, v, gate, back = inputs(40, key_dim=8, value_dim=16)
    joint = torch.cat([t.flatten(2) for t in (q, k, v)], -1)
    parts = [t.unflatten(-1, (2, -1)) for t in joint.split([16, 16, 32], -1)]
    gates = [t.unflatten(-1, (2, -1)) for t in torch.cat([gate.flatten(2), back.flatten(2)], -1).chunk(2, -1)]
    assert not any(t.is_contiguous() for t in (*parts, *gates))
    assert worst(kernel_run([*parts, *gates]), kernel_run([q, k, v, gate, back])) == 0
    with interpreted(), metered() as meter:
        path.launch_forward(*parts, *gates, SCALE)
    assert meter.reads(joint) > 0


def test_mixed_dtypes() -> None:
    dtypes = torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16
    check([t.to(dtype) for t, dtype in zip(inputs(40), dtypes, strict=True)], TOLERANCE[torch.bfloat16])


def test_any_strides() -> None:
    tensors = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in inputs(40)]
    assert worst(kernel_run(tensors), kernel_run(inputs(40))) == 0


@pytest.mark.parametrize("strong", [-1e4, float("-inf")])
def test_one_strong_gate_leaves_the_digits_of_the_weak_ones(strong) -> None:
    tensors = inputs(100)
    for gate in tensors[3:]:
        gate[:, 50] = strong
    got, want = kernel_run(tensors), exact([t.clamp_min(-1e4) for t in tensors])
    assert worst(got, want) < TOLERANCE[torch.float32]
    assert got[4][:, 50].abs().max() < 1e-5


def test_states_beyond_the_range_of_float16() -> None:
    tensors = inputs(150, 1e-3, torch.float16, shape=(1, 1), gates=torch.float32)
    q, k, v = tensors[:3]
    q.mul_(1e-3)
    k.abs_().mul_(30)
    v.abs_().mul_(100)
    assert relative(kernel_run(tensors)[0], exact(tensors)[0]) < TOLERANCE[torch.float16]
    assert torch.einsum("bnhk,bnhv->bhkv", k.float(), v.float()).max() > 65504 * 4


def test_the_same_bits_every_time() -> None:
    tensors = inputs(70, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(kernel_run(tensors), kernel_run(tensors), strict=True))


def test_every_tensor_is_read_and_written_once_where_one_chunk_holds_all() -> None:
    tensors = inputs(16)
    dout = torch.randn_like(tensors[2])
    with interpreted(), metered() as meter:
        out = path.launch_forward(*tensors, SCALE)
    assert all((meter.read_counts(t) == 1).all() for t in tensors)
    assert (meter.write_counts(out) == 1).all()
    with interpreted(), metered() as meter:
        grads = path.launch_backward(dout, *tensors, SCALE)
    assert all((meter.read_counts(t) == 1).all() for t in (*tensors, dout))
    assert all((meter.write_counts(t) == 1).all() for t in grads)


def test_the_walk_through_the_chunks_reads_once_more_per_direction() -> None:
    tensors = inputs(120, shape=(1, 1))
    q, k, v = tensors[:3]
    dout = torch.randn_like(v)
    with interpreted(), metered() as meter:
        out = path.launch_forward(*tensors, SCALE)
    assert [int(meter.reads(t)) for t in (q, k, v)] == [1, 3, 3]
    assert (meter.write_counts(out) == 1).all()
    with interpreted(), metered() as meter:
        grads = path.launch_backward(dout, *tensors, SCALE)
    assert [int(meter.reads(t)) for t in (q, k, v, dout)] == [3, 3, 3, 3]
    assert all((meter.write_counts(t) == 1).all() for t in grads)


STATE, SCAN = kernels._gated_linear_attention_state_kernel, kernels._gated_linear_attention_scan_kernel
FORWARD, BACKWARD = kernels._gated_linear_attention_fwd_kernel, kernels._gated_linear_attention_bwd_kernel
MUTATIONS = [
    (STATE, "state * tl.exp2(total)[:, None] + gain", "state + gain"),  # a chunk loses its decay
    (STATE, "tl.where(kind >= 2, 0, 1)", "0"),  # a key decays with its own gate
    (STATE, "tl.where(descends, chunks - 1 - step, step)", "step"),  # both directions forward
    (SCAN, "tl.exp2(factors[i])[:, None] * state", "state"),  # a segment loses its decay
    (kernels._entering, "kind == 1 or kind == 2", "kind == 1"),  # a gradient from the wrong segment
    (kernels._neighbours, "row >> level", "(row + 1) >> level"),  # every border shifted by one token
    (kernels._widen, "tl.where(right, reverse_beside, 0.0)", "0.0"),
    (kernels._load, "token < tokens", "token < tokens - 1"),  # the last token dropped
    (kernels._load, "token < tokens", "token < tokens + 1"),  # and one beyond it read
    (FORWARD, "2 * tl.sum(query * key, 1)", "tl.sum(query * key, 1)"),  # the diagonal counted once
    (BACKWARD, "2 * tl.sum(tl.where(same", "tl.sum(tl.where(same"),
    (BACKWARD, "tl.cumsum(slopes, 0, reverse=True)", "tl.cumsum(slopes, 0)"),
    (BACKWARD, "tl.exp2(gate_total) * around", "around"),  # pairs around a chunk lose its decay
    (BACKWARD, "tl.cumsum(y, 0) - y", "tl.cumsum(y, 0)"),  # a gate decays its own key
]


def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in each of several segments with few tokens."""
    monkeypatch.setattr(path, "MAX_SEGMENTS", 3)
    monkeypatch.setattr(path, "MIN_CHUNKS", 1)
    launch = path.Launch(16, 4, 4)
    monkeypatch.setitem(path.TABLE, "sm_80", {key: {32: (launch, launch)} for key in path.DTYPES})


@pytest.mark.parametrize(
    ("dtype", "kernel", "old", "new"),
    [(torch.float32, *m) for m in MUTATIONS] + [(torch.bfloat16, *m) for m in MUTATIONS[::3]],
)
def test_the_comparison_sees_a_wrong_kernel(dtype, kernel, old, new, monkeypatch) -> None:
    short_chunks(monkeypatch)
    tensors = inputs(70, dtype=dtype, shape=(1, 1), gates=torch.float32)
    with mutated(kernel, old, new):
        try:
            got = kernel_run(tensors)
        except OutOfBoundsError:
            return
    assert worst(got, exact(tensors)) > TOLERANCE[dtype]


def test_the_kernel_of_the_mutations_is_right_without_them(monkeypatch) -> None:
    short_chunks(monkeypatch)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check(inputs(70, dtype=dtype, shape=(1, 1), gates=torch.float32), TOLERANCE[dtype])


@pytest.mark.parametrize("interpreter", [True, False], ids=["interpreter", "plain"])
def test_opcheck(interpreter) -> None:
    tensors = [t.requires_grad_() for t in inputs(20)]
    with interpreted() if interpreter else contextlib.nullcontext():
        torch.library.opcheck(torch.ops.striate.gated_linear_attention.default, (*tensors, SCALE))
        plain = [t.detach() for t in tensors]
        dout = torch.randn_like(plain[2])
        backward = torch.ops.striate.gated_linear_attention_backward.default
        torch.library.opcheck(backward, (dout, *plain, SCALE))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("n", [1, 16, 31, 65])
def test_the_operator_on_a_cpu_without_interpreter(n, strength) -> None:
    """A graph that was exported on a GPU trains without one: in float64 nothing but the order of sums differs."""
    tensors = inputs(n, strength, torch.float64, shape=(2, 3))
    assert worst(run(op, tensors), exact(tensors)) < 1e-13
    tensors = inputs(n, strength, torch.bfloat16, gates=torch.float32)
    got = run(op, tensors)
    assert [g.dtype for g in got] == [tensors[2].dtype, *(t.dtype for t in tensors)]
    assert worst(got, exact(tensors)) < TOLERANCE[torch.bfloat16]
    tensors = inputs(n, strength)
    assert worst(run(op, tensors)[1:], exact(tensors)[1:]) < TOLERANCE[torch.float32]


def test_compiles_whole_for_changing_sizes() -> None:
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    with interpreted():
        for n in (20, 33):
            tensors = inputs(n)
            assert worst(run(compiled, tensors), run(op, tensors)) == 0


def test_exported_programs_run_without_triton() -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return op(*tensors)

    tensors = inputs(40)
    program = torch.export.export(Module(), tuple(tensors)).module()
    assert relative(program(*tensors), exact(tensors)[0]) < TOLERANCE[torch.float32]


def test_activation_checkpointing() -> None:
    tensors = inputs(20)

    def recomputed(*leaves: Tensor) -> Tensor:
        return checkpoint(op, *leaves, use_reentrant=False)

    with interpreted():
        assert worst(run(recomputed, tensors), run(op, tensors)) == 0


def test_autocast_mixes_dtypes() -> None:
    tensors = inputs(40, dtype=torch.bfloat16, gates=torch.float32)
    with interpreted(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(op, tensors)
    assert worst(got, kernel_run(tensors)) == 0


def test_a_second_derivative_is_refused() -> None:
    tensors = [t.requires_grad_() for t in inputs(4)]
    with interpreted():
        (grad,) = torch.autograd.grad(op(*tensors).sum(), tensors[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def change(index: int, **tensor: Any) -> list[Tensor]:
    tensors = inputs(4)
    tensors[index] = torch.ones(tensor.pop("size", tensors[index].shape), **tensor)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (change(4, dtype=torch.float64), "dtype torch.float64"),
        (inputs(4, key_dim=129), "head dims 129 and 5, the largest is 128"),
        (inputs(4, value_dim=200), "head dims 4 and 200"),
        (inputs(4, shape=(0, 2)), "an empty tensor"),
        ([t.to("meta").expand(-1, 2**30, -1, -1) for t in inputs(1)], "2^31 elements"),
        (inputs(4), ""),
    ],
)
def test_obstacles_are_named(tensors, reason) -> None:
    said = path.obstacle(*tensors, SCALE)
    assert reason in said if reason else said == ""
