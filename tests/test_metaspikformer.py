"""Meta-SpikeFormer and QSD-Transformer: re-parameterised convolutions, attention, two classifiers, levels, files."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import striate
from helpers import relative, run, saved_bytes, worst
from striate.backbones import _inference
from striate.backbones._quantize import Quantized, QuantizedLinear, quantize_weights
from striate.backbones._spiking import DropPath, Lif, LinearNorm, Multispike, conv_norm, spike_attention
from striate.backbones.metaspikformer import MetaSpikformer, RepConv

SMALL: dict[str, Any] = dict(dims=(8, 12, 16, 24), depths=(1, 2, 2, 1), num_heads=4, num_classes=10)
NAMES = ("metaspikformer_15m", "qsd_transformer_15m")
EXACT = 1e-10


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """A rounding error of float32 that crosses a threshold would change everything after it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def shake(module: nn.Module, size: tuple[int, ...]) -> nn.Module:
    """Norms as after training: statistics of real input, and factors with which every neuron fires at times."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
            nn.init.uniform_(norm.weight, 2, 3)
            nn.init.normal_(norm.bias)
    with torch.no_grad():
        module.train()(torch.randn(size))
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1
    return module.eval()


def small(name: str = NAMES[0], **kwargs: Any) -> nn.Module:
    model = striate.create_model(name, **{**SMALL, **kwargs})
    return shake(model, (3, kwargs.get("in_chans", 3), 64, 64))


# RepConv


def padded_by_hand(x: Tensor, norm: nn.BatchNorm2d, training: bool) -> Tensor:
    """What the paper's code does with `(B, C, H, W)`: norm, zeros around, then each side overwritten."""
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, norm.momentum, norm.eps)
    factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    value = (norm.bias.detach() - norm.running_mean * factor)[:, None]
    x = F.pad(x, (1, 1, 1, 1))
    x[:, :, 0, :] = x[:, :, -1, :] = x[:, :, :, 0] = x[:, :, :, -1] = value
    return x


def rep_conv_by_hand(x: Tensor, conv: RepConv, training: bool) -> Tensor:
    def norm(x: Tensor, by: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, by.running_mean, by.running_var, by.weight, by.bias, training, by.momentum, by.eps)

    x = F.conv2d(x, conv.expand.weight[:, :, None, None])
    x = F.conv2d(padded_by_hand(x, conv.pad_norm, training), conv.depthwise.weight, groups=x.shape[1])
    x = F.conv2d(x, conv.project.linear.weight[:, :, None, None])
    return norm(norm(x, conv.project.norm), conv.norm)


@pytest.mark.parametrize("training", [False, True])
def test_rep_conv_is_the_papers(training) -> None:
    """Outputs, gradients and the statistics it leaves behind."""
    ours = shake(RepConv(6), (4, 5, 7, 6)).train(training)
    theirs = copy.deepcopy(ours)
    x = torch.randn(3, 6, 5, 4)
    got = run(lambda x: ours(x.movedim(1, -1)).movedim(-1, 1), [x])
    want = run(lambda x: rep_conv_by_hand(x, theirs, training), [x])
    assert worst(got, want) < EXACT
    outputs = ours(x.movedim(1, -1)).movedim(-1, 1), rep_conv_by_hand(x, theirs, training)
    grads = [
        torch.autograd.grad(out.square().sin().sum(), list(conv.parameters()))
        for conv, out in zip((ours, theirs), outputs, strict=True)
    ]
    largest = max(grad.abs().max() for grad in grads[0])  # the last norm takes away what the one before it does
    for (key, _), a, b in zip(ours.named_parameters(), *grads, strict=True):
        assert (a - b).abs().max() < EXACT * largest, key
    for (key, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert key.endswith("num_batches_tracked") or relative(a, b) < EXACT, key


def test_rep_conv_pads_in_training_as_it_would_in_eval_mode() -> None:
    norm = RepConv(4).pad_norm
    nn.init.normal_(norm.bias)
    x = norm(torch.randn(2, 3, 5, 4) + 2)
    assert x.shape == (2, 5, 7, 4)
    corner = norm.eval()(torch.zeros(1, 1, 1, 4))[0, 1, 1]
    for side in (x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]):
        assert relative(side, corner.expand_as(side)) < EXACT
    assert corner.abs().min() > 1e-3


@pytest.mark.parametrize("bits", [0, 4])
def test_rep_conv_folds_into_one_convolution(bits) -> None:
    conv = RepConv(6)
    if bits:
        quantize_weights(conv, bits)
    with pytest.raises(ValueError, match=r"fold\(\) in training mode.*call eval"):
        conv.fold()
    shake(conv, (4, 5, 7, 6))
    x = torch.randn(2, 9, 8, 6)
    want = conv(x)
    folded = conv.fold()
    assert type(folded) is nn.Conv2d
    assert folded.weight.shape == (6, 6, 3, 3)
    assert relative(folded(x.movedim(-1, 1)).movedim(1, -1), want) < EXACT
    striate.optimize_for_inference(conv)
    assert type(conv) is _inference.FoldedRepConv
    with torch.no_grad():
        assert relative(conv(x), want) < EXACT
        assert "_derived" in vars(conv)


def test_recomputed_activations_see_the_padding_of_the_first_forward() -> None:
    conv = shake(RepConv(4), (4, 6, 6, 4)).train()
    twin = copy.deepcopy(conv)
    x = torch.randn(2, 5, 5, 4) + 1
    want = run(conv, [x])
    assert worst(run(lambda x: checkpoint(twin, x, use_reentrant=False), [x]), want) < EXACT
    assert torch.equal(conv.pad_norm.running_mean, twin.pad_norm.running_mean)


# Folded for inference


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize(
    ("layer", "size", "folded"),
    [
        (lambda: LinearNorm(6, 5, bias=True), (3, 4, 4, 6), _inference.FoldedLinearNorm),
        (lambda: LinearNorm(6, 5), (3, 4, 4, 6), _inference.FoldedLinearNorm),
        (lambda: conv_norm(6, 5, stride=2, bias=True), (3, 7, 8, 6), _inference.FoldedConvNorm),
        (lambda: conv_norm(3, 5, kernel=7), (3, 7, 8, 3), _inference.FoldedConvNorm),
    ],
)
def test_norms_fold_into_the_layers_before_them(layer, size, folded, bits) -> None:
    module = layer()
    if bits:
        quantize_weights(module, bits)
    shake(module, size)
    x = torch.randn(size)
    with torch.no_grad():
        want = module(x)
        assert relative(striate.optimize_for_inference(module)(x), want) < EXACT
        assert type(module) is folded
        assert len(vars(module)["_derived"]) == 1
        assert relative(module.float()(x.float()), want) < 1e-5
        module.double()
        for key, p in module.named_parameters():
            before = module(x)
            p.mul_(1.5)
            assert relative(module(x), before) > 1e-3, f"an old {key} was used"
        assert module.train()(x).mean((0, 1, 2)).sub(module.norm.bias).abs().max() < 1e-6  # norms over the batch again


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("timesteps", [1, 3])
def test_whole_models_fold(name, timesteps) -> None:
    model = small(name, timesteps=timesteps)
    x = torch.randn(2, 3, 50, 61)
    with torch.no_grad():
        want, logits = model.forward_features(x), model(x)
        state = copy.deepcopy(model.state_dict())
        striate.optimize_for_inference(model)
        assert relative(model.forward_features(x), want) < EXACT
        assert relative(model(x), logits) < EXACT
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    types = {type(m) for m in model.modules()}
    assert types >= {_inference.FoldedRepConv, _inference.FoldedLinearNorm, _inference.FoldedConvNorm}
    assert (_inference.CachedQuantizedConv2d in types) == name.startswith("qsd")
    with torch.no_grad():
        pickled = copy.deepcopy(model)
        assert relative(pickled(x), logits) < EXACT


# The two families


def test_every_weight_of_qsd_is_quantised_and_every_neuron_an_integer_one() -> None:
    model = small(NAMES[1], distilled=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert all(isinstance(m, Quantized) and m.bits == 4 for m in layers.values())
    assert all(m.init_state.item() == 1 for m in layers.values())
    assert {"stem.conv.conv", "head.fc", "head.fc_dist", "stages.2.blocks.0.attn.q.depthwise"} <= layers.keys()
    steps = {name: m.step for name, m in model.named_modules() if isinstance(m, Multispike)}
    assert {name for name, step in steps.items() if step == 0.5} == {n for n in steps if n.endswith(".attn_lif")}
    assert set(steps.values()) == {0.5, None}
    assert not any(isinstance(m, Lif) for m in model.modules())
    lifs = {name for name, m in small(distilled=True).named_modules() if isinstance(m, Lif)}
    assert steps.keys() == lifs
    assert [p.detach().unique().tolist() for n, p in model.named_parameters() if ".ls" in n] == [[1e-6]] * 6
    model.reset_classifier(3)
    assert isinstance(model.head.fc, QuantizedLinear)
    assert isinstance(model.head.fc_dist, QuantizedLinear)
    assert model.train()(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert model.head.fc.init_state.item() == 1


# Attention


def test_attention_multiplies_heads_of_neighbouring_channels() -> None:
    q, k, v = ((torch.rand(2, 3, 4, 5, 12) < 0.3).double() for _ in range(3))
    got = spike_attention(q, k, v, num_heads=3, scale=0.25)
    assert got.shape == q.shape
    for t in range(2):
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            one = [x[t, ..., part].flatten(1, 2) for x in (q, k, v)]
            want = one[0] @ one[1].transpose(1, 2) @ one[2] * 0.25  # all pairs of tokens
            assert torch.equal(got[t, ..., part].flatten(1, 2), want)


@pytest.mark.parametrize(
    ("name", "scale", "levels", "fired"),
    [(NAMES[0], 0.125, [0, 1], [0, 0, 1]), (NAMES[1], 0.25, [0, 0.25, 0.5, 0.75, 1], [0.5, 2, 2])],
)
def test_attention_of_the_two_families(name, scale, levels, fired) -> None:
    attn = small(name).stages[2].blocks[0].attn
    assert (attn.num_heads, attn.scale) == (4, scale)
    seen: dict[str, Tensor] = {}
    for key in ("head_lif", "q_lif", "k_lif", "v_lif", "attn_lif"):
        attn.get_submodule(key).register_forward_hook(
            lambda m, x, out, key=key: seen.update({key: out, f"{key} in": x[0]})
        )
    x = torch.randn(1, 2, 9, 8, 16) * 3
    attn(x)
    assert torch.equal(seen["head_lif in"], x)
    spikes = [seen[f"{name}_lif"] for name in "qkv"]
    assert all(0.01 < s.mean() < 0.99 for s in spikes)
    assert torch.equal(seen["attn_lif in"], spike_attention(*spikes, num_heads=4, scale=scale))
    assert torch.stack(spikes).unique().tolist() == levels
    assert attn(torch.zeros_like(x)).isfinite().all()
    assert attn.attn_lif(torch.tensor([[0.3, 0.99, 1.0]])).tolist() == [fired]


# Two classifiers


@pytest.mark.parametrize("name", NAMES)
def test_distilled_head(name) -> None:
    model = small(name, distilled=True, timesteps=2)
    x = torch.randn(3, 3, 40, 48)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (3, model.num_features)
    assert pooled.std() > 0.01
    logits, logits_dist = model.get_classifier()(pooled), model.head_dist(pooled)
    assert relative(logits, logits_dist) > 0.1
    assert torch.equal(model(x), (logits + logits_dist) / 2)
    model.set_distilled_training()
    assert torch.equal(model(x), (logits + logits_dist) / 2), "evaluation gives the mean"

    model.train()
    pair = model(x)
    assert isinstance(pair, tuple)
    assert [t.shape for t in pair] == [(3, 10), (3, 10)]
    pair[1].sum().backward()
    assert model.get_classifier().weight.grad is None
    assert model.head_dist.weight.grad.abs().max() > 0
    model.step_logits = True
    assert [t.shape for t in model(x)] == [(2, 3, 10), (2, 3, 10)]
    model.step_logits = False
    model.set_distilled_training(False)
    assert model(x).shape == (3, 10)

    model.reset_classifier(4)
    assert model.head_dist.out_features == model.get_classifier().out_features == 4
    model.set_distilled_training()
    assert [t.shape for t in model(x)] == [(3, 4), (3, 4)]
    model.reset_classifier(0)
    assert model.eval()(x).shape == (3, model.num_features)


def test_only_a_distilled_model_can_be_distilled() -> None:
    model = small()
    assert not hasattr(model, "head_dist")
    model.set_distilled_training(False)
    with pytest.raises(ValueError, match="MetaSpikformer has no distilled head; build it with distilled=True"):
        model.set_distilled_training()
    assert not any("dist" in key for key in model.state_dict())


def test_parameters_of_the_distilled_model_are_as_published() -> None:
    with torch.device("meta"):
        model = striate.create_model("metaspikformer_8_512", distilled=True)
    assert sum(p.numel() for p in model.parameters()) == 55_991_248


# Images, frames, levels


@pytest.mark.parametrize("name", NAMES)
def test_frames_that_repeat_an_image_are_the_image(name) -> None:
    model = small(name, timesteps=3, in_chans=2)
    x = torch.randn(2, 2, 40, 56)
    logits = model(x)
    assert torch.equal(model(x.expand(3, *x.shape)), logits)
    other = x.expand(3, *x.shape).clone()
    other[1] = torch.randn_like(x)
    assert not torch.equal(model(other), logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 96), (53, 71), (1, 5)])
def test_levels_and_strides(name, size) -> None:
    model = small(name, features_only=True, timesteps=2)
    assert model.feature_info.channels() == [4, 8, 12, 16, 24]
    assert model.feature_info.reduction() == [2, 4, 8, 16, 16]
    maps = model(torch.randn(2, 3, *size))
    for m, channels, stride in zip(maps, (4, 8, 12, 16, 24), (2, 4, 8, 16, 16), strict=True):
        assert m.shape == (2, channels, *(math.ceil(side / stride) for side in size))
        assert m.is_contiguous()
        assert m.isfinite().all()


@pytest.mark.parametrize("indices", [(1, 2, 3, 4), (0, 1, 2, 4)], ids=["detection", "segmentation"])
def test_pyramids_keep_their_time(indices) -> None:
    kept = small(features_only=True, timesteps=3, out_indices=indices, keep_time=True)
    mean = striate.create_model(NAMES[0], **SMALL, features_only=True, timesteps=3, out_indices=indices).eval()
    mean.load_state_dict(kept.state_dict())
    x = torch.randn(2, 3, 47, 50)
    channels = [(4, 8, 12, 16, 24)[i] for i in indices]
    for whole, m, dim in zip(kept(x), mean(x), channels, strict=True):
        assert whole.shape == (3, *m.shape)
        assert m.shape[1] == dim
        assert whole.is_contiguous()
        assert relative(whole.mean(0), m) < EXACT
        assert (whole[0] - whole[2]).abs().max() > 1e-3


def test_the_stems_block_is_recomputed_too() -> None:
    model = small(depths=(1, 1, 1, 1)).train()
    x = torch.randn(2, 3, 64, 64)

    def stem() -> Tensor:
        return model.embed(x)

    kept = saved_bytes(stem)
    model.set_grad_checkpointing()
    assert saved_bytes(stem) < 0.3 * kept
    model.set_grad_checkpointing(False)
    assert saved_bytes(stem) == kept


def test_stochastic_depth_is_in_the_attention_blocks() -> None:
    model = striate.create_model(NAMES[0], **SMALL, drop_path_rate=0.4)
    found = {name: m.drop_prob for name, m in model.named_modules() if isinstance(m, DropPath)}
    assert found == {
        "stages.2.blocks.1.drop_path": pytest.approx(0.2),
        "stages.3.blocks.0.drop_path": pytest.approx(0.4),
    }
    block = model.stages[2].blocks[1].train()
    x = torch.randn(2, 3, 4, 4, 16) * 3
    assert not torch.equal(block(x), x)
    block.drop_path.drop_prob = 1.0
    assert torch.equal(block(x), x)


def test_layer_scales_are_on_both_branches() -> None:
    model = small(NAMES[1])
    block = model.stages[2].blocks[1]
    x = torch.randn(1, 3, 4, 4, 16)
    for branch in ("ls1", "ls2"):
        nn.init.ones_(block.get_submodule(branch).gamma)
        assert (block(x) - x).abs().max() > 0.1, branch
        nn.init.zeros_(block.ls1.gamma)
        nn.init.zeros_(block.ls2.gamma)
        assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (8, 12, 16)}, r"dims=\(8, 12, 16\) and depths=.* an entry for each of the four stages"),
        ({"depths": (1, 1)}, "four stages"),
        ({"dims": (7, 12, 16, 24)}, "the first must be even"),
        ({"dims": (8, 12, 18, 24)}, "multiples of num_heads=4"),
        ({"dims": (8, 12, 16, 26)}, "multiples of num_heads=4"),
        ({"timesteps": 0}, "timesteps=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        MetaSpikformer(**{**SMALL, **change})


# The authors' files

OFFICIAL = [  # ours -> theirs
    ("stem.stage.blocks.", "ConvBlock1_1."),
    ("stem.conv.", "downsample1_1.conv."),
    ("stages.0.downsample.", "downsample1_2."),
    ("stages.1.downsample.", "downsample2."),
    ("stages.2.downsample.", "downsample3."),
    ("stages.3.downsample.", "downsample4."),
    ("stages.0.blocks.", "ConvBlock1_2."),
    ("stages.1.blocks.0.", "ConvBlock2_1.0."),
    ("stages.1.blocks.1.", "ConvBlock2_2.0."),
    ("stages.2.blocks.", "block3."),
    ("stages.3.blocks.", "block4."),
    (".sep_conv.expand.linear.", ".Conv.pwconv1."),
    (".sep_conv.expand.norm.", ".Conv.bn1."),
    (".sep_conv.depthwise.", ".Conv.dwconv."),
    (".sep_conv.project.linear.", ".Conv.pwconv2."),
    (".sep_conv.project.norm.", ".Conv.bn2."),
    (".conv1.conv.", ".conv1."),
    (".conv1.norm.", ".bn1."),
    (".conv2.conv.", ".conv2."),
    (".conv2.norm.", ".bn2."),
    (".conv.conv.", ".encode_conv."),
    (".conv.norm.", ".encode_bn."),
    (".expand.", "_conv.0.body.0."),
    (".pad_norm.", "_conv.0.body.1.bn."),
    (".depthwise.", "_conv.0.body.2.0."),
    (".project.linear.", "_conv.0.body.2.1."),
    (".project.norm.", "_conv.0.body.2.2."),
    *[(f".attn.{name}.norm.", f".attn.{name}_conv.1.") for name in "qkv"],
    (".attn.proj.norm.", ".attn.proj_conv.1."),
    *[(f".mlp.{name}.linear.", f".mlp.{name}_conv.") for name in ("fc1", "fc2")],
    *[(f".mlp.{name}.norm.", f".mlp.{name}_bn.") for name in ("fc1", "fc2")],
    (".ls1.gamma", ".layer_scale1"),
    (".ls2.gamma", ".layer_scale2"),
    ("head.fc_dist.", "head_kd."),
    ("head.fc.", "head."),
]


def official(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` as the authors' code saves it, with 1x1 convolutions of one or two dimensions."""
    state = {}
    for key, value in model.state_dict().items():
        name = key
        for ours, theirs in OFFICIAL:
            name = name.replace(ours, theirs)
        if value.ndim == 2 and not name.startswith("head"):
            value = value[..., None] if ".mlp." in name else value[..., None, None]
        state[name] = value
        if name.endswith(".init_state"):
            layer = name.removesuffix(".init_state")
            for part in ("alpha", "zero_point", "init_state", "signed"):
                state[f"{layer}.act.{part}"] = torch.randn(3)
    return state


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distilled", [False, True])
def test_official_keys_load(name, distilled) -> None:
    model, twin = (small(name, distilled=distilled) for _ in range(2))
    state = official(model)
    assert not state.keys() & model.state_dict().keys()
    striate.load_checkpoint(twin, {"model": state, "epoch": 199})
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indices", [(1, 2, 3, 4), (0, 1, 2, 4), (0, 2)])
def test_official_detectors_load_into_pyramids(name, indices, messages) -> None:
    model = small(name)
    inside = {key: value for key, value in official(model).items() if not key.startswith("head")}
    detector = {f"backbone.{key}": value for key, value in inside.items()}
    detector["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    pyramid = striate.create_model(name, **SMALL, features_only=True, out_indices=indices).eval()
    striate.load_checkpoint(pyramid, {"state_dict": detector, "meta": {}})
    said = " ".join(messages())
    assert "left out 1 tensors outside backbone." in said
    assert ("no place for" in said) == (max(indices) < 4)
    x = torch.randn(1, 3, 48, 64)
    want = model.forward_intermediates(x, indices=list(indices), intermediates_only=True)
    for got, m in zip(pyramid(x), want, strict=True):
        assert torch.equal(got, m)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_a_distilled_classifier_leaves_a_fresh_one(name, messages) -> None:
    model, twin = small(name), small(name, distilled=True)
    fresh = copy.deepcopy(twin.head_dist.state_dict())
    for state in (model.state_dict(), official(model)):
        striate.load_checkpoint(twin, state)
        assert messages() == ["the checkpoint has no classifier for distillation: the model's stays as it is"]
        assert all(
            torch.equal(value, model.state_dict()[key]) for key, value in twin.state_dict().items() if "dist" not in key
        )
        assert all(torch.equal(value, fresh[key]) for key, value in twin.head_dist.state_dict().items())
    with pytest.raises(ValueError, match=r"unexpected \(head\.fc_dist\."):
        striate.load_checkpoint(model, twin.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_files_of_other_classes_leave_both_classifiers(name, messages) -> None:
    model, twin = small(name, distilled=True), small(name, distilled=True, num_classes=7)
    heads = copy.deepcopy(twin.head.state_dict())
    striate.load_checkpoint(twin, model.state_dict())
    assert messages() == ["the checkpoint has 10 classes, the model 7: its classifier was not loaded"]
    assert all(torch.equal(value, heads[key]) for key, value in twin.head.state_dict().items())
    assert torch.equal(twin.stem.conv.conv.weight, model.stem.conv.conv.weight)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name) -> None:
    """Of a model whose neurons fire; fresh ones of one step have attention and classifiers without a spike."""
    model = small(name, timesteps=2, distilled=True)
    for key, p in model.named_parameters():
        if key.endswith(".gamma"):
            nn.init.ones_(p)
    model(torch.randn(2, 3, 96, 80)).square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad.isfinite().all(), key
        assert p.grad.abs().max() > 0, key
