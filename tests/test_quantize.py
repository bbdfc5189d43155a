"""Quantised weights (LSQ): levels, gradients against the equations, how the step sizes begin."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import relative, run, worst
from striate.backbones._quantize import QuantizedConv2d, QuantizedLinear, quantize, quantize_weights

EXACT = 1e-10


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def straight_through(weight: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """The paper's equations, with gradients that autograd derives from them."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = 1 / math.sqrt(weight.numel() * high)
    step = (alpha - alpha * scale).detach() + alpha * scale
    step = step.view(-1, *[1] * (weight.ndim - 1))
    level = (weight / step).clamp(low, high)
    return ((level.round() - level).detach() + level) * step


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3)])
def test_gradients_of_quantised_weights(shape, bits) -> None:
    weight, alpha = torch.randn(shape), 0.05 + 0.5 * torch.rand(shape[0])
    got = run(lambda w, a: quantize(w, a, bits), [weight, alpha])
    want = run(lambda w, a: straight_through(w, a, bits), [weight, alpha])
    assert worst(got, want) < EXACT
    levels = got[0] / alpha.view(-1, *[1] * (len(shape) - 1))
    assert relative(levels, levels.round()) < EXACT
    assert levels.min() >= -(2 ** (bits - 1))
    assert levels.max() <= 2 ** (bits - 1) - 1


def test_levels_of_four_bits() -> None:
    weight = torch.tensor([[0.5, 1.5, -0.5, -1.5, 2.5, 7.0, 7.4, 9.0, -8.0, -9.0]]).requires_grad_()
    alpha = torch.ones(1, requires_grad=True)
    out = quantize(weight, alpha)
    assert out.tolist() == [[0, 2, 0, -2, 2, 7, 7, 7, -8, -8]]  # halves to even
    out.sum().backward()
    assert weight.grad.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0, 1, 0]]
    slope = -0.5 + 0.5 + 0.5 - 0.5 - 0.5 + 0 + 7 + 7 + 0 - 8
    assert alpha.grad.item() == pytest.approx(slope / math.sqrt(10 * 7))


def test_quantised_weights_under_function_transforms() -> None:
    weight, alpha = torch.randn(3, 4, 5), 0.2 + torch.rand(3, 4)
    assert torch.equal(
        torch.vmap(quantize)(weight, alpha), torch.stack([quantize(w, a) for w, a in zip(weight, alpha, strict=True)])
    )
    grads = torch.vmap(torch.func.grad(lambda a, w: quantize(w, a).square().sum()))(alpha, weight)
    for grad, w, a in zip(grads, weight, alpha, strict=True):
        leaf = a.clone().requires_grad_()
        straight_through(w, leaf, 4).square().sum().backward()
        assert relative(grad, leaf.grad) < EXACT


def first_alpha(weight: Tensor) -> Tensor:
    return (2 * weight.abs().mean() / math.sqrt(7)).expand(len(weight))


def layers() -> list[nn.Module]:
    model = nn.ModuleList([nn.Linear(6, 5), nn.Conv2d(4, 6, 3, groups=2)])
    quantize_weights(model)
    return list(model)


@pytest.mark.parametrize(("index", "size"), [(0, (2, 6)), (1, (2, 4, 5, 5))])
def test_steps_are_chosen_at_construction_and_by_the_first_training_forward(index, size) -> None:
    layer, x = layers()[index], torch.randn(size)
    assert type(layer) is (QuantizedLinear, QuantizedConv2d)[index]
    assert layer.init_state.tolist() == [0]
    assert relative(layer.alpha, first_alpha(layer.weight)) < EXACT
    assert layer.eval()(x).std() > 0.01
    plain = F.linear if index == 0 else lambda *args: F.conv2d(*args, groups=2)
    assert torch.equal(layer(x), plain(x, quantize(layer.weight, layer.alpha), layer.bias))

    with torch.no_grad():
        layer.weight.mul_(3)
    layer(x)
    assert layer.init_state.tolist() == [0], "evaluation chose the steps"
    out = layer.train()(x)
    assert relative(layer.alpha, first_alpha(layer.weight)) < EXACT
    assert layer.init_state.tolist() == [1]
    with torch.no_grad():
        layer.weight.mul_(3)
    alpha = layer.alpha.detach().clone()
    (layer(x).sum() + layer(x).sum()).backward()  # what the first forward kept may not change in the second
    assert torch.equal(layer.alpha, alpha)
    assert out.isfinite().all()
    assert layer.alpha.grad.abs().min() > 0


@pytest.mark.parametrize("chosen", [False, True])
def test_loaded_steps_are_kept_if_they_were_chosen(chosen) -> None:
    source, layer = layers()[0], layers()[0]
    if chosen:
        source.train()(torch.randn(2, 6))
    with torch.no_grad():
        source.alpha.mul_(2)
    layer.train()(torch.randn(2, 6))
    layer.load_state_dict(source.state_dict())
    layer(torch.randn(2, 6))
    assert relative(layer.alpha, first_alpha(layer.weight) * (2 if chosen else 1)) < EXACT
    assert layer.init_state.item() == 1


def test_weights_of_zero_stay_zero() -> None:
    layer = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(layer[0].weight)
    quantize_weights(layer)
    assert torch.equal(layer(torch.ones(1, 3))[0], layer[0].bias)


def test_one_bit_is_too_few() -> None:
    with pytest.raises(ValueError, match="bits=1 must be at least 2"):
        quantize_weights(nn.Linear(2, 2), 1)
