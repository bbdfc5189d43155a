"""Binary vision transformers: gradients as published, packing, saving packed models, where training can start."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import striate
from helpers import relative
from striate.backbones._binary import BinaryLinear, PackedLinear
from striate.backbones.binaryvit import BinaryProjection, PackedProjection, _Clip, neighbours
from striate.backbones.bivit import _Positive
from striate.ops.binary import cpu
from striate.train.export import count_operations, measure_size

MODELS: dict[str, dict[str, Any]] = {
    "bivit_deit_tiny": dict(depths=(2,)),
    "bivit_nano": dict(depths=(1, 1)),
    "binaryvit_small": dict(depths=(1, 1, 1, 1)),
    "binaryvit_small_full_precision_downsample": dict(depths=(1, 1, 1, 1)),
    "reactdeit_small": dict(depths=(2,)),
}


def make(name: str, **kwargs: Any) -> nn.Module:
    model = striate.create_model(name, **{**MODELS[name], "num_classes": 10, **kwargs}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1 and not key.endswith("scaling_factor"):
                p.add_(0.2 * torch.randn_like(p))
    return model


def image(name: str, batch: int = 2) -> Tensor:
    side = 32 if name == "bivit_nano" else 96
    return torch.randn(batch, 3, side, side)


# ------------------------------------------------------------------------------------------------------------- layers


def by_rows(layer: BinaryLinear, x: Tensor) -> Tensor:
    """The layer from its formula, output by output."""
    out = []
    for row, weight in enumerate(layer.weight.detach()):
        centred = weight - weight.mean() if layer.centred else weight
        scale = weight.abs().mean() if layer.scaling_factor is None else layer.scaling_factor[row, 0].detach()
        out.append((torch.sign(x) if layer.binary_input else x) @ torch.sign(centred) * scale)
    y = torch.stack(out, -1)
    return y if layer.bias is None else y + layer.bias.detach()


@pytest.mark.parametrize("options", [
    {}, dict(learned_scale=True), dict(learned_scale=True, binary_input=False), dict(bias=False, direct=True),
    dict(centred=False, estimator="polynomial"),
])  # fmt: skip
def test_linear_layer(options) -> None:
    layer = BinaryLinear(40, 7, **options).double()
    if layer.scaling_factor is not None:
        assert relative(layer.scaling_factor[:, 0], layer.weight.abs().mean(1)) < 1e-6
        nn.init.uniform_(layer.scaling_factor, 0.5, 1)
    x = torch.randn(3, 5, 40, dtype=torch.float64)
    assert relative(layer(x), by_rows(layer, x)) < 1e-14
    packed = layer.packed("here")
    assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("direct", [False, True])
def test_gradient_of_binary_weights(direct) -> None:
    """Through the sign where the centred weight is within 1, times the scale or `direct`, and through the mean."""
    layer = BinaryLinear(6, 2, bias=False, direct=direct).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.1, -0.2, 0.3, 0.2, -0.1], [0.4, -0.3, 0.2, 0.5, -0.6, 0.1]]))
    x, probe = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    (got,) = torch.autograd.grad(layer(x), layer.weight, probe)
    centred = layer.weight.detach() - layer.weight.detach().mean(1, keepdim=True)
    want = probe.T @ torch.sign(x) * (centred.abs() < 1)
    if not direct:
        want = want * layer.weight.detach().abs().mean(1, keepdim=True)
    assert relative(got, want - want.mean(1, keepdim=True)) < 1e-14


def test_direct_gradient_of_a_row_of_zeros_is_finite() -> None:
    layer = BinaryLinear(4, 2, direct=True)
    nn.init.zeros_(layer.weight)
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_thresholds_of_attention() -> None:
    p = torch.tensor([0.0, 0.1, 0.25, 0.26, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    clip = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = _Clip.apply(p, clip)
    assert y.tolist() == [0, 0, 0, 0.5, 0.5, 0.5]
    grads = torch.autograd.grad(y, (p, clip), torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64))
    assert grads[0].tolist() == [1, 2, 3, 4, 5, 0]
    assert grads[1].item() == pytest.approx(-0.2 * 2 - 0.5 * 3 + 0.48 * 4 + 6)
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], requires_grad=True)
    y = _Positive.apply(x)
    assert y.tolist() == [0, 0, 0, 1, 1]
    assert torch.autograd.grad(y, x, torch.ones_like(x))[0].tolist() == [0, 1, 1, 1, 0]


def test_projection_is_its_parts_in_training_and_evaluation() -> None:
    layer = BinaryProjection(24, 48).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    layer(torch.randn(9, 5, 5, 24).double(), torch.randn(9, 5, 5, 12).double())  # moves the running statistics
    x, shortcut = torch.randn(2, 5, 5, 24).double(), torch.randn(2, 5, 5, 12).double()
    layer.eval()
    y = layer.norm(by_rows(layer.linear, x + layer.move)) + shortcut.repeat(1, 1, 1, 4) - layer.rprelu.move1
    want = torch.where(y > 0, y, layer.rprelu.weight * y) + layer.rprelu.move2
    assert relative(layer(x, shortcut), want) < 1e-13
    with torch.no_grad():
        folded = layer(x, shortcut)
        assert relative(folded, want) < 1e-13
        assert torch.equal(layer.packed("here")(x, shortcut), folded)


def test_neighbours_are_the_patches_of_a_convolution() -> None:
    conv = nn.Conv2d(3, 5, 2, 2, bias=False)
    x = torch.randn(2, 7, 6, 3)
    want = conv(nn.functional.pad(x.permute(0, 3, 1, 2), (0, 0, 0, 1))).permute(0, 2, 3, 1)
    assert relative(neighbours(x) @ conv.weight.permute(0, 2, 3, 1).flatten(1).T, want) < 1e-5


# -------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("numba", [True, False], ids=["popcount", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_gives_the_same_bits(name, numba, monkeypatch) -> None:
    model, x = make(name), image(name)
    packed = copy.deepcopy(model)
    packed.pack()
    left = [m for m in packed.modules() if isinstance(m, (BinaryLinear, BinaryProjection))]
    assert not left
    assert any(isinstance(m, (PackedLinear, PackedProjection)) for m in packed.modules())
    if not numba:
        monkeypatch.setattr(cpu, "_popcount", lambda: None)
        monkeypatch.setattr(cpu, "FEW_ROWS", 1)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    assert packed(x).shape == (2, 10)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_packed_model_comes_back_packed(name, tmp_path) -> None:
    model, x = make(name), image(name)
    model.pack()
    source = striate.push(model, f"local-dir:{tmp_path / 'packed'}")
    again = striate.create_model(source).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        pyramid = striate.create_model(name, **MODELS[name], packed=True, features_only=True,
                                       checkpoint_path=tmp_path / "packed" / "model.safetensors").eval()  # fmt: skip
        want = model.forward_intermediates(x, intermediates_only=True)
        assert name == "bivit_nano" or all(torch.equal(a, b) for a, b in zip(pyramid(x), want, strict=True))


def test_a_weight_without_sign_is_a_clear_error_and_nothing_is_packed() -> None:
    model = make("bivit_nano")
    layer = model.layers[1].blocks[0].mlp.fc2
    with torch.no_grad():
        layer.weight[3] = 0.25
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"layers.1.blocks.0.mlp.fc2 cannot be packed: 512 weights have no sign"):
        model.pack()
    assert model.state_dict().keys() == before
    assert "packed" not in model.model_args


def test_sizes_of_packed_models() -> None:
    """An eighth of a BinaryViT-S, a thirtieth of its binary layers."""
    model = striate.create_model("binaryvit_small")
    before = measure_size(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert before.total > 4 * parameters
    assert before.binary == 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, BinaryLinear))
    model.pack()
    after = measure_size(model)
    assert after.total < before.total / 8
    assert after.binary <= before.binary / 30
    assert after.total == sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.mark.parametrize("name", ["bivit_deit_tiny", "binaryvit_small"])
def test_operations_are_those_of_the_formula(name) -> None:
    model = striate.create_model(name, num_classes=10)
    counted = count_operations(model)
    if name == "bivit_deit_tiny":
        tokens, dim = 197, 192
        binary = 12 * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
        real = 196 * dim * 16 * 16 * 3 + dim * 10
    else:
        sides, dims, ratios, reduced = (56, 28, 14, 7), (64, 128, 256, 512), (8, 8, 4, 4), (7, 7, 14, 7)
        binary = 0
        for depth, side, dim, ratio, keys in zip((3, 4, 8, 4), sides, dims, ratios, reduced, strict=True):
            n, m = side**2, keys**2
            kv = (2 if n == m else 3) * m * dim**2
            binary += depth * (2 * n * dim**2 + kv + 2 * n * m * dim + 2 * ratio * n * dim**2)
        binary += sum(side**2 * 4 * dim * 2 * dim for side, dim in zip(sides[1:], dims, strict=False))
        real = 56**2 * 64 * 48 + 512 * 10
    assert counted.binary == binary
    assert counted.real == real


def test_real_activations_are_no_binary_operations() -> None:
    one, many = (count_operations(striate.create_model("bivit_nano", mlp_activation_bits=bits)) for bits in (1, 32))
    assert one.binary > many.binary
    assert one.binary + one.real == many.binary + many.real


# ------------------------------------------------------------------------------------------- where training can start


def test_a_model_in_full_precision_is_where_a_binary_one_can_start(caplog) -> None:
    args = dict(dim=64, depths=(1, 1), num_heads=(2, 4), window=4, img_size=32, num_classes=10)
    teacher = striate.create_model("swin_tiny", **args)
    student = striate.create_model("bivit_nano", depths=(1, 1), num_classes=10, mlp_activation_bits=32)
    striate.load_checkpoint(student, teacher.state_dict())
    assert caplog.text.count("learned scales of binary weights start as the mean magnitudes") == 1
    for name, layer in student.named_modules():
        if isinstance(layer, BinaryLinear):
            weight = teacher.state_dict()[f"{name}.weight"]
            assert torch.equal(layer.weight, weight)
            assert torch.equal(layer.scaling_factor, weight.abs().mean(1, keepdim=True))


def test_stages_of_training_follow_each_other(caplog) -> None:
    """Real activations in the MLPs first: their learned scales have no place in the model of the second stage."""
    first, second = make("bivit_nano", mlp_activation_bits=32), make("bivit_nano")
    striate.load_checkpoint(second, first.state_dict())
    assert "left out 4 learned scales" in caplog.text
    assert torch.equal(second.layers[0].blocks[0].attn.qkv.scaling_factor,
                       first.layers[0].blocks[0].attn.qkv.scaling_factor)  # fmt: skip
    zeros = {k: torch.zeros_like(v) if k.endswith("attn.proj.scaling_factor") else v
             for k, v in first.state_dict().items()}  # fmt: skip
    striate.load_checkpoint(second, zeros)  # as the authors save what has not run yet
    proj = second.layers[0].blocks[0].attn.proj
    assert torch.equal(proj.scaling_factor, proj.weight.abs().mean(1, keepdim=True))


def test_positions_of_another_image_size_are_resampled(caplog) -> None:
    for name in ("bivit_deit_tiny", "binaryvit_small", "reactdeit_small"):
        small, large = make(name, img_size=96), make(name)
        striate.load_checkpoint(large, small.state_dict())
        again = make(name, img_size=96)
        striate.load_checkpoint(again, large.state_dict())
        x = torch.randn(1, 3, 96, 96)
        assert large(x).isfinite().all()
        assert relative(again.patch_embed.pos_embed, small.patch_embed.pos_embed) < 1  # twice resampled: smoother
    assert "resampled patch_embed.pos_embed from 6x6 to 14x14" in caplog.text
    assert "resampled layers.3.downsample.pos_embed from 3x3 to 7x7" in caplog.text


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bivit_deit_tiny", dict(mlp_activation_bits=4), "mlp_activation_bits=4: use 1 for signs or 32"),
        ("bivit_swin_tiny", dict(mlp_activation_bits=0), "mlp_activation_bits=0"),
        ("bivit_swin_tiny", dict(version=2), "version=2: binary attention is that of version 1"),
        ("bivit_deit_tiny", dict(num_heads=5), "dim=192 be a multiple of num_heads=5"),
        ("bivit_deit_tiny", dict(global_pool="cls"), "global_pool='cls' is unknown; use 'token', 'avg', 'max' or ''"),
        ("binaryvit_small", dict(depths=(1, 1)), "one number of each per stage"),
        ("binaryvit_small", dict(dim=96), "dim=96 must be a multiple of head_dim=64"),
        ("reactdeit_small", dict(depths=(1, 1)), "must have one entry"),
    ],
)
def test_arguments_that_do_not_fit_are_a_clear_error(name, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        striate.create_model(name, **changes)
