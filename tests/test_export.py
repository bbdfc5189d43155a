"""`striate export`: the folder loads again, the report says what was saved, and what cannot be packed is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import striate
from striate.backbones._binary import PackedLinear
from striate.train import cli

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
