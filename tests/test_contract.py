"""What every model promises, over all names: a new model needs no test file of its own."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import timm.optim
import torch
from timm.models._manipulate import group_parameters
from torch import Tensor, nn

import striate
from helpers import outline, relative, saved_bytes
from striate.backbones import Backbone, FeaturePyramid

NAMES = striate.list_models()
FAMILY = {name: striate.model_info(name).family.name for name in NAMES}
FAMILIES = sorted(set(FAMILY.values()))
LIGHTEST = [
    min((n for n in NAMES if FAMILY[n] == f and "cifar" not in n), key=lambda n: striate.model_info(n).params)
    for f in FAMILIES
]
SPIKING = ["metaspikformer", "mst", "qsd_transformer", "spike_driven_transformer"]
SPIKING += ["spikformer", "spikformer_v2", "statten"]
THRESHOLDS = ["binaryvit", "bivit", "ecoformer", "reactdeit"]  # of families without spikes
WITHOUT_WINDOWS = {*SPIKING, "binaryvit", "reactdeit", "ecoformer"} - {"mst"}
SPIKES = [name for name in LIGHTEST if FAMILY[name] in SPIKING]
TOKENS = [name for name in NAMES if name.startswith(("bivit_deit", "reactdeit"))]
PLAIN = [name for name in NAMES if FAMILY[name].startswith(("spikformer", "spike_driven", "statten"))]
PLAIN += ["vig_tiny", "vig_small", "vig_base", *TOKENS]  # one stage, one level
# the larger ones differ in width and depth, as do the sizes of a spiking family
WIDER = ["bivit_deit_small", "bivit_swin_tiny", "ecoformer_pvt_v2_b1", "ecoformer_pvt_v2_b2"]
WIDER += ["binaryvit_small_full_precision_downsample"]
LIGHT = [
    name
    for name in NAMES
    if striate.model_info(name).params < 30 and (FAMILY[name] not in SPIKING or name in SPIKES) and name not in WIDER
]
# in one step, neurons of a fresh model need twice their threshold: those of attention and the classifier keep silent
SILENT = [name for name in NAMES if FAMILY[name] in ("metaspikformer", "qsd_transformer")]
# thresholds turn roundings into other spikes and signs
ROUGH = [name for name in NAMES if name in SPIKES or FAMILY[name] in ("binaryvit", "bivit", "reactdeit")]


def each(*names: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names, arguments)


# arguments of the models in LIGHT: no test but that of the full size depends on widths
NARROW: dict[str, dict[str, Any]] = {
    **each("bivit_nano", num_heads=(2, 2, 4, 4)),  # of two stages
    **each("biformer", dims=(32, 64, 96, 128)),
    **each("binaryvit", dim=16, head_dim=16),
    **each("bivit_deit_tiny", "reactdeit", "vig", dim=64, num_heads=2),
    **each("crossformer", "crossformer_pp", "swin", "swinv2", dim=32, num_heads=(1, 2, 4, 8)),
    **each("davit", "ecoformer", "vig_h_tiny", dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4)),
    **each("maxvit", stem_dim=16, dims=(32, 64, 96, 128)),
    **each("metaspikformer", "qsd_transformer", dims=(32, 48, 64, 64), num_heads=4),
    **each("spike_driven_transformer", "spikformer", "spikformer_v2", "statten", dim=64, num_heads=4),
}
# a first and a last stage, where all others are like the first; two blocks in it where two kinds alternate
SHORT: dict[str, dict[str, Any]] = {
    **each("biformer", depths=(1, 1), dims=(32, 64), topks=(2, 0)),
    **each("binaryvit", depths=(1, 1), mlp_ratios=(8, 4), reductions=(8, 1)),
    **each("bivit", "mst", "swin", "swinv2", depths=(2, 1), num_heads=(1, 2)),
    **each("crossformer", "crossformer_pp", depths=(2, 1), num_heads=(1, 2), group_size=(7, 7), interval=(4, 1)),
    **each("davit", depths=(1, 1), dims=(32, 64), num_heads=(1, 2)),
    **each("ecoformer", depths=(1, 1), dims=(32, 64), num_heads=(1, 2), mlp_ratios=(8.0, 4.0)),
    **each("maxvit", depths=(2, 1), dims=(32, 64)),
    **each("metaspikformer", "spike_driven_transformer", "spikformer", "spikformer_v2", "statten", timesteps=2),
}
PYRAMIDS = [name for name in LIGHT if name not in PLAIN]

SMALL = (128, 112)  # a size that every model takes
ODD = (131, 119)  # divisible by no stride and no window


@pytest.fixture(autouse=True)
def _precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Thresholds in float64: a rounding error of float32 that crosses one changes all that follows."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    exact = FAMILY.get(name) in SPIKING + THRESHOLDS
    exact = exact and request.function not in (test_full_size, test_bfloat16_autocast)
    monkeypatch.setattr(striate.backbones.ecoformer, "STEPS", 2)  # of learning to hash, in the first training step
    torch.set_default_dtype(torch.float64 if exact else torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


def make(name: str, depth: int = 2, **kwargs: Any) -> nn.Module:
    """The model with `depth` blocks in every stage: two show all kinds of blocks."""
    depths = (depth,) * (1 if name in PLAIN else 4)
    narrow = NARROW.get(name, NARROW.get(FAMILY[name], {})) if name in LIGHT else {}
    return shaken(striate.create_model(name, **{"depths": depths} | narrow | kwargs))


def short(name: str, **kwargs: Any) -> nn.Module:
    """The model with as few stages, blocks and time steps as show every kind, since tracing takes long for each."""
    return make(name, 1, **SHORT.get(FAMILY[name], {}) | kwargs)


def shaken(model: nn.Module) -> nn.Module:
    """Some parameters start at 0, and whole blocks as identities, which would hide mistakes in them."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and not name.endswith("alpha"):  # a step of quantised weights is no matter of taste
                p.add_(0.2 * torch.randn_like(p))
    return model


def map_side(name: str, side: int, stride: int) -> int:
    """Tokens along a side of the image; the patches of two published models leave out the last pixels of odd sizes."""
    if FAMILY[name] == "vig" and name in PLAIN:
        return ((side - 7) // 8 + 2) // 2
    return side // stride if name.startswith("biformer_stl") else math.ceil(side / stride)


def strides(name: str) -> list[int]:
    """Of the levels of a pyramid."""
    if name in PLAIN:
        return [4] if name.endswith("_cifar") else [8] if name == "spikformer_nano" else [16]
    if FAMILY[name] in ("metaspikformer", "qsd_transformer"):
        return [2, 4, 8, 16, 16]
    return [2, 4, 8, 16, 32][FAMILY[name] != "maxvit" :]


def fitting(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """The size, or a quarter of it for models of images of 32 pixels, whose maps stay large."""
    return (size[0] // 4, size[1] // 4) if striate.model_info(name).input_size[1] == 32 else size


def settled(name: str, features: Tensor) -> Tensor:
    """What the last map of an image of `SMALL` is as an intermediate: the mean over the steps, no class token."""
    if name in TOKENS:
        return features[:, 1:].unflatten(1, [side // strides(name)[0] for side in SMALL])
    return features.mean(0) if FAMILY[name] in SPIKING else features


def image(size: tuple[int, int] = SMALL, batch: int = 2, chans: int = 3) -> Tensor:
    return torch.randn(batch, chans, *size)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # stochastic depth
    out = model(x)
    sum(o.float().pow(2).sum() for o in (out if isinstance(out, list) else [out])).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# three have the blocks of others in several GB; tests/test_model_table.py runs every model as it is, without numbers
@pytest.mark.parametrize("name", [n for n in NAMES if striate.model_info(n).params < 250])
def test_full_size(name) -> None:
    """Finite logits and gradients at published widths; those of LIGHT have all blocks, others one of each kind."""
    model = (
        striate.create_model(name)
        if name in LIGHT
        else make(name, 2 if SHORT.get(FAMILY[name], {}).get("depths") == (2, 1) else 1)
    )
    size = fitting(name, SMALL)
    x = image(size, batch=1)
    with torch.no_grad():
        logits = model.eval()(x)
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()
    for key, grad in gradients((shaken(model) if name in LIGHT else model).train(), image(size)).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
        if not (name in SILENT and (".attn." in key or key.startswith("head."))):
            assert grad.abs().max() > 0, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(128, 160), ODD], ids=["divisible", "odd"])
def test_feature_pyramid(name, size) -> None:
    """Maps of the stated strides and channels; with numbers, and gradients, for the smaller models of every family."""
    with contextlib.nullcontext() if name in LIGHT else outline():
        model = make(name, 1, features_only=True)
        size = fitting(name, size)
        x = image(size)
    info = model.feature_info
    maps = model.train(name in LIGHT)(x)
    assert info.reduction() == strides(name)
    assert [m.shape[1] for m in maps] == info.channels()
    for m, stride in zip(maps, info.reduction(), strict=True):
        assert m.shape[0] == 2
        assert m.shape[2:] == tuple(map_side(name, side, stride) for side in size)
        assert m.is_contiguous()
    if name in LIGHT:
        for key, grad in gradients(model, x).items():
            assert grad is not None, key
            assert grad.isfinite().all(), key


@pytest.mark.parametrize("name", PYRAMIDS)
def test_feature_pyramid_chooses_stages(name) -> None:
    x = image(ODD)
    model = make(name, features_only=True).eval()
    some = make(name, features_only=True, out_indices=(1, 2 - len(model.feature_info.info))).eval()
    some.load_state_dict(model.state_dict(), strict=False)
    assert some.out_indices == (1, 2)
    assert some.feature_info.channels() == model.feature_info.channels()[1:3]
    assert sum(p.numel() for p in some.parameters()) < sum(p.numel() for p in model.parameters())
    for got, want in zip(some(x), model(x)[1:3], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_feature_norms(name) -> None:
    """Returned maps are normalised over channels, the map that goes on is not."""
    x = image(ODD)
    plain = make(name, features_only=True).eval()
    normed = make(name, features_only=True, feature_norms=True, out_indices=(0, 2, 3)).eval()
    assert list(normed.norms) == ["0", "2", "3"]
    normed.load_state_dict(plain.state_dict(), strict=False)
    unnormed = plain(x)
    for got, i in zip(normed(x), (0, 2, 3), strict=True):
        norm = normed.norms[str(i)]
        want = norm(unnormed[i].movedim(1, -1)).movedim(-1, 1)
        assert relative(got, want) < 1e-5
        assert relative(got, unnormed[i]) > 1e-2
        assert got.is_contiguous()
    assert all(grad.isfinite().all() for grad in gradients(normed.train(), x).values())


@pytest.mark.parametrize("name", PYRAMIDS)
def test_intermediates_agree_with_the_forward(name) -> None:
    model = make(name).eval()
    x = image(ODD)
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, features)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pooled), model(x))

        channels_last = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        for a, b in zip(maps, channels_last, strict=True):
            assert a.is_contiguous()
            assert b.is_contiguous()
            assert torch.equal(a.permute(0, 2, 3, 1), b)

        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        assert len(normed) == 1
        last = settled(name, features)
        last = last if model.output_fmt == "NCHW" else last.permute(0, 3, 1, 2)
        assert torch.equal(normed[0], last)
        # DaViT and MaxViT normalise after pooling
        assert torch.equal(normed[0], maps[-1]) == isinstance(model.norm, nn.Identity)

        early, some = model.forward_intermediates(x, indices=[0, 1 - len(maps)], stop_early=True)
        assert [torch.equal(a, b) for a, b in zip(some, maps, strict=False)] == [True, True]
        early = settled(name, early)
        assert torch.equal(early if model.output_fmt == "NCHW" else early.permute(0, 3, 1, 2), maps[1])


@pytest.mark.parametrize("name", LIGHT)
def test_feature_info_names_modules_that_make_the_maps(name) -> None:
    model = make(name).eval()
    seen = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda _m, _x, out: seen.append(out))
    with torch.no_grad():
        maps = model.forward_intermediates(image(), output_fmt=model.output_fmt, intermediates_only=True)
    assert all(torch.equal(settled(name, a), b) for a, b in zip(seen, maps, strict=True))


@pytest.mark.parametrize("name", LIGHTEST)
@pytest.mark.parametrize("which", ["none", "too many", "after", "before", "empty"])
def test_levels_out_of_range_are_an_error(name, which) -> None:
    with outline():
        model = make(name, 1)
    count = len(model.feature_info)
    indices = {"none": 0, "too many": count + 1, "after": [count], "before": [-count - 1], "empty": []}[which]
    with pytest.raises(ValueError, match=r"indices=.* out of range: the model has levels 0 to "):
        model.forward_intermediates(image(), indices=indices)
    with outline(), pytest.raises(ValueError, match="out of range"):
        make(name, 1, features_only=True, out_indices=indices)


@pytest.mark.parametrize("name", LIGHTEST)
def test_unknown_layout_is_an_error(name) -> None:
    with outline(), pytest.raises(ValueError, match="output_fmt='NLC'; use 'NCHW' or 'NHWC'"):
        make(name, 1).forward_intermediates(image(), output_fmt="NLC")


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pruned_models_still_give_their_intermediates(name) -> None:
    model = make(name).eval()
    x = image(ODD)
    with torch.no_grad():
        want = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        before = sum(p.numel() for p in model.parameters())
        assert model.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
        assert sum(p.numel() for p in model.parameters()) < before
        assert model.num_classes == 0
        got = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", LIGHT)
def test_reset_classifier(name) -> None:
    model = make(name, 1).eval()
    x = image()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier().out_features == 7
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, "")
    if FAMILY[name] in SPIKING:
        assert torch.equal(model(x), model.forward_features(x).mean(0))
    elif isinstance(model.norm, nn.Identity):  # timm's head that normalises after pooling gives an NCHW map
        assert model(x).shape == model.forward_features(x).permute(0, 3, 1, 2).shape
    else:
        assert torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(5, "max")
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("name", LIGHT)
def test_without_classifier_and_with_other_channels(name) -> None:
    model = make(name, 1, num_classes=0, in_chans=1).eval()
    assert model.num_classes == 0
    assert model.default_cfg["input_size"][0] == 1
    assert model.default_cfg["num_classes"] == 0
    assert model(image(chans=1)).shape == (2, model.num_features)
    assert not any(key.startswith("head.fc.") for key in model.state_dict())


@pytest.mark.parametrize("name", LIGHT)
def test_grad_checkpointing_gives_equal_gradients_and_keeps_less(name) -> None:
    model = make(name, drop_path_rate=0.3).train()
    x = image(ODD)
    twin = copy.deepcopy(model)  # of which some parts follow running statistics
    want, kept = gradients(model, x), saved_bytes(lambda: model(x))
    twin.set_grad_checkpointing()
    got = gradients(twin, x)
    model.set_grad_checkpointing()
    # where the true gradient is 0 (a bias before a batch norm) both hold rounding errors alone
    noise = 1e-9 * max(float(g.abs().max()) for g in want.values())
    for key in want:
        assert (got[key] - want[key]).abs().max() < 1e-5 * want[key].abs().max() + noise, key
    assert saved_bytes(lambda: model(x)) < 0.6 * kept
    model.set_grad_checkpointing(False)
    assert 0.9 * kept < saved_bytes(lambda: model(x)) < 1.1 * kept  # what stochastic depth drops is not kept
    pyramid = make(name, features_only=True)
    kept = saved_bytes(lambda: pyramid(x)[-1])
    pyramid.set_grad_checkpointing()
    assert saved_bytes(lambda: pyramid(x)[-1]) < 0.6 * kept


@pytest.mark.parametrize("pyramid", [False, True], ids=["classifier", "pyramid"])
@pytest.mark.parametrize("name", LIGHT)
def test_layer_decay_groups(name, pyramid) -> None:
    """The stem comes first, then every block (or stage) in order, the classifier and feature norms last."""
    with outline():
        model = make(name, features_only=True, feature_norms=True) if pyramid else make(name)
    backbone = model.backbone if pyramid else model
    prefix = "backbone." if pyramid else ""
    stages = f"{prefix}{backbone.stages_name}"
    for coarse in (False, True):
        layer = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert layer.keys() == dict(model.named_parameters()).keys()
        last = max(layer.values())
        stem = [k for k in layer if k.startswith(f"{prefix}{backbone.stem_name}.") or k == f"{prefix}pos_embed"]
        assert stem
        assert {layer[key] for key in stem} == {0}
        assert {key for key, at in layer.items() if at == 0} == set(stem)
        expected = 1
        for i, stage in enumerate(backbone.stage_list):
            for j in range(len(stage.blocks)):
                inside = [f"{stages}.{i}.blocks.{j}."] + [f"{stages}.{i}.downsample."] * (j == 0)
                assert {at for key, at in layer.items() if key.startswith(tuple(inside))} == {expected}
                expected += not coarse
            expected += coarse
        assert last == expected
        tops = {key.split(".")[0] for key, at in layer.items() if at == last}
        norm = {"norm"} if coarse and not isinstance(backbone.norm, nn.Identity) else set()
        assert tops == ({"norms"} if pyramid else {"head"} | norm)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("pyramid", [False, True], ids=["classifier", "pyramid"])
def test_optimizer_groups(name, pyramid) -> None:
    """timm's optimizer factory takes every parameter once, and spares what the model names from weight decay."""
    with outline():
        model = make(name, 1, features_only=pyramid)
    spared = model.no_weight_decay()
    shapes = {key: p.shape for key, p in model.named_parameters()}
    assert spared <= shapes.keys()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8)
    names = {id(p): key for key, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == shapes.keys()
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    for key, value in decay.items():
        assert value == (0 if key in spared or len(shapes[key]) <= 1 else 0.05), key


@pytest.mark.parametrize("name", LIGHT)
def test_state_dict_round_trip(name) -> None:
    first, second = make(name).eval(), make(name).eval()
    x = image()
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    striate.load_checkpoint(second, first.state_dict())
    assert torch.equal(first(x), second(x))
    derived = dict(first.named_buffers()).keys() - first.state_dict().keys()
    assert all("running" not in key for key in derived)


@pytest.mark.parametrize("name", LIGHT)
def test_copies_and_pickles(name) -> None:
    model = make(name, 1, num_classes=3).eval()
    x = image()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert twin.pretrained_cfg == model.pretrained_cfg


@pytest.mark.parametrize("name", LIGHT)
def test_evaluation_is_deterministic_and_sees_each_image_alone(name, monkeypatch) -> None:
    monkeypatch.setattr(striate.backbones._base, "CACHE_BYTES", 1)  # without gradients, stages see one image at a time
    model = make(name, drop_path_rate=0.5, drop_rate=0.5).eval()
    x = image(batch=3)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(first, model(x))
        alone = torch.cat([model(one[None]) for one in x])
    assert relative(alone, first) < 1e-5
    assert relative(model(x), first) < 1e-5  # with gradients enabled another path may run
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", LIGHTEST)
def test_bfloat16_autocast(name) -> None:
    model = make(name).eval()
    x = image(ODD)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        with torch.no_grad():
            again = model(x)
    assert got.dtype == torch.bfloat16
    if name not in ROUGH:
        assert relative(got, want) < 0.1
        assert relative(again, want) < 0.1
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().pow(2).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("name", LIGHT)
def test_float64(name) -> None:
    model = make(name, 1).eval()
    x = image()
    single = model.float()(x.float())
    double = model.double()(x.double())
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert relative(single, double) < (1.0 if name in ROUGH else 1e-4)


@pytest.mark.parametrize("name", LIGHT)
def test_channels_last_images(name) -> None:
    model = make(name, 1).eval()
    x = image()
    assert relative(model(x.contiguous(memory_format=torch.channels_last)), model(x)) < 1e-5


@pytest.mark.parametrize("name", LIGHTEST)
def test_compile_as_one_graph(name) -> None:
    torch.compiler.reset()
    model = short(name).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = image()

    def run(call: Any) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        out = call(x)
        out.float().pow(2).sum().backward()
        return out.detach(), [p.grad for p in model.parameters()]

    (want_out, want), (got_out, got) = run(model), run(compiled)  # the program without gradients is that of the export
    assert relative(got_out, want_out) < 1e-5
    # where the true gradient is 0 (what softmax cancels) both hold rounding errors alone
    noise = 1e-6 * max(float(g.abs().max()) for g in want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() + noise


@pytest.mark.parametrize("name", LIGHTEST)
def test_export_for_any_batch_and_size(name) -> None:
    """One program for all sizes of which every stage has, like the example's, several windows in a row.

    The sizes of MaxViT's grids, quotients of quotients, are more than the solver of torch.export can compare: there
    the batch alone is free, and in families that cut and join maps with the code of another one, as sizes take long.
    """
    model = short(name, features_only=True, feature_norms=True).eval()
    free = torch.export.Dim.DYNAMIC
    shrink = 2 if FAMILY[name] in WITHOUT_WINDOWS else 1
    with torch.no_grad():
        fixed = FAMILY[name] in ("crossformer_pp", "maxvit", "qsd_transformer", "statten", "swinv2")
        dims = {0: free} if fixed else {0: free, 2: free, 3: free}
        large, larger, odd = ((h // shrink, w // shrink) for h, w in ((264, 272), (320, 288), (257, 299)))
        program = torch.export.export(model, (image(large),), dynamic_shapes=(dims,))
        others = [image(large, batch=3)] if fixed else [image(larger, batch=3), image(odd, batch=1)]
        for x in (image(large), *others):
            for got, want in zip(program.module()(x), model(x), strict=True):
                assert relative(got, want) < 1e-5


@pytest.mark.parametrize("name", LIGHTEST)
def test_functional_ensembles(name) -> None:
    """`torch.func` over stacked parameters, and gradients per sample."""
    models = [make(name, 1, num_classes=3).eval() for _ in range(2)]
    params, buffers = torch.func.stack_module_state(models)
    x = image()

    def call(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (params, buffers), (x,))

    want = torch.stack([model(x) for model in models])
    assert relative(torch.vmap(call, in_dims=(0, 0, None))(params, buffers, x), want) < 1e-5
    with torch.no_grad():
        assert relative(torch.vmap(call, in_dims=(0, 0, None))(params, buffers, x), want) < 1e-5

    params, buffers = dict(models[0].named_parameters()), dict(models[0].named_buffers())
    key = f"{models[0].stem_name}.{next(iter(models[0].get_submodule(models[0].stem_name).state_dict()))}"

    def loss(params: dict[str, Tensor], one: Tensor) -> Tensor:
        return call(params, buffers, one[None]).pow(2).sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)[key]
    want = torch.stack([gradients(models[0], one[None])[key] for one in x])
    assert relative(got, want) < 1e-4


@pytest.mark.parametrize("name", LIGHTEST)
@pytest.mark.filterwarnings("ignore")
def test_traces_serve_other_batches(name) -> None:
    model = make(name, 1).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, image(batch=3), check_trace=False)
        x = image(batch=5)
        assert relative(traced(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", LIGHTEST)
def test_an_empty_batch_gives_no_logits(name) -> None:
    model = make(name, 1).eval()
    with torch.no_grad():
        assert model(image(batch=0)).shape == (0, 1000)


@pytest.mark.parametrize("name", LIGHT)
def test_construction_without_memory(name) -> None:
    """On the meta device, as sharded training initialises models."""
    with torch.device("meta"):
        model = make(name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {key: p.shape for key, p in model.state_dict().items()} == {
        key: p.shape for key, p in make(name).state_dict().items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_types_and_attributes(name) -> None:
    with outline():
        model, pyramid = make(name, 1), make(name, 1, features_only=True)
    info = striate.model_info(name)
    assert isinstance(model, Backbone)
    assert isinstance(pyramid, FeaturePyramid)
    assert model.num_features == model.head_hidden_size == model.feature_info[-1]["num_chs"]
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg["architecture"] == name
    assert model.pretrained_cfg["input_size"] == info.input_size
    assert model.pretrained_cfg["license"] == info.family.licence
    first, classifier = model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    for conv in [first] if isinstance(first, str) else first:
        assert model.get_submodule(conv).in_channels == 3
    assert model.get_submodule(classifier) is model.get_classifier()
