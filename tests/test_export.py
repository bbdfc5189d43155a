"""`striate export`: what was written answers as the model does, the report says what it is, and refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import striate
from helpers import relative
from striate.backbones._binary import PackedLinear
from striate.train import cli
from striate.train import export as exporting

TINY = "{depths: [1, 1]}"


def export(*argv: str) -> int:
    return cli.main(["export", "bivit_nano", "--model.options", TINY, "--model.num_classes", "10", *argv])


def test_packed_folder_loads_and_the_report_gives_its_sizes(tmp_path, capsys) -> None:
    folder = tmp_path / "packed"
    assert export("--packed", "--output", str(folder)) == 0
    model = striate.create_model(f"local-dir:{folder}")
    assert isinstance(model.layers[0].blocks[0].attn.qkv, PackedLinear)
    lines = capsys.readouterr().out.splitlines()
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert lines[1].split()[3] == f"{total / 1e6:.2f}"
    assert lines[2].startswith("binary layers")
    assert "M binary (BOPs)" in lines[4]
    size = (folder / "model.safetensors").stat().st_size
    assert lines[-1] == f"written: local-dir:{folder}, {size / 1e6:.2f} MB"
    assert total < size < 1.1 * total + 20_000


def test_without_packed_the_weights_stay(tmp_path, capsys) -> None:
    folder = tmp_path / "plain"
    assert export("--output", str(folder)) == 0
    assert "binary layers" not in capsys.readouterr().out
    model = striate.create_model(f"local-dir:{folder}")
    assert model.layers[0].blocks[0].attn.qkv.weight.dtype == torch.float32


def test_a_model_without_binary_layers_is_refused_and_nothing_is_written(tmp_path, capsys) -> None:
    folder: Path = tmp_path / "none"
    assert cli.main(["export", "swin_tiny", "--model.options", "{depths: [1]" + ", num_heads: [3]}",
                     "--packed", "--output", str(folder)]) == cli.EXIT_USAGE  # fmt: skip
    assert "swin_tiny has no binary layers to pack; leave out --packed" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("argv", [["export", "bivit_nano"], ["export", "no_such_model", "--output", "x"]])
def test_wrong_requests(argv, capsys) -> None:
    assert cli.main(argv) == cli.EXIT_USAGE
    assert "striate export: error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A Swin Transformer of one block, whose map at its own 16 pixels is one window."""
    model = striate.create_model("swin_tiny", depths=[1], num_heads=[1], dim=8, window=4, img_size=16, num_classes=4)
    return striate.push(model, f"local-dir:{tmp_path_factory.mktemp('hub') / 'small'}")


def test_a_pt2_program_for_a_range_of_sizes(saved, tmp_path, capsys) -> None:
    words = ["export", saved, "--format", "pt2", "--size", "[40, 48]", "--output", str(tmp_path / "out"), "--json"]
    assert cli.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["free"] == {"batch": [1, None], "height": [17, None], "width": [17, None]}
    assert said["fixed"] == {}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]
    assert said["bytes"] == (tmp_path / "out" / "model.pt2").stat().st_size
    files = {"config.json": ""}
    program = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=files).module()
    assert json.loads(files["config.json"])["architecture"] == "swin_tiny"
    model = striate.create_model(saved).eval()
    with torch.no_grad():
        for shape in ((1, 3, 17, 64), (5, 3, 33, 50)):
            x = torch.randn(shape)
            assert relative(program(x), model(x)) < 1e-5


def test_an_onnx_program_for_a_range_of_sizes(saved, tmp_path, capsys) -> None:
    """A width of 10 is rounded up to whole windows: ONNX divides negative integers otherwise than Python."""
    import onnxruntime

    assert cli.main(["export", saved, "--format", "onnx", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["batch   1 or more", "height  5 to 16", "width   5 to 16"]
    assert said[3].startswith(f"written: {tmp_path / 'out' / 'model.onnx'}")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    config = json.loads(session.get_modelmeta().custom_metadata_map["striate.config"])
    assert (config["architecture"], config["num_classes"]) == ("swin_tiny", 4)
    (entry,) = session.get_inputs()
    model = striate.create_model(saved).eval()
    with torch.no_grad():
        for shape in ((2, 3, 16, 16), (1, 3, 5, 10)):
            x = torch.randn(shape)
            (got,) = session.run(None, {entry.name: x.numpy()})
            assert relative(torch.from_numpy(got), model(x)) < 1e-4


class Sided(nn.Module):
    """Refuses another height than 8, and another batch than 1, if it is told to."""

    num_classes = 2

    def __init__(self, fixed_height: bool, fixed_batch: bool) -> None:
        super().__init__()
        self.fixed_height, self.fixed_batch = fixed_height, fixed_batch
        self.scale = nn.Parameter(torch.ones(2))
        self.pretrained_cfg = {"input_size": (3, 8, 6)}

    def forward(self, x: Tensor) -> Tensor:
        if (self.fixed_height and x.shape[2] != 8) or (self.fixed_batch and x.shape[0] != 1):
            raise ValueError("no such images")
        return x.mean((2, 3))[:, :2] * self.scale


@pytest.fixture
def undescribed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that no name stands for."""
    monkeypatch.setattr(exporting, "describe", lambda model: {})


@pytest.mark.usefixtures("undescribed")
@pytest.mark.parametrize(("fixed_batch", "free"), [(False, {"batch"}), (True, set())])
def test_a_size_that_the_model_wants_is_fixed(tmp_path, fixed_batch: bool, free: set[str]) -> None:
    program, difference = exporting.export_program(Sided(True, fixed_batch), (8, 6), "pt2", tmp_path / "model.pt2")
    assert set(program.free) == free
    assert set(program.fixed) == {"batch", "height", "width"} - free
    reason = "no such images" if fixed_batch else "Constraints violated (L['x'].size()[2])"
    assert program.fixed["height"].startswith(reason)
    assert difference < 1e-6
    assert (tmp_path / "model.pt2").is_file()


@pytest.mark.usefixtures("undescribed")
def test_a_program_that_answers_otherwise_is_not_put_in_place(tmp_path, monkeypatch) -> None:
    """Only with the sizes fixed is it right: that one is kept, and the reason is told."""
    model = Sided(False, False)
    calls: list[int] = []

    def wrong_where_free(program, file, config):
        answer = exporting.write_pt2(program, file, config)
        calls.append(len(program.free))
        factor = 1.001 if "height" in program.free or always else 1.0
        return lambda images: [out * factor for out in answer(images)]

    monkeypatch.setitem(exporting.WRITERS, "pt2", wrong_where_free)
    always = False
    program, _ = exporting.export_program(model, (8, 6), "pt2", tmp_path / "model.pt2")
    assert set(program.free) == {"batch"}
    assert program.fixed["height"].startswith("the exported program answers differently, by 1.0e-03")
    always = True
    with pytest.raises(ValueError, match="cannot be exported as pt2: the exported program answers differently"):
        exporting.export_program(model, (8, 6), "pt2", tmp_path / "other.pt2")
    assert calls == [3, 1, 3, 1, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(("words", "message"), [
    (["--format", "tflite"], "--format tflite is not known; give folder, pt2 or onnx"),
    (["--format", "pt2", "--packed"], "--packed does not go with --format pt2"),
    (["--size", "[32, 32]"], "--size is for --format pt2 and onnx"),
    (["--format", "pt2", "--size", "[0, 32]"], "--size [0, 32] must be"),
])  # fmt: skip
def test_formats_and_sizes_that_do_not_go_together(tmp_path, words, message, capsys) -> None:
    assert export("--output", str(tmp_path / "out"), *words) == cli.EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_its_packages_onnx_says_what_to_install(tmp_path, monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a))
    assert export("--output", str(tmp_path), "--format", "onnx") == cli.EXIT_USAGE
    assert "--format onnx needs onnxscript: pip install striate[export]" in capsys.readouterr().err
