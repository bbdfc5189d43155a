"""Spiking neurons: spikingjelly's to the last bit, gradients by autograd, and what a state that leaks out would do."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron as oracle
from spikingjelly.activation_based import surrogate
from torch import Tensor

from striate.ops import explain, lif, multispike
from striate.ops.lif import cpu, reference

NEURONS = [
    dict(tau=tau, reset=reset, decay_input=decay, detach_reset=detach, surrogate=name)
    for tau, reset, decay, detach, name in itertools.product(
        (2.0, 3.0, None), (0.0, None), (True, False), (True, False), ("sigmoid", "atan")
    )
]


def currents(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2).requires_grad_()


def spikingjelly(x: Tensor, options: dict[str, Any]) -> Tensor:
    smooth = surrogate.Sigmoid(4.0) if options["surrogate"] == "sigmoid" else surrogate.ATan(2.0)
    shared = dict(
        v_threshold=0.8,
        v_reset=options["reset"],
        detach_reset=options["detach_reset"],
        step_mode="m",
        surrogate_function=smooth,
    )
    if options["tau"] is None:
        return oracle.IFNode(**shared)(x)
    return oracle.LIFNode(tau=options["tau"], decay_input=options["decay_input"], **shared)(x)


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("options", NEURONS)
def test_spikes_are_those_of_spikingjelly(options, path, monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", path)
    x = currents(5, 3, 40)
    want = spikingjelly(x, options)
    got = lif(x, threshold=0.8, **options)
    assert torch.equal(got, want)
    assert 0.05 < got.mean() < 0.95
    probe = torch.randn(got.shape, dtype=got.dtype)
    (a,), (b,) = torch.autograd.grad(got, x, probe), torch.autograd.grad(want, x, probe)
    assert (a - b).abs().max() < 1e-14


def test_wrong_neurons_differ() -> None:
    x = currents(5, 3, 40)
    options = NEURONS[0]
    right = lif(x, threshold=0.8, **options)
    for change in (dict(tau=2.5), dict(reset=None), dict(decay_input=False), dict(threshold=0.7), dict(initial=0.5)):
        assert not torch.equal(lif(x, **{"threshold": 0.8, **options, **change}), right), change
    (want,) = torch.autograd.grad(right.sum(), x)
    for change in (dict(detach_reset=False), dict(surrogate="atan"), dict(alpha=3.0)):
        (got,) = torch.autograd.grad(lif(x, **{"threshold": 0.8, **options, **change}).sum(), x)
        assert (got - want).abs().max() > 1e-3, change


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("options", [{}, dict(tau=3.0, decay_input=False), dict(tau=None, surrogate="atan")])
def test_a_reset_elsewhere(options, detach) -> None:
    """The potential of spikingjelly begins where it is reset to."""
    x = currents(5, 3, 40)
    neuron = reference.Neuron(threshold=0.8, reset=-0.3, initial=-0.3, detach_reset=detach)._replace(**options)
    neuron = neuron._replace(alpha=2.0 if neuron.surrogate == "atan" else 4.0)
    got, want = cpu.lif(x, neuron), reference.lif(x, neuron)
    assert torch.equal(want, spikingjelly(x, neuron._asdict()))
    assert torch.equal(got, want)
    probe = torch.randn(got.shape, dtype=got.dtype)
    (a,), (b,) = torch.autograd.grad(got, x, probe), torch.autograd.grad(want, x, probe)
    assert (a - b).abs().max() < 1e-14
    assert not torch.equal(cpu.lif(x, neuron._replace(reset=0.0)), got)


@pytest.mark.parametrize("shape", [(4,), (1, 7), (3, 2, 5, 6), (4, 0)])
@pytest.mark.parametrize("chunk", [1 << 20, 24])
@pytest.mark.filterwarnings("error")  # an output that does not fit is a warning
def test_any_shape_in_any_chunks(shape, chunk, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", chunk)
    x = currents(*shape)
    neuron = reference.Neuron(2.0, 1.0, 0.0, 0.25, True, True, "sigmoid", 4.0)
    got, want = cpu.lif(x, neuron), reference.lif(x, neuron)
    assert got.shape == x.shape
    assert torch.equal(got, want)
    (a,), (b,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x)
    assert a.shape == x.shape
    assert not a.numel() or (a - b).abs().max() < 1e-14


@pytest.mark.parametrize(
    "x",
    [currents(6, 4, 5).transpose(0, 1), currents(8, 6, 5)[::2], currents(1, 6, 5).expand(4, 6, 5),
     currents(4, 6, 10)[..., ::2], currents(4, 6, 10)[..., 5:], currents(1, 6, 10)[..., 5:],
     currents(4, 1, 5).expand(4, 6, 5)],
)  # fmt: skip
def test_strided_inputs(x) -> None:
    plain = x.detach().contiguous().requires_grad_()
    strided = x.detach().requires_grad_()
    probe = torch.randn(x.shape, dtype=x.dtype)
    assert torch.equal(lif(strided), lif(plain))
    (a,), (b,) = (torch.autograd.grad(lif(t), t, probe) for t in (strided, plain))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_fires_for_any_tau(dtype) -> None:
    x = torch.tensor([107.0], dtype=dtype)
    assert x * (1 / x) < 1, "the inverse of this time constant misses it"
    assert lif(x, tau=107.0).item() == 1


def test_channels_last_is_neither_copied_nor_changed(monkeypatch) -> None:
    x = currents(4 * 2, 3, 5, 5).to(memory_format=torch.channels_last).unflatten(0, (4, 2))
    want = lif(x.contiguous())
    probe = torch.randn(x.shape, dtype=x.dtype)
    (want_grad,) = torch.autograd.grad(want, x, probe)
    for grad in (probe, torch.empty_like(x).copy_(probe)):  # in either layout
        got = lif(x)
        assert torch.equal(got, want)
        (got_grad,) = torch.autograd.grad(got, x, grad)
        assert torch.equal(got_grad, want_grad)
        assert got.stride() == got_grad.stride() == x.stride()
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *args, **kwargs: pytest.fail("copied"))
    lif(x)


def test_a_neuron_has_the_defaults_of_the_operator() -> None:
    defaults = {name: p.default for name, p in inspect.signature(lif).parameters.items() if name != "x"}
    assert reference.Neuron(**{**defaults, "alpha": 4.0}) == reference.Neuron()
    x = currents(4, 30)
    (a,) = torch.autograd.grad(lif(x).sum(), x)
    (b,) = torch.autograd.grad(reference.lif(x, reference.Neuron()).sum(), x)
    assert (a - b).abs().max() < 1e-14


def test_no_state_is_left() -> None:
    x = currents(4, 10)
    assert torch.equal(lif(x), lif(x))
    assert torch.equal(lif(x)[:2], lif(x[:2]))


def test_training_keeps_the_input_alone() -> None:
    x = currents(4, 100)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lif(x * 1)
    assert sum(t.numel() for t in kept) == x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_transformed(dtype) -> None:
    x = currents(4, 30, dtype=dtype).detach()
    torch.compiler.reset()
    compiled = torch.compile(lif, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), lif(x))
    assert torch.equal(torch.vmap(lif, in_dims=1, out_dims=1)(x), lif(x))


def test_explained() -> None:
    assert explain(lif, currents(4, 3)) == "lif: cpu (an eager tensor on the CPU)"


def test_multispike_of_infinity_is_all_or_nothing() -> None:
    x = torch.tensor([float("inf"), -float("inf")], requires_grad=True)
    got = multispike(x)
    assert got.tolist() == [1, 0]
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad.tolist() == [0, 0]


def test_multispike_counts_and_its_gradient() -> None:
    x = torch.tensor([-0.3, 0.0, 0.12, 0.125, 0.4, 0.9, 1.0, 1.7], dtype=torch.float64, requires_grad=True)
    got = multispike(x)
    assert got.tolist() == [0, 0, 0, 0.25, 0.5, 1.0, 1.0, 1.0]
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    halves = multispike(x, levels=4, step=0.5)
    assert halves.tolist() == [0, 0, 0, 0.5, 1.0, 2.0, 2.0, 2.0]
    (grad,) = torch.autograd.grad(halves.sum(), x)
    assert grad.tolist() == [0, 0, 2, 2, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tau=1.0), "tau=1.0 must be more than 1"),
        (dict(tau=float("nan")), "tau=nan"),
        (dict(surrogate="step"), "surrogate='step' is unknown; use one of sigmoid, atan"),
        (dict(alpha=0.0), "alpha=0.0 must be positive"),
    ],
)
def test_bad_neurons_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        lif(currents(4, 3), **options)


def test_bad_inputs_are_named() -> None:
    for x in (torch.ones(4, 3, dtype=torch.int64), torch.ones(()), torch.ones(0, 3)):
        with pytest.raises(ValueError, match=r"must be a floating-point tensor \(T, ...\) of at least one step"):
            lif(x)
    with pytest.raises(ValueError, match="levels=0 must be at least 1"):
        multispike(torch.ones(3), levels=0)
