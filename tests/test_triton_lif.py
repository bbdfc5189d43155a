"""The Triton kernels of spiking neurons, in the interpreter, against the definition in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers import relative, run, saved_bytes, worst
from striate.ops import explain, lif, multispike
from striate.ops.lif import kernels, reference
from striate.ops.lif import triton as path
from striate.ops.lif.reference import Neuron
from triton_tools import OutOfBoundsError, interpreted, metered, mutated, poisoned

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # rounding a result to bfloat16: 4e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "soft reset": dict(reset=None),
    "reset elsewhere": dict(reset=-0.3),
    "no leak": dict(tau=None),
    "no leak, soft reset": dict(tau=None, reset=None, initial=0.5),
    "leak of the state alone": dict(decay_input=False),
    "leak of the state alone, to a reset elsewhere": dict(decay_input=False, reset=0.2, tau=3.0),
    "tau no power of two": dict(tau=3.0),
    "attached": dict(detach_reset=False),
    "attached, soft reset": dict(detach_reset=False, reset=None),
    "attached, reset elsewhere": dict(detach_reset=False, reset=0.3, tau=3.0, decay_input=False),
    "atan": dict(surrogate="atan"),
    "sharpness": dict(surrogate="atan", alpha=5.0),
    "threshold and first potential": dict(threshold=0.7, initial=0.4),
}

FORWARD, BACKWARD = kernels._lif_fwd_kernel, kernels._lif_bwd_kernel


def currents(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 2).to(dtype)


def exact(definition: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and gradient of the definition in float64, for the gradient that `run` sends into an output like `x`."""
    leaf = x.double().requires_grad_()
    out = definition(leaf)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaf, probe.to(x.dtype).double())]


def defined(options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    alpha = 2.0 if options.get("surrogate") == "atan" else 4.0
    return lambda x: reference.lif(x, Neuron(**{"alpha": alpha, **options}))


def kernel_run(options: dict[str, Any], x: Tensor) -> list[Tensor]:
    with interpreted(), poisoned():
        return run(lambda x: lif(x, **options), [x])


def agrees(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> bool:
    """Every spike the same, and the gradients up to rounding."""
    return torch.equal(got[0].double(), want[0]) and relative(got[1], want[1]) < TOLERANCE[dtype]


def check(options: dict[str, Any], x: Tensor) -> Tensor:
    got, want = kernel_run(options, x), exact(defined(options), x)
    assert [g.dtype for g in got] == [x.dtype] * 2
    assert agrees(got, want, x.dtype)
    assert 0.02 < want[0].mean() < 0.98
    return got[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options, dtype) -> None:
    x = currents(5, 3, 211, dtype=dtype)
    spikes = check(options, x)
    assert torch.equal(spikes, defined(options)(x.float()).to(dtype)), "float32 inside"


def test_rounding_every_step_to_16_bits_would_make_other_spikes() -> None:
    x = currents(5, 3, 531, dtype=torch.bfloat16)
    assert not torch.equal(check({}, x), defined({})(x))


@pytest.mark.parametrize("options", [{}, OPTIONS["attached, reset elsewhere"]], ids=["default", "attached"])
@pytest.mark.parametrize(("steps", "neurons"), [(1, 531), (2, 513), (16, 300), (17, 30), (33, 257), (35, 31)])
def test_any_number_of_steps(steps, neurons, options) -> None:
    check(options, currents(steps, neurons, dtype=torch.bfloat16 if steps > 33 else torch.float32))


@pytest.mark.parametrize("shape", [(4,), (3, 1), (4, 512), (2, 3, 5, 7, 11)])
def test_any_shape(shape) -> None:
    assert agrees(kernel_run({}, currents(*shape)), exact(defined({}), currents(*shape)), torch.float32)


@pytest.mark.parametrize("shape", [(4, 0), (3, 0, 5)])
def test_nothing_at_all(shape) -> None:
    assert [t.shape for t in kernel_run({}, currents(*shape))] == [shape, shape]


def test_ties_and_numbers_that_are_none() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[2.0, 1.9999999, 3e38, -inf, nan, inf, -0.0], [0.0, 2.0, 1.0, 1.0, 9.0, 9.0, 2.0]])
    spikes, grad = kernel_run({}, x)
    assert spikes.tolist() == [[1, 0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1]]
    assert grad.isnan()[:, 4].all()
    assert kernel_run(dict(tau=107.0), torch.tensor([[107.0, 106.9999]]))[0].tolist() == [[1, 0]]


# ----------------------------------------------------------------------------------------------------------- layout


def layouts() -> dict[str, Tensor]:
    return {
        "channels last": currents(4 * 2, 6, 5, 7).to(memory_format=torch.channels_last).unflatten(0, (4, 2)),
        "transposed": currents(4, 9, 31).transpose(1, 2),
        "one step of many": currents(3, 9, 31)[1:2].transpose(1, 2),
        "size one": currents(4, 9, 1, 31).transpose(1, 2),
    }


@pytest.mark.parametrize("name", layouts())
def test_steps_without_gaps_are_read_in_place(name) -> None:
    x = layouts()[name]
    got, want = kernel_run({}, x), kernel_run({}, x.contiguous())
    assert worst(got, want) == 0
    assert [t.stride() for t in got] == [x.stride()] * 2
    with interpreted(), metered() as meter:
        path.launch_forward(x, Neuron())
        assert (meter.read_counts(x) == 1).all()
        grad = torch.empty_like(x).normal_()
        path.launch_backward(grad, x, Neuron())
        assert (meter.read_counts(x) == 2).all()
        assert (meter.read_counts(grad) == 1).all()


@pytest.mark.parametrize(
    "x",
    [currents(9, 4, 31).transpose(0, 1), currents(4, 9, 62)[..., ::2], currents(4, 9, 62)[..., :31],
     currents(4, 18, 31)[:, :9], currents(8, 9, 31)[::2], currents(4, 1, 31).expand(4, 9, 31)],
    ids=["time inside", "every other", "part of the rows", "part of the steps", "every other step", "expanded"],
)  # fmt: skip
def test_other_layouts_are_copied(x) -> None:
    got = kernel_run({}, x)
    assert worst(got, kernel_run({}, x.contiguous())) == 0
    assert all(t.is_contiguous() for t in got)


def test_gradients_of_any_layout() -> None:
    x = layouts()["channels last"]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    one = torch.ones(())
    with interpreted():
        want = path.launch_backward(grad, x.contiguous(), Neuron())
        assert torch.equal(path.launch_backward(grad, x, Neuron()), want)
        ones = path.launch_backward(torch.ones_like(x), x, Neuron())
        assert torch.equal(path.launch_backward(one.expand_as(x), x, Neuron()), ones)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("steps", [4, 16])
def test_every_element_is_read_and_written_once(steps, dtype) -> None:
    x, grad = currents(steps, 531, dtype=dtype), currents(steps, 531, dtype=dtype)
    with interpreted(), metered() as meter:
        spikes = path.launch_forward(x, Neuron())
    assert (meter.read_counts(x) == 1).all()
    assert (meter.write_counts(spikes) == 1).all()
    assert meter.bytes_read == meter.bytes_written == x.numel() * x.element_size()
    with interpreted(), metered() as meter:
        grad_x = path.launch_backward(grad, x, Neuron())
    assert (meter.read_counts(x) == 1).all()
    assert (meter.read_counts(grad) == 1).all()
    assert (meter.write_counts(grad_x) == 1).all()
    assert meter.bytes_read == 2 * meter.bytes_written == 2 * x.numel() * x.element_size()


def test_a_long_backward_reads_its_input_twice_but_for_the_last_segment() -> None:
    x, grad = currents(35, 31), currents(35, 31)
    assert path.segments(35) == (3, 12)
    with interpreted(), metered() as meter:
        spikes = path.launch_forward(x, Neuron())
    assert (meter.read_counts(x) == 1).all()
    assert (meter.write_counts(spikes) == 1).all()
    with interpreted(), metered() as meter:
        grad_x = path.launch_backward(grad, x, Neuron())
    assert (meter.read_counts(x[:24]) == 2).all()
    assert (meter.read_counts(x[24:]) == 1).all()
    assert (meter.read_counts(grad) == 1).all()
    assert (meter.write_counts(grad_x) == 1).all()
    assert meter.bytes_written == (35 + 2) * 31 * 4


def test_training_keeps_the_input_alone() -> None:
    x = currents(4, 100).requires_grad_()
    with interpreted():
        assert saved_bytes(lambda: lif(x), skip=[x]) == 0
        assert saved_bytes(lambda: multispike(x), skip=[x]) == 0


@pytest.mark.parametrize("backward", [False, True])
def test_more_than_2_to_the_31_elements(backward) -> None:
    """One program of many, on memory that nothing else touches; in place, as a segment is read before it is written."""
    neurons, lanes = 2**31 // 15 + 16, 256
    x = torch.empty(16, neurons, dtype=torch.float16)
    x[:, :lanes] = currents(16, lanes)
    little = x[:, :lanes].clone()
    tensors, numbers, constants = (x, x), path._numbers(Neuron()), path._constants(x, Neuron()) | dict(BLOCK=lanes)
    if backward:
        tensors, numbers = (x, x, x, torch.empty(0)), (*numbers, 4.0)
        constants |= dict(DETACH=True, SURROGATE="sigmoid")
    kernel = BACKWARD if backward else FORWARD
    with interpreted():
        kernel[(1,)](*tensors, neurons, *numbers, **constants)
        want = path.launch_backward(little, little, Neuron()) if backward else path.launch_forward(little, Neuron())
        assert torch.equal(x[:, :lanes], want)
        with mutated(kernel, "tl.cast(neurons, tl.int64)", "neurons"), pytest.raises(OutOfBoundsError):
            kernel[(1,)](*tensors, neurons, *numbers, **constants)


def test_the_same_bits_every_time() -> None:
    x = currents(20, 300, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(kernel_run({}, x), kernel_run({}, x), strict=True))


# --------------------------------------------------------------------------------------------------------- mutations

CHARGE, FIRE, RESET = kernels._charge, kernels._fire, kernels._reset
SLOPE, BACK = kernels._slope, kernels._step_back
ATTACHED = OPTIONS["attached, reset elsewhere"]
MUTATIONS = [
    ({}, RESET, "(1.0 - spikes) * charged", "charged"),  # no reset
    ({}, FIRE, "charged >= threshold", "charged >= threshold + 0.02"),
    (dict(reset=-0.3), RESET, "spikes * rest", "0.0"),  # a reset to 0
    (dict(reset=None), RESET, "charged - spikes * threshold", "charged * (1.0 - spikes)"),  # hard instead of soft
    ({}, CHARGE, "current - (potential - rest)", "current"),  # the decay dropped
    (dict(reset=-0.3), CHARGE, "current - (potential - rest)", "current - potential"),  # decay to 0
    (dict(decay_input=False), CHARGE, "_leaked(potential - rest", "_leaked(0.0 * potential"),
    (dict(tau=None), CHARGE, "potential + current", "current"),
    (dict(tau=3.0), kernels._leaked, "tl.div_rn(x, tau)", "x * tau"),
    (dict(initial=0.4), FORWARD, "+ initial", ""),
    ({}, FORWARD, "currents[i]", "currents[(i + 1) % STEPS]"),  # time shifted
    ({}, FORWARD, "inside & (first + i < T))\n", "inside & (first + i < T - 1))\n"),  # the last step not written
    ({}, BACKWARD, "grads[i]", "grads[0]"),
    ({}, BACKWARD, "potentials[i]", "potentials[0]"),
    ({}, BACK, "grad_v *= 1.0 - _fire(charged, threshold)", "grad_v *= 1.0"),  # through the reset
    ({}, BACK, "grad_v -= leaked", "grad_v -= 0.0"),  # the decay dropped
    (dict(tau=3.0), BACK, "grad_current = leaked", "grad_current = grad_v"),
    ({}, BACK, "if not DETACH", "if DETACH"),
    (ATTACHED, BACK, "if not DETACH", "if False"),
    (ATTACHED, BACK, "rest - charged", "-charged"),
    (dict(detach_reset=False, reset=None), BACK, "-threshold", "threshold"),
    (dict(initial=0.4), BACKWARD, "+ initial", ""),
    (dict(initial=0.4), BACKWARD, "other=initial", "other=0.0"),
    ({}, BACKWARD, "segment = SEGMENTS - 2 - back", "segment = SEGMENTS - 3 - back"),  # the wrong segment's potential
    ({}, BACKWARD, "_store(entering, lane + segment * step, potential", "_store(entering, lane, potential"),
    ({}, BACK, "charged - threshold, alpha", "charged, alpha"),
    ({}, SLOPE, "alpha * decay", "decay"),
    (dict(surrogate="atan"), SLOPE, "0.5 * alpha", "alpha"),
    (dict(surrogate="atan"), SLOPE, "1.5707963267948966", "1.5"),
]


@pytest.mark.parametrize(("options", "kernel", "old", "new"), MUTATIONS)
def test_the_comparison_sees_a_wrong_kernel(options, kernel, old, new, monkeypatch) -> None:
    monkeypatch.setattr(path, "MAX_STEPS", 2)
    x = currents(5, 211)
    with mutated(kernel, old, new):
        got = kernel_run(options, x)
    assert not agrees(got, exact(defined(options), x), torch.float32)


def test_the_kernels_of_the_mutations_are_right_without_them(monkeypatch) -> None:
    monkeypatch.setattr(path, "MAX_STEPS", 2)
    assert path.segments(5) == (3, 2)
    for options in {str(m[0]): m[0] for m in MUTATIONS}.values():
        check(options, currents(5, 211))


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD, kernels._multispike_fwd_kernel, kernels._multispike_bwd_kernel])
def test_a_block_that_ends_late_is_seen(kernel) -> None:
    x = currents(4, 83)
    bound = "neurons" if "lif" in kernel.__name__ else "elements"
    with mutated(kernel, f"< {bound}", f"< {bound} + 1"), interpreted(), pytest.raises(OutOfBoundsError):
        run(lambda x: multispike(lif(x)) if bound == "neurons" else multispike(x), [x])


# ------------------------------------------------------------------------------------------------------- multispike

COUNTS = {"default": {}, "two levels": dict(levels=2, step=1.0), "steeper": dict(step=0.5, slope=3.0)}


def counted(options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    levels, step = options.get("levels", 4), options.get("step", 0.25)
    return lambda x: reference.multispike(x, levels, step, options.get("slope", levels * step))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", COUNTS.values(), ids=COUNTS)
def test_multispike(options, dtype) -> None:
    x = currents(3, 5, 211, dtype=dtype)
    with interpreted(), poisoned():
        got = run(lambda x: multispike(x, **options), [x])
    want = exact(counted(options), x)
    assert torch.equal(got[0].double(), want[0])
    assert relative(got[1], want[1]) < TOLERANCE[dtype]


def test_multispike_of_ties_and_numbers_that_are_none() -> None:
    x = torch.tensor([-0.3, 0.0, 0.125, 0.3749999, 1.0, float("inf"), -float("inf"), float("nan")])
    with interpreted():
        spikes, grad = run(multispike, [x])
    assert spikes.tolist()[:7] == [0, 0, 0.25, 0.25, 1, 1, 0]
    assert spikes[7].isnan()
    assert (grad != 0).tolist() == [False, False, True, True, False, False, False, False]
    assert torch.equal(spikes[:7], multispike(x[:7]))


@pytest.mark.parametrize(
    "x", [currents(3, 7, 11).permute(2, 0, 1), currents(1)[0], currents(0), currents(9, 8)[:, ::2]],
    ids=["any order", "a number", "nothing", "every other"],
)  # fmt: skip
def test_multispike_of_any_layout(x) -> None:
    with interpreted(), poisoned():
        got = run(multispike, [x])
    assert all(torch.equal(a, b) for a, b in zip(got, run(multispike, [x]), strict=True))
    assert got[0].stride() == torch.empty_like(x).contiguous().stride() or got[0].stride() == x.stride()


def test_multispike_reads_and_writes_once() -> None:
    x, grad = currents(7, 11, 13).permute(2, 0, 1), currents(7, 11, 13).permute(2, 0, 1)
    with interpreted(), metered() as meter:
        spikes = path.launch_multispike(x, 4, 0.25)
        grad_x = path.launch_multispike_backward(grad, x, 4, 1.0)
    assert (meter.read_counts(x) == 2).all()
    assert (meter.read_counts(grad) == 1).all()
    assert (meter.write_counts(spikes) == 1).all()
    assert (meter.write_counts(grad_x) == 1).all()


COUNT, COUNT_BACK = kernels._multispike_fwd_kernel, kernels._multispike_bwd_kernel


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        (COUNT, "+ 0.5", ""),
        (COUNT, "scaled, levels, prop", "scaled, levels + 1, prop"),
        (COUNT, "scaled, 0.0, prop", "scaled, -1.0, prop"),
        (COUNT, "* step", ""),
        (COUNT_BACK, "scaled > 0.0", "scaled > -1.0"),
        (COUNT_BACK, "scaled < levels", "scaled < levels + 1"),
        (COUNT_BACK, "* slope", ""),
    ],
)
def test_the_comparison_sees_a_wrong_count(kernel, old, new) -> None:
    x, options = currents(3, 211), COUNTS["steeper"]
    with mutated(kernel, old, new), interpreted():
        got = run(lambda x: multispike(x, **options), [x])
    assert worst(got, exact(counted(options), x)) > 0.01


# ---------------------------------------------------------------------------------------------------------- operators

NUMBERS = (3.0, 1.0, 0.0, 0.25, True, False, "sigmoid", 4.0)


def both(x: Tensor) -> Tensor:
    return multispike(lif(x, tau=3.0, detach_reset=False) / 2 + x / 8)


def strided() -> list[Tensor]:
    return [*layouts().values(), currents(9, 4, 31).transpose(0, 1), currents(9, 4, 6)[..., ::2].transpose(0, 1)]


@pytest.mark.parametrize("x", [currents(4, 30), strided()[0], strided()[-1]])
def test_opcheck(x) -> None:
    ops, grad = torch.ops.striate, torch.randn(x.shape)
    with interpreted():
        torch.library.opcheck(ops.lif.default, (x.clone().requires_grad_(), *NUMBERS))
        torch.library.opcheck(ops.lif_backward.default, (grad, x, *NUMBERS))
        torch.library.opcheck(ops.multispike.default, (x.clone().requires_grad_(), 4, 0.25, 1.0))
        torch.library.opcheck(ops.multispike_backward.default, (grad, x, 4, 1.0))


@pytest.mark.parametrize("inside", [contextlib.nullcontext, interpreted], ids=["plain", "kernels"])
@pytest.mark.parametrize("x", strided())
def test_traces_know_the_layout(x, inside) -> None:
    ops, grad = torch.ops.striate, torch.randn(x.shape)
    calls: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, grad: ops.lif(x, *NUMBERS),
        lambda x, grad: ops.lif_backward(grad, x, *NUMBERS),
        lambda x, grad: ops.multispike(x, 4, 0.25, 1.0),
        lambda x, grad: ops.multispike_backward(grad, x, 4, 1.0),
    ]
    fake = torch._subclasses.FakeTensorMode()
    for call in calls:
        with inside():
            real = call(x, grad)
        with fake:
            assert call(fake.from_tensor(x), fake.from_tensor(grad)).stride() == real.stride()


def test_compiles_whole_for_changing_sizes() -> None:
    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with interpreted():
        for n in (20, 33):
            assert worst(run(compiled, [currents(4, n)]), run(both, [currents(4, n)])) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_programs_run_without_triton(dtype) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return both(x)

    x = currents(6 * 2, 8, 9, 11, dtype=dtype).to(memory_format=torch.channels_last).unflatten(0, (6, 2))
    with interpreted():
        program = torch.export.export(Module(), (x,))
        want = run(both, [x])
    called = {str(node.target) for node in program.graph.nodes}
    assert {"striate.lif.default", "striate.multispike.default"} <= called
    got = run(program.module(), [x])
    assert torch.equal(got[0], want[0])
    assert relative(got[1], want[1]) < TOLERANCE[dtype]


def test_activation_checkpointing() -> None:
    with interpreted():
        again = run(lambda x: checkpoint(both, x, use_reentrant=False), [currents(4, 30)])
        assert worst(again, run(both, [currents(4, 30)])) == 0


def test_a_second_derivative_is_refused() -> None:
    x = currents(4, 30).requires_grad_()
    for op in (lif, multispike):
        with interpreted():
            (grad,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative; set STRIATE_BACKEND=reference"):
                grad.sum().backward()


@pytest.mark.parametrize("op", [lif, multispike])
def test_which_inputs_take_the_kernels(op) -> None:
    x, name = currents(4, 30), op.__name__
    with interpreted():
        assert explain(op, x).startswith(f"{name}: triton")
        assert explain(op, x.double()) == f"{name}: reference (no kernel for torch.float64)"
        assert torch.equal(torch.vmap(op, in_dims=1, out_dims=1)(x), op(x))
