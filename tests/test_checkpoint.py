"""Loading the state dicts of authors, of timm and of our own strictly; `test_reading.py` has the files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import striate
from helpers import relative
from striate.backbones import CheckpointError

FIXTURES = Path(__file__).parent / "fixtures"
DEPTHS = (2, 2, 2, 2)
Messages = Callable[[], list[str]]


def official(name: str) -> dict[str, Tensor]:
    """Random weights under the authors' keys, without the blocks after the second of every stage."""
    state = {}
    for key, (shape, dtype, _) in json.loads((FIXTURES / f"{name}.json").read_text())["state"].items():
        block = re.match(r"(?:layers\.\d+\.blocks|stages\.\d+(?:\.blocks)?)\.(\d+)\.", key)
        if block is None or int(block[1]) < 2:
            state[key] = torch.randn(shape).to(getattr(torch, dtype))
    return state


def make(name: str = "swin_tiny", depths: tuple[int, ...] = DEPTHS, **kwargs: Any) -> nn.Module:
    return striate.create_model(name, depths=depths, **kwargs).eval()


@pytest.fixture(scope="module")
def swin() -> dict[str, Tensor]:
    return official("swin_tiny_patch4_window7_224")


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """A state dict of our own."""
    return make("biformer_nano").state_dict()


def assert_refused(model: nn.Module, source: Any, message: str) -> str:
    """Loading raises an error that says `message`, and no weight changes; returns the whole text."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        striate.load_checkpoint(model, source)
    assert isinstance(caught.value, ValueError)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    return str(caught.value)


def test_microsoft_keys(swin) -> None:
    model = make()
    striate.load_checkpoint(model, {"model": swin})
    state = model.state_dict()
    assert torch.equal(state["layers.1.downsample.reduction.weight"], swin["layers.0.downsample.reduction.weight"])
    assert torch.equal(state["head.fc.weight"], swin["head.weight"])
    assert torch.equal(state["layers.3.blocks.1.attn.qkv.bias"], swin["layers.3.blocks.1.attn.qkv.bias"])
    assert not any("index" in key or "mask" in key for key in state)


def test_version_two_recomputes_its_coordinates() -> None:
    model, other = make("swinv2_tiny_window8_256"), make("swinv2_tiny_window8_256")
    state = official("swinv2_tiny_patch4_window8_256")
    striate.load_checkpoint(model, state)
    name = "layers.0.blocks.0.attn.relative_coords_table"
    assert torch.equal(model.get_buffer(name), other.get_buffer(name))


def test_detection_repository(swin, messages: Messages) -> None:
    state = official("swin_tiny_det")
    whole = {f"backbone.{key}": value for key, value in state.items()}
    whole |= {"neck.lateral_convs.0.conv.weight": torch.zeros(3), "rpn_head.rpn_cls.bias": torch.zeros(3)}
    model = make(features_only=True, feature_norms=True)
    striate.load_checkpoint(model, {"state_dict": whole, "meta": {"epoch": 12}})
    assert messages() == ["left out 2 tensors outside backbone.* of the checkpoint"]
    assert torch.equal(model.norms["2"].weight, state["norm2.weight"])
    got = model.state_dict()["backbone.layers.2.downsample.norm.weight"]
    assert torch.equal(got, state["layers.1.downsample.norm.weight"])


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("davit_tiny", "davit_tiny"),
        ("maxvit_tiny", "maxvit_tiny_tf_224"),
    ],
)
def test_keys_of_timm_and_back(name, timms) -> None:
    theirs = timm.create_model(timms, depths=DEPTHS).eval()
    assert type(theirs).__module__.startswith("timm.")
    model = make(name)
    striate.load_checkpoint(model, theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(model(x), theirs(x)) < 1e-5
    theirs.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_biformer_keys(name) -> None:
    state = official(name)
    model = make(name)
    striate.load_checkpoint(model, {"model": state, "model_ema": {}, "epoch": 3})
    got = model.state_dict()
    qkv = {"biformer_stl_nchw": "attn.qkv_linear.weight"}.get(name, "attn.qkv.qkv.weight")
    block = "stages.0.blocks.0." if f"stages.0.blocks.0.{qkv}" in state else "stages.0.0."
    assert torch.equal(got["stages.0.blocks.0.attn.qkv.weight"], state[block + qkv].flatten(1))
    last = block.replace("stages.0.", "stages.3.")
    stage_four = next(v for k, v in state.items() if k.startswith(last) and k.endswith("qkv.weight"))
    assert torch.equal(got["stages.3.blocks.0.attn.qkv.weight"], stage_four.flatten(1))
    assert torch.equal(got["norm.running_var"], state["norm.running_var"])
    assert len(got) == len(state)


def test_stl_models_do_not_take_each_others_arithmetic_for_granted() -> None:
    """The keys of one are those of the other reshaped: they load, since the roles of all tensors are the same."""
    model, other = make("biformer_stl"), make("biformer_stl_nchw")
    state = official("biformer_stl_nchw")
    striate.load_checkpoint(model, state)
    striate.load_checkpoint(other, state)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(model(x), other(x)) > 1e-3


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module", "net", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "backbone.", "_orig_mod."])
def test_wrappers_and_prefixes(wrapper, prefix, small, messages: Messages) -> None:
    model = make("biformer_nano")
    striate.load_checkpoint(model, {wrapper: {prefix + key: value for key, value in small.items()}, "epoch": 7})
    assert all(torch.equal(value, small[key]) for key, value in model.state_dict().items())
    assert messages() == []


def test_averaged_weights_on_request(small) -> None:
    content = {"model": small, "model_ema": {key: value + 1 for key, value in small.items()}}
    model = make("biformer_nano")
    striate.load_checkpoint(model, content)
    assert torch.equal(model.state_dict()["head.fc.bias"], small["head.fc.bias"])
    striate.load_checkpoint(model, content, use_ema=True)
    assert torch.equal(model.state_dict()["head.fc.bias"], small["head.fc.bias"] + 1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("legacy", [True, False])
def test_files(suffix, legacy, small, tmp_path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors" or (suffix == ".bin" and legacy):  # recognised by content too
        safetensors.torch.save_file(small, path)
    else:
        torch.save({"model": small}, path, _use_new_zipfile_serialization=not legacy)
    model = make("biformer_nano")
    striate.load_checkpoint(model, path)
    assert all(torch.equal(value, small[key]) for key, value in model.state_dict().items())
    again = striate.create_model("biformer_nano", depths=DEPTHS, checkpoint_path=str(path))
    assert torch.equal(again.state_dict()["head.fc.weight"], small["head.fc.weight"])


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"model": {}}, {"state_dict": {0: torch.zeros(1)}}])
def test_files_without_weights(content) -> None:
    assert_refused(make("biformer_nano"), content, r"the state dict holds no named tensors; its keys are ?")


def test_another_architecture(swin, small) -> None:
    text = assert_refused(
        make("biformer_nano"), {"model": swin}, r"the state dict does not fit biformer_nano: \d+ missing"
    )
    assert "unexpected (layers.0." in text
    assert "Is it another model or size?" in text
    assert_refused(make("swin_tiny"), small, r"does not fit swin_tiny: \d+ missing .*; \d+ unexpected")


def test_another_size(swin, small, messages: Messages) -> None:
    assert_refused(
        make("swin_tiny", (2, 2, 3, 2)), swin, r"does not fit swin_tiny: 13 missing \(layers\.2\.blocks\.2\."
    )
    assert_refused(make("swin_tiny", (2, 2, 1, 2)), swin, r"13 unexpected \(layers\.2\.blocks\.1\.")
    assert messages() == []
    wider = make("biformer_nano", dims=(64, 64, 128, 256))
    assert_refused(
        wider, small, r"45 of another shape \(stem\.conv1\.conv\.weight is \(16, 3, 3, 3\), the model's \(32, 3, 3, 3\)"
    )


def test_a_missing_and_an_unexpected_key(small) -> None:
    state = dict(small)
    state["stem.extra"] = state.pop("stem.conv1.conv.bias")
    assert_refused(
        make("biformer_nano"),
        state,
        r"1 missing \(stem\.conv1\.conv\.bias\); 1 unexpected \(stem\.extra\)",
    )


def test_counters_of_batch_norms_may_be_missing(small) -> None:
    striate.load_checkpoint(make("biformer_nano"), {k: v for k, v in small.items() if "num_batches" not in k})


@pytest.mark.parametrize("num_classes", [10, 0])
def test_another_number_of_classes(num_classes, swin, messages: Messages) -> None:
    model = make(num_classes=num_classes)
    head = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("head.")}
    striate.load_checkpoint(model, swin)
    said = f"the checkpoint has 1000 classes, the model {num_classes}: its classifier was not loaded"
    assert messages() == [said]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in head.items())
    assert torch.equal(model.norm.weight, swin["norm.weight"])


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_another_number_of_channels(in_chans, swin, messages: Messages) -> None:
    model = make(in_chans=in_chans)
    striate.load_checkpoint(model, swin)
    assert messages() == [f"adapted patch_embed.proj.weight from 3 input channels to {in_chans}"]
    weight, published = model.patch_embed.proj.weight, swin["patch_embed.proj.weight"]
    assert weight.shape[1] == in_chans
    grey = torch.ones(1, 1, 8, 8)
    got = nn.functional.conv2d(grey.expand(-1, in_chans, -1, -1), weight, stride=4)
    want = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), published, stride=4)
    assert relative(got, want) < 1e-4 or in_chans == 4  # four channels repeat the first one


def test_channels_that_cannot_be_adapted(swin) -> None:
    one = make(in_chans=1).state_dict()
    assert_refused(make(in_chans=4), one, r"1 of another shape \(patch_embed\.proj\.weight is \(96, 1, 4, 4\)")


def test_another_window_resizes_the_position_tables(swin, messages: Messages) -> None:
    model = make(window=12, img_size=384)
    striate.load_checkpoint(model, swin)
    said = messages()
    assert len(said) == 8
    assert said[0] == "resized layers.0.blocks.0.attn.relative_position_bias_table from window 7 to 12x12"
    table = model.layers[0].blocks[0].attn.relative_position_bias_table
    assert table.shape == (23 * 23, 3)
    published = swin["layers.0.blocks.0.attn.relative_position_bias_table"]
    assert relative(table[23 * 23 // 2], published[13 * 13 // 2]) < 1e-5  # offset (0, 0)
    assert model(torch.zeros(1, 3, 128, 128)).isfinite().all()


def test_another_image_size_with_the_same_windows_changes_nothing(swin, messages: Messages) -> None:
    striate.load_checkpoint(make(img_size=(224, 448)), swin)
    assert messages() == []


def test_version_two_needs_no_resizing(messages: Messages) -> None:
    striate.load_checkpoint(make("swinv2_tiny_window16_256"), official("swinv2_tiny_patch4_window8_256"))
    assert messages() == []


def test_classification_file_into_a_feature_pyramid(swin, messages: Messages) -> None:
    model = make(features_only=True, feature_norms=True)
    norms = model.norms["0"].weight.clone()
    striate.load_checkpoint(model, swin)
    assert messages() == [
        "a feature pyramid has no place for head, norm of the checkpoint: left out",
        "the checkpoint has no feature norms: those of the pyramid stay as they are",
    ]
    assert torch.equal(model.norms["0"].weight, norms)
    whole = make()
    striate.load_checkpoint(whole, swin)
    for got, want in zip(
        make_plain(swin)(torch.ones(1, 3, 64, 64)),
        whole.forward_intermediates(torch.ones(1, 3, 64, 64), intermediates_only=True)[:3],
        strict=False,
    ):
        assert got.shape == want.shape


def test_a_pyramid_whose_first_level_is_the_stem(messages: Messages) -> None:
    whole = make("maxvit_tiny").state_dict()
    for indices, left in (((0, 2), "stages.2, stages.3"), ((0,), "stages.0, stages.1, stages.2, stages.3")):
        model = make("maxvit_tiny", features_only=True, out_indices=indices)
        striate.load_checkpoint(model, whole)
        assert messages() == [f"a feature pyramid has no place for head, {left} of the checkpoint: left out"]
        assert torch.equal(model.state_dict()["backbone.stem.conv1.weight"], whole["stem.conv1.weight"])


def make_plain(state: dict[str, Tensor]) -> nn.Module:
    model = make(features_only=True)
    striate.load_checkpoint(model, state)
    return model


def test_stages_that_a_pyramid_does_not_have_are_named(swin, messages: Messages) -> None:
    striate.load_checkpoint(make(features_only=True, out_indices=(0, 1)), swin)
    assert messages() == [
        "a feature pyramid has no place for head, layers.2, layers.3, norm of the checkpoint: left out"
    ]


def test_detection_file_into_a_classifier() -> None:
    text = assert_refused(
        make(), official("swin_tiny_det"), r"4 missing \(head\.fc\.bias, head\.fc\.weight, norm\.bias"
    )
    assert "8 unexpected (norms.0.bias" in text
    assert "a detection checkpoint wants features_only=True, feature_norms=True" in text


def test_pyramids_round_trip(messages: Messages) -> None:
    first = make("biformer_nano", features_only=True, feature_norms=True, out_indices=(1, 3))
    second = make("biformer_nano", features_only=True, feature_norms=True, out_indices=(1, 3))
    striate.load_checkpoint(second, first.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert messages() == []


def test_half_precision_files(small) -> None:
    model = make("biformer_nano")
    striate.load_checkpoint(model, {k: v.half() if v.is_floating_point() else v for k, v in small.items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_named_by_a_config(small, tmp_path, monkeypatch) -> None:
    """timm's record of where weights are: a tensor dict, a file, a folder; read without running code."""
    torch.save(small, tmp_path / "model.pth")
    for cfg in ({"state_dict": small}, {"file": str(tmp_path / "model.pth")}, {"file": str(tmp_path)}):
        overlay = {"pretrained": True, "pretrained_cfg_overlay": cfg, "depths": DEPTHS}
        model = striate.create_model("biformer_nano", **overlay)
        assert torch.equal(model.state_dict()["head.fc.weight"], small["head.fc.weight"])
    trace = tmp_path / "it ran"
    torch.save({"a": Payload(trace)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        striate.create_model("biformer_nano", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path)})
    assert not trace.exists()
