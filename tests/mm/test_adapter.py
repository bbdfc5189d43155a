"""`StriateBackbone`: what mmdetection and mmsegmentation ask of a backbone, for all of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import striate
import test_parity
from helpers import relative
from striate.detection.mmdet import StriateBackbone
from striate.segmentation import mmseg

# one small form of every family whose pyramid has four levels
SMALL: dict[str, dict[str, Any]] = {
    "biformer_nano": {},
    "swin_tiny": dict(dim=32, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8)),
    "swinv2_tiny_window8_256": dict(dim=32, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8)),
    "davit_tiny": dict(dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4)),
    "crossformer_small": dict(dim=32, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8)),
    "crossformer_pp_small": dict(dim=32, depths=(1, 4, 1, 1), num_heads=(1, 2, 4, 8)),
    "vig_h_tiny": dict(dims=(32, 64, 96, 128), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4)),
    "metaspikformer_15m": dict(dims=(32, 48, 64, 64), num_heads=4, timesteps=1),
}
NAMES = list(SMALL)
FIXTURES = sorted(
    path.stem
    for path in test_parity.FIXTURES.glob("*.json")
    if json.loads(path.read_text())["kwargs"].get("features_only")
)


def build(name: str, **kwargs: Any) -> StriateBackbone:
    return MODELS.build(dict(type="StriateBackbone", name=name, **{**SMALL.get(name, {}), **kwargs}))


class Detector(BaseModel):
    """The outline of a detector: a backbone and something after it."""

    def __init__(self, backbone: dict[str, Any], neck: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.neck = nn.Conv2d(self.backbone.out_channels[-1], 4, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return self.neck(self.backbone(inputs)[-1])


@pytest.mark.parametrize("scope", ["mmdet", "mmseg", "mmengine"])
def test_both_packages_find_it_under_its_plain_name(scope) -> None:
    registry = MODELS
    if scope != "mmengine":
        registry = __import__(f"{scope}.registry", fromlist=["MODELS"]).MODELS
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(registry.build(dict(type="StriateBackbone", name="biformer_nano")), StriateBackbone)
    assert mmseg.StriateBackbone is StriateBackbone


@pytest.mark.parametrize("name", NAMES)
def test_maps(name) -> None:
    model = build(name).eval()
    channels, strides = model.out_channels, model.strides  # before the first forward
    x = torch.randn(2, 3, 131, 166)
    maps = model(x)
    assert isinstance(maps, tuple)
    assert [m.shape[:2] for m in maps] == [(2, dim) for dim in channels]
    sizes = [(-(-131 // stride), -(-166 // stride)) for stride in strides]
    assert [tuple(m.shape[2:]) for m in maps] == sizes
    assert all(m.is_contiguous() for m in maps)
    assert all(m.is_contiguous() for m in model(x.to(memory_format=torch.channels_last)))
    assert all(m.is_contiguous() for m in build(name, feature_norms=True).eval()(x))


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "resnet18"])
def test_models_of_timm(name) -> None:
    extra = dict(img_size=128, strict_img_size=False, depths=(1, 1, 1, 1)) if name.startswith("swin") else {}
    model = build(name, out_indices=(1, 2), **extra).eval()
    maps = model(torch.randn(1, 3, 128, 160).to(memory_format=torch.channels_last))
    sizes = [
        (1, dim, 128 // stride, 160 // stride) for dim, stride in zip(model.out_channels, model.strides, strict=True)
    ]
    assert [tuple(m.shape) for m in maps] == sizes
    assert all(m.is_contiguous() for m in maps)


def test_roi_align_of_compiled_mmcv_sees_the_right_numbers() -> None:
    """Its operator reads a channels-last map in the wrong order and says nothing."""
    from mmcv.ops import RoIAlign
    from torchvision.ops import roi_align

    model = build("biformer_nano").eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 128, 160).to(memory_format=torch.channels_last))[0]
    rois = torch.tensor([[0.0, 10.0, 12.0, 90.0, 70.0]])
    want = roi_align(features, rois, 7, 0.25, 2, aligned=True)
    pool = RoIAlign(7, spatial_scale=0.25, sampling_ratio=2, aligned=True)
    assert relative(pool(features, rois), want) < 1e-5
    assert relative(pool(features.to(memory_format=torch.channels_last), rois), want) > 0.1  # the trap itself


@pytest.mark.parametrize("name", FIXTURES)
def test_numbers_of_the_authors(name, tmp_path) -> None:
    record, want = test_parity.read(name)
    path = tmp_path / "backbone.pth"
    torch.save({"model": test_parity.official_weights(record)}, path)
    kwargs = {key: value for key, value in record["kwargs"].items() if key != "features_only"}
    init = dict(type="Pretrained", checkpoint=str(path))
    model = MODELS.build(dict(type="StriateBackbone", name=record["model"], **kwargs, init_cfg=init))
    model.init_weights()
    x = test_parity.normal(record["input_shape"], record["input_seed"])
    with torch.no_grad():
        maps = model.eval()(x)
    assert relative(torch.cat([m.mean((2, 3)) for m in maps], 1), want["output"]) < test_parity.OUTPUT
    for i, m in enumerate(maps):
        got = m.flatten()[want[f"feature{i}_index"].long()]
        assert relative(got, want[f"feature{i}_value"]) < test_parity.FEATURE


def trained(name: str, **kwargs: Any) -> nn.Module:
    """A model with other weights than any fresh one."""
    model = striate.create_model(name, **{**SMALL[name], **kwargs})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def authors(state: dict[str, Any]) -> dict[str, Any]:
    """Keys of the authors' Swin Transformer out of ours."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"^(?:backbone\.)?layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        key = re.sub(r"^norms\.(\d)", r"norm\1", key.removeprefix("backbone."))
        out[key.replace("head.fc.", "head.")] = value
    return out


@pytest.mark.parametrize("kind", ["classification", "detection", "ours", "ours_pyramid", "runner", "folder", "hub"])
def test_weights_of(kind, tmp_path, messages, request) -> None:
    pyramid = kind in ("detection", "ours_pyramid", "runner")
    source = trained("swin_tiny", **(dict(features_only=True, feature_norms=True) if pyramid else {}))
    state = source.state_dict()
    path = tmp_path / "file.pth"
    address = str(path)
    if kind == "classification":
        torch.save({"model": authors(state), "epoch": 3}, path)
    elif kind == "detection":
        inside = {f"backbone.{key}": value for key, value in authors(state).items()}
        torch.save({"state_dict": {**inside, "neck.weight": torch.ones(1), "norms.weight": torch.ones(1)}}, path)
    elif kind == "runner":  # mmengine's, which keeps the losses of the training in a class of its own
        inside = {f"backbone.{key.removeprefix('backbone.')}": value for key, value in state.items()}
        log = {"train/loss": HistoryBuffer([1.0, 0.5], [1, 1])}
        torch.save({"state_dict": inside, "message_hub": {"log_scalars": log}}, path)
    elif kind == "hub":
        request.getfixturevalue("hub")
        striate.push(source, "org/model")
        address = "hf-hub:org/model"
    elif kind == "folder":
        striate.push(source, f"local-dir:{tmp_path / 'saved'}")
        address = f"local-dir:{tmp_path / 'saved'}"
    else:
        path = tmp_path / "model.safetensors"
        address = str(path)
        safetensors.torch.save_file(state, path)
    model = build("swin_tiny", feature_norms=True, init_cfg=dict(type="Pretrained", checkpoint=address))
    model.init_weights()
    got = model.pyramid.state_dict()
    for key, value in state.items():
        if key.startswith(("head.", "norm.")):
            continue
        place = key if key.startswith(("norms.", "backbone.")) else f"backbone.{key}"
        assert torch.equal(got[place], value), key
    said = " ".join(messages())
    assert ("feature norms" in said) == (not pyramid)


def test_a_saved_model_by_its_name(tmp_path) -> None:
    source = trained("swin_tiny")
    striate.push(source, f"local-dir:{tmp_path / 'saved'}")
    detector = Detector(dict(type="StriateBackbone", name=f"local-dir:{tmp_path / 'saved'}"))
    detector.init_weights()
    key = "layers.1.blocks.0.mlp.fc1.weight"
    assert torch.equal(detector.backbone.state_dict()[key], source.state_dict()[key])


def test_weights_of_timm(tmp_path) -> None:
    source = timm.create_model("convnext_atto", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "file.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "file.pth"))
    model = build("convnext_atto", out_indices=(1, 3), init_cfg=init).eval()
    x = torch.randn(1, 3, 64, 96)
    want = source.eval().forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert relative(model(x)[1], want[1]) > 0.1
    model.init_weights()
    assert max(relative(a, b) for a, b in zip(model(x), want, strict=True)) < 1e-5


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    want = striate.create_model("swin_tiny", features_only=True, **SMALL["swin_tiny"]).state_dict()
    torch.manual_seed(0)
    detector = Detector(dict(type="StriateBackbone", name="swin_tiny", **SMALL["swin_tiny"]))
    detector.init_weights()  # of mmengine, which calls `init_weights` of whatever has it
    got = detector.backbone.pyramid.state_dict()
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_weights_are_not_loaded_twice(tmp_path) -> None:
    torch.save(trained("biformer_nano").state_dict(), tmp_path / "file.pth")
    model = build("biformer_nano", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "file.pth")))
    model.init_weights()
    (tmp_path / "file.pth").unlink()
    model.init_weights()


def test_state_dict_is_that_of_the_model(tmp_path) -> None:
    detector = Detector(dict(type="StriateBackbone", name="swin_tiny", feature_norms=True, **SMALL["swin_tiny"]))
    for parameter in detector.parameters():
        nn.init.normal_(parameter)
    state = detector.state_dict()
    assert {"backbone.layers.0.blocks.0.norm1.weight", "backbone.norms.3.weight", "neck.weight"} <= state.keys()
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "epoch_1.pth")
    twin = striate.create_model("swin_tiny", features_only=True, feature_norms=True, **SMALL["swin_tiny"])
    striate.load_checkpoint(twin, tmp_path / "epoch_1.pth")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(twin.eval()(x)[3], detector.eval().backbone(x)[3])

    other = Detector(dict(type="StriateBackbone", name="swin_tiny", feature_norms=True, **SMALL["swin_tiny"]))
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), detector.parameters(), strict=True))
    official = {f"backbone.{key}": v for key, v in authors(detector.backbone.state_dict()).items()}
    assert "backbone.norm3.weight" in official
    fresh = Detector(dict(type="StriateBackbone", name="swin_tiny", feature_norms=True, **SMALL["swin_tiny"]))
    fresh.load_state_dict({**official, "neck.weight": state["neck.weight"], "neck.bias": state["neck.bias"]})
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), detector.parameters(), strict=True))


def test_mmengine_saves_and_loads_the_same_keys(tmp_path) -> None:
    from mmengine.runner import load_checkpoint, save_checkpoint
    from mmengine.runner.checkpoint import get_state_dict

    detector = Detector(dict(type="StriateBackbone", name="biformer_nano"))
    assert list(get_state_dict(detector)) == list(detector.state_dict())
    save_checkpoint({"state_dict": get_state_dict(detector)}, str(tmp_path / "file.pth"))
    other = Detector(dict(type="StriateBackbone", name="biformer_nano"))
    load_checkpoint(other, str(tmp_path / "file.pth"), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), detector.parameters(), strict=True))


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
@pytest.mark.parametrize("name", ["biformer_nano", "swin_tiny"])
def test_frozen_stages(name, frozen) -> None:
    model = build(name, frozen_stages=frozen, drop_path_rate=0.5).train()
    backbone = model.pyramid.backbone
    parts = [backbone.get_submodule(backbone.stem_name), *backbone.stage_list]
    for i, part in enumerate(parts):
        still = i <= frozen
        assert all(p.requires_grad != still for p in part.parameters()), i
        assert all(m.training != still for m in part.modules()), i
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0) if frozen < 4 else None
    loss = sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64)))
    if optimizer is not None:
        loss.backward()
        optimizer.step()
    prefixes = tuple([backbone.stem_name, *(f"{backbone.stages_name}.{i}." for i in range(4))][: frozen + 1])
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert {key for key in before if prefixes and key.startswith(prefixes)} <= same
    assert (len(same) < len(before)) == (frozen < 4)


def test_norm_eval() -> None:
    for norm_eval in (True, False):
        model = build("biformer_nano", norm_eval=norm_eval).train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert all(norm.training != norm_eval for norm in norms)
        before = [norm.running_mean.clone() for norm in norms]
        maps = model(torch.randn(2, 3, 64, 64))
        changed = [not torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True)]
        assert any(changed) != norm_eval
        sum(m.sum() for m in maps).backward()
        assert all(norm.weight.grad is not None for norm in norms)
        assert model.training
        assert not model.eval().training


def test_with_cp_changes_no_number() -> None:
    torch.manual_seed(0)
    plain = build("swin_tiny")
    saving = build("swin_tiny", with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    gradients = []
    for model in (plain, saving):
        sum(m.square().mean() for m in model(x)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert all(stage.grad_checkpointing for stage in saving.pyramid.backbone.stage_list)


def test_drop_path_rate() -> None:
    rates = [m.drop_prob for m in build("swin_tiny", drop_path_rate=0.3).modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)


def layer_rates(model: Detector, **paramwise: Any) -> dict[str, dict[str, float]]:
    wrapper = build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            constructor="LayerDecayConstructor",
            optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.05),
            paramwise_cfg=paramwise,
        ),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(group["params"][0])]: group for group in wrapper.optimizer.param_groups}


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay(name) -> None:
    model = Detector(dict(type="StriateBackbone", name=name, feature_norms=True, **SMALL[name]))
    groups = layer_rates(model, layer_decay=0.5, norm_decay_mult=0.0)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    inside = model.backbone.pyramid.backbone
    blocks = [
        f"{inside.stages_name}.{i}.blocks.{j}." for i, s in enumerate(inside.stage_list) for j in range(len(s.blocks))
    ]
    rate = {name.removeprefix("backbone.pyramid.backbone."): group["lr"] for name, group in groups.items()}
    for depth, block in enumerate(reversed(blocks), 1):
        assert {v for key, v in rate.items() if key.startswith(block)} == {0.5**depth}, block
    stem = {v for key, v in rate.items() if key.startswith(inside.stem_name)}
    assert stem == {0.5 ** (len(blocks) + 1)}
    assert groups["neck.weight"]["lr"] == 1.0
    assert groups["neck.weight"]["weight_decay"] == 0.05
    norms = [key for key in groups if ".norms." in key]
    assert norms
    assert {groups[key]["lr"] for key in norms} == {1.0}
    assert {groups[key]["weight_decay"] for key in norms} == {0.0}
    for key in inside.no_weight_decay():
        if f"backbone.pyramid.backbone.{key}" in groups:
            assert groups[f"backbone.pyramid.backbone.{key}"]["weight_decay"] == 0.0


def test_layer_depth_as_mmpretrain_asks_for_it() -> None:
    model = Detector(dict(type="StriateBackbone", name="swin_tiny", feature_norms=True, **SMALL["swin_tiny"]))
    depth = model.backbone.get_layer_depth
    assert depth("backbone.pyramid.backbone.patch_embed.proj.weight", "backbone.") == (0, 7)
    assert depth("backbone.pyramid.backbone.layers.3.blocks.0.norm1.weight", "backbone.") == (5, 7)
    assert depth("backbone.pyramid.norms.0.weight", "backbone.") == (6, 7)
    with pytest.raises(ValueError, match="neck.weight"):
        depth("neck.weight", "backbone.")


@pytest.mark.parametrize(
    ("paramwise", "match"),
    [(dict(), "layer_decay=None"), (dict(layer_decay=0.0), r"\(0, 1\]"), (dict(layer_decay="0.9"), "'0.9'")],
)
def test_wrong_layer_decay(paramwise, match) -> None:
    with pytest.raises(ValueError, match=match):
        layer_rates(Detector(dict(type="StriateBackbone", name="biformer_nano")), **paramwise)


def test_layer_decay_needs_a_backbone_of_ours() -> None:
    class Other(BaseModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

    with pytest.raises(ValueError, match="StriateBackbone"):
        layer_rates(Other(), layer_decay=0.9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(name="biformer_nan"), "biformer_nano"),
        (dict(name="org/name"), "hf-hub:org/name"),
        (dict(name="swin_tiny", out_indices=(0, 4)), "levels 0 to 3"),
        (dict(name="swin_tiny", out_indices=(2, 1)), "finest first"),
        (dict(name="swin_tiny", out_indices=(1, 1)), "finest first"),
        (dict(name="convnext_atto", out_indices=(0, 9)), "convnext_atto has no stages"),
        (dict(name="swin_tiny", frozen_stages=5), "use -1 to 4"),
        (dict(name="swin_tiny", frozen_stages=-2), "use -1 to 4"),
        (dict(name="convnext_atto", frozen_stages=1), "timm"),
        (dict(name="swin_tiny", windows=7), "windows"),
        (dict(name="swin_tiny", pretrained="open-mmlab://resnet50_v1c"), "init_cfg"),
        (dict(name="swin_tiny", init_cfg=dict(type="Normal", std=0.01)), "Pretrained"),
        (dict(name="swin_tiny", init_cfg=dict(type="Pretrained")), "checkpoint"),
        (dict(name="swin_tiny", init_cfg=dict(type="Pretrained", checkpoint="a", revise_keys=[])), "revise_keys"),
    ],
)
def test_wrong_requests(kwargs, match) -> None:
    with pytest.raises(ValueError, match=match):
        MODELS.build(dict(type="StriateBackbone", **kwargs))


@pytest.mark.parametrize("content", ["missing", "other model", "nothing"])
def test_wrong_weights(content, tmp_path) -> None:
    path = tmp_path / "file.pth"
    if content == "other model":
        torch.save(trained("biformer_nano").state_dict(), path)
    elif content == "nothing":
        torch.save({"epoch": 1}, path)
    model = build("swin_tiny", init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    with pytest.raises(ValueError, match=re.escape(Path(path).name)):
        model.init_weights()


def test_time_steps() -> None:
    model = build("metaspikformer_15m", keep_time=True, timesteps=2).eval()
    assert all(m.ndim == 5 and len(m) == 2 for m in model(torch.randn(1, 3, 64, 64)))
    assert np.all(np.diff(model.strides) >= 0)
