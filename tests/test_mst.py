"""Masked Spiking Transformer: the quantised activation, its neurons, random masks, padding, conversion to an SNN."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

import striate
from helpers import relative
from striate.backbones.mst import MST, NeighbourNorm, Qcfs, SpikeMask, WindowAttention
from striate.ops import window_attention

SMALL = dict(dim=8, depths=(2, 1), num_heads=(1, 2), window=4, img_size=32, levels=8, in_chans=1, num_classes=6)
IMAGE = (3, 1, 32, 32)  # maps of 8x8 and 4x4: the second block shifts


def small(**changes: Any) -> MST:
    """A double-precision model whose norms have seen data and whose activations use their range."""
    model = MST(**{**SMALL, **changes}).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(15.0)
            else:
                p.add_(0.2 * torch.randn_like(p)).mul_(0.5 if name.endswith(".up") else 1.0)
        for _ in range(30):
            model.train()(torch.randn(IMAGE, dtype=torch.float64))
    return model.eval()


def image(*shape: int) -> Tensor:
    return torch.randn(shape or IMAGE, dtype=torch.float64)


@pytest.mark.parametrize("levels", [1, 6, 16])
def test_activation_and_its_gradients(levels: int) -> None:
    """The staircase, a straight-through floor, and a clamp that passes gradients at its ends too."""
    act = Qcfs(levels).double()
    with torch.no_grad():
        act.up.fill_(1.3)
    # two points on every step, below the first and above the last, none where a rounding decides
    steps = torch.arange(-3, levels + 4, dtype=torch.float64)
    x = torch.cat([(steps + offset) / levels * 1.3 for offset in (-0.4, 0.3)]).requires_grad_()
    number = torch.cat([steps, steps])
    y = act(x)
    want = number.clamp(0, levels) / levels * 1.3
    assert torch.allclose(y, want, rtol=1e-14, atol=0)
    with torch.no_grad():
        assert torch.equal(act(x), y)
    probe = torch.randn_like(x)
    grad_x, grad_up = torch.autograd.grad(y, (x, act.up), probe)
    inside = (number >= 0) & (number <= levels)
    assert torch.equal(grad_x, torch.where(inside, probe, 0.0))
    slope = number.clamp(0, levels) / levels - torch.where(inside, x.detach() / 1.3, 0.0)
    assert grad_up.shape == (1,)
    assert torch.allclose(grad_up, (probe * slope).sum(), rtol=1e-12)


def test_activation_keeps_the_dtype_and_has_levels() -> None:
    x = torch.randn(50, dtype=torch.bfloat16, requires_grad=True)
    act = Qcfs(4)
    for act.spiking in (False, True):
        y = act(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == torch.bfloat16
        assert act.up.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="levels=0 must be at least 1"):
        Qcfs(0)


@pytest.mark.parametrize("steps", [1, 5, 32])
def test_neurons_average_to_the_activation_of_as_many_levels(steps: int) -> None:
    act = Qcfs(steps).double()
    with torch.no_grad():
        act.up.fill_(0.7)
    x = image(1000)
    want = act(x)
    act.spiking = True
    spikes = act(x.expand(steps, -1))
    assert set(spikes.unique().tolist()) == {0.0, act.up.item()}
    assert relative(spikes.mean(0), want) < 1e-14


class SteppedNeuron(nn.Module):
    """One step at a time: spikingjelly's integrate-and-fire neuron in units of `up`, charged with a half beforehand."""

    def __init__(self, act: Qcfs) -> None:
        super().__init__()
        self.up = act.up.detach()
        self.node = neuron.IFNode(v_threshold=1.0, v_reset=None)
        self.charged = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.charged:
            assert not self.node(torch.full_like(x, 0.5)).any()
            self.charged = True
        return self.node(x / self.up) * self.up


def stepped(model: MST, images: Tensor, steps: int) -> Tensor:
    """Logits of every step, from a network that runs once per step and remembers in its neurons."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Qcfs):
                setattr(parent, name, SteppedNeuron(child))
    return torch.stack([model(images) for _ in range(steps)])


@torch.no_grad()
def test_snn_is_the_network_run_step_by_step() -> None:
    model, x = small(), image()
    want = stepped(model, x, 8)
    assert relative(want[0], want[7]) > 0.1
    model.set_spiking(8)
    assert model.forward_features(x).shape == (8, 3, 4, 4, 16)
    assert (model(x) - want.mean(0)).abs().max() < 1e-10
    assert torch.equal(model(x), model(x)), "no state outlives a forward"
    each = model.head(model.forward_features(x), keep_time=True)
    assert (each - want).abs().max() < 1e-10


@pytest.mark.parametrize("linear_head", [True, False], ids=["linear head", "layer norm"])
@torch.no_grad()
def test_snn_approaches_the_ann(linear_head: bool) -> None:
    """In the norm before the classifier, taken in every step, some of the difference stays however long it runs."""
    model, x = small(levels=64), image(8, *IMAGE[1:])
    if linear_head:
        model.norm = nn.Identity()
    want = model(x)
    errors = []
    for steps in (8, 64):
        model.set_spiking(steps)
        errors.append((model(x) - want).abs().mean())
    assert errors[1] < errors[0] * (0.5 if linear_head else 0.8)


@torch.no_grad()
def test_conversion_both_ways() -> None:
    model, x = small(), image()
    state, want = copy.deepcopy(model.state_dict()), model(x)
    assert model.timesteps == 1
    model.set_spiking(5)
    assert model.timesteps == 5
    born = small(spiking=True, timesteps=5)
    born.load_state_dict(model.state_dict())
    spiking = model(x)
    assert torch.equal(born(x), spiking)
    assert relative(spiking, want) > 1e-3
    model.set_spiking(None)
    assert torch.equal(model(x), want)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="timesteps=0 must be at least 1, or None for the ANN"):
        model.set_spiking(0)


def test_a_converted_model_is_saved_as_what_it_is() -> None:
    model = striate.create_model("mst_nano", in_chans=1)
    model.set_spiking(6)
    again = striate.create_model("mst_nano", **model.model_args)
    assert again.timesteps == 6
    assert {m.spiking for m in again.modules() if isinstance(m, Qcfs)} == {True}
    again.set_spiking(None)
    assert again.model_args == {"in_chans": 1}


@torch.no_grad()
def test_images_frames_and_pyramids() -> None:
    model, x = small(), image(4, *IMAGE)
    assert relative(model(x), torch.stack([model(frame) for frame in x]).mean(0)) < 1e-12
    model.set_spiking(4)
    assert torch.equal(model(x[0]), model(x[:1].expand(4, -1, -1, -1, -1)))
    options = dict(in_chans=1, spiking=True, timesteps=3, features_only=True)
    maps = striate.create_model("mst_nano", **options).eval()(x[0].float())
    kept = striate.create_model("mst_nano", **options, keep_time=True).eval()(x[0].float())
    assert [m.shape for m in maps] == [(3, 24 * 2**i, 8 // 2**i, 8 // 2**i) for i in range(4)]
    assert [m.shape for m in kept] == [(3, *m.shape) for m in maps]


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("spiking", [False, True], ids=["ann", "snn"])
@torch.no_grad()
def test_random_masks(train: bool, spiking: bool) -> None:
    """Of q, k and the attention map, by the ratio and without rescaling; of v not."""
    model = small(masking_ratio=0.3, depths=(1, 1), spiking=spiking, timesteps=4).train(train)
    attn = model.layers[0].blocks[0].attn
    masks: list[tuple[Tensor, Tensor]] = []
    seen: dict[str, Tensor] = {}
    attn.mask.register_forward_hook(lambda _m, x, y: masks.append((x[0], y)))
    attn.v_if.register_forward_hook(lambda _m, _x, y: seen.update(v=y))
    attn.attn_if.register_forward_hook(lambda _m, x, y: seen.update(scores=x[0], spikes=y))
    attn.attn_v_if.register_forward_pre_hook(lambda _m, x: seen.update(out=x[0]))
    model(image(32, *IMAGE[1:]))
    assert len(masks) == 3
    for before, after in masks:
        assert ((after == before) | (after == 0)).all()
        dropped = (after == 0)[before != 0].double()
        assert dropped.mean().item() == pytest.approx(0.3, abs=5 * (0.21 / dropped.numel()) ** 0.5)
    (_, q), (_, k), (spikes, masked) = masks
    assert relative(seen["scores"], q @ k.mT * 8**-0.5) < 1e-12
    assert torch.equal(spikes, seen["spikes"])
    want = (masked + window_bias(attn)).softmax(-1) @ seen["v"]
    steps = 4 if spiking else 1
    out = seen["out"].unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 1, 2, 4, 3, 5, 6)  # windows of 4x4
    assert out.shape == (steps, 32, 2, 2, 4, 4, 8)
    assert relative(out.reshape(want.shape), want) < 1e-12


def window_bias(attn: WindowAttention) -> Tensor:
    """`(heads, N, N)`, pair by pair."""
    side = attn.window[0]
    at = [(i, j) for i in range(side) for j in range(side)]
    rows = [[(a - c + side - 1) * (2 * side - 1) + b - d + side - 1 for c, d in at] for a, b in at]
    return attn.relative_position_bias_table[torch.tensor(rows)].permute(2, 0, 1)


@torch.no_grad()
def test_masks_follow_the_seed_and_none_draws_nothing() -> None:
    model, x = small(masking_ratio=0.5), image()
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    small_mask = SpikeMask(0.0)
    assert small_mask(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=re.escape(f"masking_ratio={ratio} must be in [0, 1)")):
            small(masking_ratio=ratio)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (3, 5)], ids=str)
@pytest.mark.parametrize("shift", [(0, 0), (2, 2)], ids=["windows", "shifted"])
def test_attention_is_the_operator_but_for_activations(size: tuple[int, int], shift: tuple[int, int]) -> None:
    """Bias, mask, shift and what the padding holds."""
    attn = WindowAttention(8, 2, (4, 4), levels=8, masking_ratio=0.0).double()
    nn.init.normal_(attn.qkv.bias)
    nn.init.normal_(attn.relative_position_bias_table)
    for name in ("q_if", "k_if", "v_if", "attn_if", "attn_v_if", "proj_if"):
        setattr(attn, name, nn.Identity())
    x = image(2, 3, *size, 8)
    qkv = attn.qkv(x.flatten(0, 1))
    table = attn.relative_position_bias_table
    want = attn.proj(window_attention(qkv, table, num_heads=2, window=4, shift=shift, pad=attn.qkv.bias))
    assert relative(attn(x, shift).flatten(0, 1), want) < 1e-12


@pytest.mark.parametrize("size", [(6, 4), (5, 4), (4, 7), (5, 3)], ids=str)
def test_neighbours_beyond_the_edge_are_zero_and_do_not_count(size: tuple[int, int]) -> None:
    norm = NeighbourNorm(8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = image(3, *size, 2)
    for mode in (True, False):
        y = norm.train(mode)(x)
        assert y.shape == (3, (size[0] + 1) // 2, (size[1] + 1) // 2, 8)
        for i, (row, col) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            own, c = x[:, row::2, col::2], slice(2 * i, 2 * i + 2)
            mean, var = own.mean((0, 1, 2)), own.var((0, 1, 2))
            if mode:
                assert torch.allclose(norm.running_mean[c], 0.1 * mean)
                assert torch.allclose(norm.running_var[c], 0.9 + 0.1 * var)
                var = own.var((0, 1, 2), correction=0)
            else:
                mean, var = norm.running_mean[c], norm.running_var[c]
            want = (own - mean) / (var + norm.eps).sqrt() * norm.weight[c] + norm.bias[c]
            rest = y[..., c].clone()
            assert torch.allclose(rest[:, : own.shape[1], : own.shape[2]], want)
            rest[:, : own.shape[1], : own.shape[2]] = 0
            assert not rest.any()
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("size", [(32, 32), (30, 21), (13, 50)], ids=str)
def test_any_size_and_norms_that_see_tokens_only(size: tuple[int, int]) -> None:
    model = MST(**{**SMALL, "depths": (2, 2)}).train()
    tokens = [-(-side // 4) for side in size], [-(-side // 8) for side in size]
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _m, x, n=name: counts.update({n: x[0].shape[1:3].numel()}))
    model(torch.randn(2, 1, *size)).sum().backward()
    assert len(counts) == 1 + 4 * 4 + 1
    for name, count in counts.items():
        height, width = tokens[name.startswith("layers.1.blocks")]
        assert count == height * width, name
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []


def test_variants_of_the_arguments() -> None:
    plain, cifar = MST(**SMALL), MST(**SMALL, mlp_norm=False)
    assert plain.state_dict().keys() - cifar.state_dict().keys() == {
        key for key in plain.state_dict() if ".mlp.norm" in key
    }
    assert cifar(torch.randn(IMAGE)).shape == (3, 6)
    tables = {key for key, _ in plain.named_parameters() if key.endswith("relative_position_bias_table")}
    assert plain.no_weight_decay() == tables
    assert len(tables) == 3
    assert {m.up.shape for m in plain.modules() if isinstance(m, Qcfs)} == {(1,)}
    straight, shifted = plain.layers[0].blocks
    assert straight.shift(8, 8) == (0, 0)
    assert [shifted.shift(*size) for size in ((8, 8), (5, 5), (4, 8), (8, 4))] == [(2, 2), (2, 2), (0, 0), (0, 0)]
    with pytest.raises(ValueError, match=r"depths=\(1,\), num_heads=\(1, 2\): one number of heads per stage"):
        MST(**{**SMALL, "depths": (1,)})


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our keys as the authors have them, with the tables that their files hold too."""
    theirs = {}
    for key, value in state.items():
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        theirs[key.replace("head.fc.", "head.")] = value
        if key.endswith("relative_position_bias_table"):
            theirs[key.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.int64)
    theirs["layers.0.blocks.1.attn_mask"] = torch.full((4, 16, 16), 7.0)
    return theirs


def test_files_of_the_authors() -> None:
    model, other = (striate.create_model("mst_nano", depths=(2, 1, 1, 1), num_classes=6) for _ in range(2))
    theirs = official(model.state_dict())
    for key in ("patch_embed.proj_if.up", "layers.0.blocks.1.attn.q_if.up", "layers.0.downsample.reduction_if.up"):
        assert key in theirs
    striate.load_checkpoint(other, {"model": theirs, "epoch": 3})
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    del theirs["layers.0.blocks.1.attn.q_if.up"]
    with pytest.raises(ValueError, match=r"1 missing \(layers.0.blocks.1.attn.q_if.up\)"):
        striate.load_checkpoint(other, theirs)


def test_tables_of_another_window_are_resized() -> None:
    model, other = striate.create_model("mst_nano"), striate.create_model("mst_nano", window=2)
    striate.load_checkpoint(other, model.state_dict())
    assert other.layers[0].blocks[0].attn.relative_position_bias_table.shape == (9, 1)
