"""Official files: told by their keys and shapes, and written with ours."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import striate
from striate.backbones import CheckpointError, _recognise
from striate.hub import convert, recognise
from test_parity import NAMES, read
from test_reading import Call

Files = dict[str, Tensor]
# Models that share keys and shapes, by those of the recorded ones that have twins.
TWINS = {
    "biformer_stl": {"biformer_stl", "biformer_stl_nchw"},
    "biformer_stl_nchw": {"biformer_stl", "biformer_stl_nchw"},
    "spikformer_8_384": {"spikformer_8_384", "spike_driven_transformer_8_384"},
    "spike_driven_transformer_2_512_cifar": {"spike_driven_transformer_2_512_cifar", "statten_2_512_cifar"},
    "statten_2_512_cifar": {"spike_driven_transformer_2_512_cifar", "statten_2_512_cifar"},
}


def official(name: str) -> Files:
    """Ones under the authors' keys, as they save them."""
    record, _ = read(name)
    return {key: torch.ones(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype, _) in record["state"].items()}


def kept(state: Files) -> Files:
    """Without tables that follow from the configuration, which training code may drop."""
    return {key: value for key, value in state.items() if not re.search("index$|mask$|coords_table$", key)}


SWIN, SMALL = "swin_tiny_patch4_window7_224", "pvt_v2_b0_ecoformer"


@pytest.fixture(scope="module")
def swin() -> Files:
    return official(SWIN)


@pytest.fixture(scope="module")
def small() -> Files:
    """Of `ecoformer_pvt_v2_b0`."""
    return {key: torch.randn_like(v) if v.is_floating_point() else v for key, v in official(SMALL).items()}


@pytest.fixture
def file(small: Files, tmp_path: Path) -> Path:
    path = tmp_path / "b0.pth"
    torch.save({"model": small, "epoch": 299, "args": argparse.Namespace(lr=1e-3)}, path)
    return path


def run(*words: Any) -> int:
    return convert.main([str(word) for word in words])


def report(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_files_are_recognised(name, messages) -> None:
    record, _ = read(name)
    state = official(name)
    found = recognise(state)
    assert set(found) == TWINS.get(record["model"], {record["model"]})
    assert len(found) == len(set(found))
    wrapped = {"state_dict": {f"module.backbone.{key}": value for key, value in state.items()}, "meta": {}}
    wrapped["state_dict"]["module.neck.conv.weight"] = torch.ones(9)
    assert recognise(wrapped) == found
    assert messages() == []


@pytest.mark.parametrize("name", sorted({read(name)[0]["model"] for name in NAMES}))
def test_files_of_our_own_are_recognised(name) -> None:
    state = {key: torch.ones(value.shape) for key, value in _recognise._on_meta(name).state_dict().items()}
    found = recognise(state)
    assert name in found
    assert set(found) <= {name} | TWINS.get(name, set()) | {name.replace("window8", "window16")}


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        (SWIN, {"head.weight": (21841, 768), "head.bias": (21841,)}, dict(num_classes=21841)),
        (SWIN, {"head.weight": (10, 768), "head.bias": (10,)}, dict(num_classes=10)),
        (SWIN, {"head.weight": None, "head.bias": None}, dict(num_classes=0)),
        (SWIN, {"patch_embed.proj.weight": (96, 1, 4, 4)}, dict(num_classes=1000, in_chans=1)),
        ("swin_tiny_det", {}, dict(features_only=True, feature_norms=True, out_indices=(0, 1, 2, 3))),
        (
            "swin_tiny_det",
            {f"norm0.{leaf}": None for leaf in ("weight", "bias")},
            dict(features_only=True, feature_norms=True, out_indices=(1, 2, 3)),
        ),
        ("crossformer_small_det", {}, dict(features_only=True)),
        (
            "metaspikformer_15M_t4_96",
            {"head_kd.weight": (1000, 360), "head_kd.bias": (1000,)},
            dict(num_classes=1000, distilled=True),
        ),
    ],
)
def test_arguments_are_told_by_the_tensors(name, change, wanted) -> None:
    state = official(name)
    for key, shape in change.items():
        if shape is None:
            del state[key]
        else:
            state[key] = torch.ones(shape)
    (fit,) = _recognise.find_fits(state)
    assert (fit.name, fit.args, fit.changes) == (read(name)[0]["model"], wanted, ())


def test_tables_tell_the_window() -> None:
    """Version two has no weights of a window, but the authors save its coordinates."""
    state = official("swinv2_tiny_patch4_window8_256")
    assert recognise(state) == ["swinv2_tiny_window8_256"]
    assert set(recognise(kept(state))) == {"swinv2_tiny_window8_256", "swinv2_tiny_window16_256"}


def test_tables_that_would_be_resized_count_where_nothing_else_fits() -> None:
    """One of two sizes for a recorded pair, and a window that no registered model has."""
    for name in ("swin_base", "swin_base_window12_384"):
        state = {key: torch.ones(value.shape) for key, value in _recognise._on_meta(name).state_dict().items()}
        assert recognise(state) == [name]
    state = kept(official(SWIN))
    state |= {k: torch.ones(23 * 23, v.shape[1]) for k, v in state.items() if k.endswith("bias_table")}
    (fit,) = [fit for fit in _recognise.find_fits(state) if fit.name == "swin_tiny"]
    assert len(fit.changes) == 12
    assert fit.changes[0] == "resized layers.0.blocks.0.attn.relative_position_bias_table from window 12 to 7x7"


def test_what_fits_nothing(small: Files) -> None:
    state = {key: value for key, value in small.items() if not key.startswith("block3.1.")}
    assert recognise(state) == []
    first, second = _recognise.find_closest(state)
    assert re.match(r"it does not fit ecoformer_pvt_v2_b0: \d+ missing \(stages\.2\.blocks\.1\.", first)
    assert re.match(r"it does not fit (?!ecoformer_pvt_v2_b0)", second)
    assert recognise({"a.weight": torch.ones(3, 4)}) == []
    with pytest.raises(ValueError, match="holds no named tensors"):
        recognise({"epoch": 3})


def test_building_models_to_compare_with_draws_no_random_numbers(swin: Files) -> None:
    _recognise._on_meta.cache_clear()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    recognise(swin)
    assert torch.equal(torch.rand(4), wanted)


def test_loading_says_whose_the_file_is(swin: Files) -> None:
    model = striate.create_model("biformer_nano")
    with pytest.raises(CheckpointError, match=r"Is it another model.*\. It has the keys and shapes of swin_tiny$"):
        striate.load_checkpoint(model, {"model": swin})
    with pytest.raises(CheckpointError, match=r"shapes of swin_tiny \(features_only=True, feature_norms=True\)$"):
        striate.load_checkpoint(model, official("swin_tiny_det"))
    with pytest.raises(CheckpointError, match=r"wants features_only=True, feature_norms=True\)$"):  # nobody's
        striate.load_checkpoint(model, {"a": torch.ones(2)})


def test_the_report(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file) == 0
    said = capsys.readouterr().out
    for line in (
        "model     ecoformer_pvt_v2_b0 (EcoFormer)",
        "classifier of 1000 classes",
        "input     3 x 224 x 224",
        "(Apache-2.0)",
        "no averaged weights",
        "left out  epoch, args",
        hashlib.sha256(file.read_bytes()).hexdigest(),
    ):
        assert line in said  # fmt: skip
    assert os.listdir(file.parent) == [file.name]
    record = report(capsys, file)
    assert [model["name"] for model in record["models"]] == ["ecoformer_pvt_v2_b0"]
    assert record["tensors"] == 174
    assert record["output"] is None


@pytest.mark.parametrize("nested", [False, True])
def test_averaged_weights(nested, small: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averaged = {key: value + 1 for key, value in small.items()}
    content: dict[str, Any] = {"state_dict": small, "state_dict_ema": averaged}
    path, output = tmp_path / "w.pth", tmp_path / "w.safetensors"
    torch.save({"model": content} if nested else content, path)
    record = report(capsys, path, "--to", output)
    assert (record["ema"], record["weights"]) == (True, "model")
    assert torch.equal(safetensors.torch.load_file(output)["norm.bias"], small["norm4.bias"])
    record = report(capsys, path, "--to", output, "--ema")
    assert (record["ema"], record["weights"]) == (True, "ema")
    assert torch.equal(safetensors.torch.load_file(output)["norm.bias"], averaged["norm4.bias"])


def test_a_file_with_our_keys(file: Path, small: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "converted.safetensors"
    assert report(capsys, file, "--to", output)["output"] == str(output)
    wanted = striate.create_model("ecoformer_pvt_v2_b0", checkpoint_path=file).state_dict()
    found = safetensors.torch.load_file(output)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    with safetensors.safe_open(output, "pt") as opened:
        assert opened.metadata() == {
            "format": "pt",
            "architecture": "ecoformer_pvt_v2_b0",
            "model_args": '{"num_classes": 1000}',
            "num_classes": "1000",
            "source": striate.model_info("ecoformer_pvt_v2_b0").family.source,
            "licence": "Apache-2.0",
            "converted_from": "b0.pth",
            "converted_from_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    assert sorted(os.listdir(tmp_path)) == ["b0.pth", "converted.safetensors"]
    assert output.stat().st_mode & 0o777 == 0o666 & ~_umask()
    again = tmp_path / "again.safetensors"
    assert report(capsys, output, "--to", again)["models"][0]["name"] == "ecoformer_pvt_v2_b0"
    assert all(torch.equal(value, found[key]) for key, value in safetensors.torch.load_file(again).items())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_of_the_hub_format(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = report(capsys, file, "--to", tmp_path / "folder")["output"]
    assert address == f"local-dir:{tmp_path}/folder"
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        got = striate.create_model(address).eval()(x)
        assert torch.equal(got, striate.create_model("ecoformer_pvt_v2_b0", checkpoint_path=file).eval()(x))
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "Converted from b0.pth (sha256 " in card
    report(capsys, file, "--to", tmp_path / "folder")  # replaces it


def test_a_detector_becomes_a_pyramid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs: dict[str, Any] = dict(features_only=True, feature_norms=True, out_indices=(1, 2, 3))
    state = striate.create_model("biformer_nano", **kwargs).state_dict()
    theirs = {key if key.startswith("backbone.") else f"backbone.extra_{key}": value for key, value in state.items()}
    path, output = tmp_path / "mask_rcnn.pth", tmp_path / "pyramid.safetensors"
    torch.save({"state_dict": {**theirs, "rpn_head.bias": torch.ones(3)}, "meta": {}}, path)
    record = report(capsys, path, "--to", output)
    assert record["outside"] == "1 tensors outside backbone.*"
    assert run(path) == 0
    assert "features for dense prediction, with norms" in capsys.readouterr().out
    address = report(capsys, path, "--to", tmp_path / "folder")["output"]
    for again in (
        striate.create_model("biformer_nano", **record["models"][0]["args"], checkpoint_path=output),
        striate.create_model(address),
    ):
        assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": official("statten_cifar10_2_512")}, path)
    return path


def test_of_several_models_one_must_be_named(twins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = twins.with_name("w.safetensors")
    record = report(capsys, twins)
    assert {model["name"] for model in record["models"]} == TWINS["statten_2_512_cifar"]
    assert run(twins) == 0
    assert "one of 2 models with these keys and shapes; --model NAME says which" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"keys and shapes of .*statten_2_512_cifar.*: say which with --model NAME"):
        run(twins, "--to", output)
    assert not output.exists()
    assert report(capsys, twins, "--to", output, "--model", "statten_2_512_cifar")["models"][0]["name"].startswith("st")
    with safetensors.safe_open(output, "pt") as opened:
        assert opened.metadata()["architecture"] == "statten_2_512_cifar"
        assert opened.metadata()["num_classes"] == "10"


def test_changes_must_be_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official("vig_tiny") | {"pos_embed": torch.ones(1, 400, 192)}
    path, output = tmp_path / "vig_320.pth", tmp_path / "w.safetensors"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"fits vig_tiny only after changes: resized pos_embed .* --model vig_t"):
        run(path, "--to", output)
    assert not output.exists()
    record = report(capsys, path, "--to", output, "--model", "vig_tiny")
    assert record["models"][0]["changes"] == ["resized pos_embed from a grid of 20x20 to 14x14"]
    assert safetensors.torch.load_file(output)["pos_embed"].shape == (1, 196, 192)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    path, output = tmp_path / "w.pth", tmp_path / "w.safetensors"
    state = official(SMALL)
    state["norm4.bias"][3] = float("nan")
    torch.save(state, path)
    for target in (output, tmp_path / "folder"):
        with pytest.raises(ValueError, match=r"1 tensors are not there or hold NaN \(norm\.bias\)"):
            run(path, "--to", target)
    assert os.listdir(tmp_path) == ["w.pth"]


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path, monkeypatch) -> None:
    """Loading may leave some as they were drawn, which is nothing to publish."""
    path = tmp_path / "w.pth"
    torch.save(official(SMALL), path)
    load = convert.load_checkpoint

    def partly(model: nn.Module, content: Any, **options: Any) -> None:
        kept_as_drawn = model.head.fc.bias.clone()  # type: ignore[union-attr, operator]
        load(model, content, **options)  # type: ignore[arg-type]
        model.head.fc.bias.data.copy_(kept_as_drawn)  # type: ignore[union-attr, operator]

    monkeypatch.setattr(convert, "load_checkpoint", partly)
    with pytest.raises(ValueError, match=r"not there or hold NaN \(head\.fc\.bias\)"):
        run(path, "--to", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "swin_tinny"], "no model 'swin_tinny'; did you mean swin_tiny"),
        (["--model", "davit_tiny"], r"is no davit_tiny: it does not fit .*; it has the keys and shapes of eco"),
        (["--ema"], "has no averaged weights; leave out --ema"),
        (["--to", "{}/weights.pth"], r"weights\.pth must end in \.safetensors, or name a folder"),
        (["--to", "{}/nowhere/w.safetensors"], "cannot be written; give a file in a folder that exists"),
        (["--to", "{}"], "holds other files and no config.json"),
    ],
)
def test_wrong_requests(words, message, file: Path) -> None:
    before = sorted(os.listdir(file.parent))
    with pytest.raises(ValueError, match=message):
        run(file, *[word.format(file.parent) for word in words])
    assert sorted(os.listdir(file.parent)) == before


def test_the_file_itself_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(official("biformer_tiny"), path)
    (tmp_path / "link.safetensors").symlink_to(path)
    for name in ("w.safetensors", "link.safetensors"):
        with pytest.raises(ValueError, match="is the file to convert"):
            run(path, "--to", tmp_path / name)


def test_a_file_that_fits_nothing(tmp_path: Path, small: Files) -> None:
    path = tmp_path / "other.pth"
    torch.save({k: v for k, v in small.items() if not k.startswith("block3.1.")}, path)
    with pytest.raises(CheckpointError, match=r"no registered model\. The closest: \(1\) .*ecoformer_pvt_v2_b0.*\(2\)"):
        run(path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"fits no registered model"):
        run(path)


def test_a_failed_write_leaves_what_was_there(file: Path, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "w.safetensors"
    output.write_bytes(b"before")
    save = safetensors.torch.save_file

    def half(state: Files, path: Path, metadata: dict[str, str]) -> None:
        save(state, path, metadata)
        with open(path, "r+b") as opened:
            opened.seek(-4, os.SEEK_END)
            opened.write(b"\1\2\3\4")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="comes back differently from the disk"):
        run(file, "--to", output)
    assert output.read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["b0.pth", "w.safetensors"]


def test_classes_of_training_frameworks(small: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output, trace = tmp_path / "epoch_12.pth", tmp_path / "w.safetensors", tmp_path / "ran"
    torch.save({"state_dict": small, "message_hub": Call(exec, f"import os; os.mkdir({str(trace)!r})")}, path)
    with pytest.raises(CheckpointError, match=r"builtins\.exec.*striate convert FILE --inert"):
        run(path, "--to", output)
    report(capsys, path, "--to", output, "--inert")
    assert torch.equal(safetensors.torch.load_file(output)["norm.bias"], small["norm4.bias"])
    assert not trace.exists()
