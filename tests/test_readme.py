"""README.md keeps its word: its code runs, its commands exist, its tables say what the registry says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import striate
from striate.ops import _backend
from striate.train import cli
from striate.train.datasets import SUBSET

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 10

# What makes a command of the README short enough for a test; everything else in it is run as it is written.
SHORTER = {
    "train --recipe": "--data.eval_split validation --data.batch_size 2 --optim.accumulation 1",
    "train --config biformer/nano_fashion": "--data.name npz --data.root tiny.npz",
    "train --config spikformer/nano_fashion": "--data.name npz --data.root tiny.npz",
    "train --config mst/nano_fashion": "--data.name npz --data.root tiny.npz",
    "train --config bivit": "--data.name npz --data.root tiny.npz",
    "validate runs/masked": "--data.workers 0",
    "validate average": "--data.name npz --data.root tiny.npz --data.workers 0",
    "export swin_tiny": "--size '[40, 40]' --model.options '{depths: [1], num_heads: [1], dim: 8, window: 4}'",
    "profile": "--images 2 --data.workers 0",
    "train --model.name swin_tiny": "--data.image_size 64 --data.batch_size 2",
    "train": "--schedule.epochs 1 --schedule.warmup_epochs 0 --data.workers 0",
    "push": "--dataset org/images",
    "kernels": "--op gated_linear_attention",
    "benchmark vig_h_tiny": "--sizes 64,96",
    "benchmark --ops": "--ops channel_attention",
    "benchmark": "--batch 1 --rounds 1 --no-memory --no-train",
}


class Block(NamedTuple):
    """A fenced block: the line it begins at, its language and its text."""

    line: int
    language: str
    text: str


def fenced_blocks(markdown: str) -> list[Block]:
    blocks, start, lines = [], 0, markdown.split("\n")
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            if start:
                blocks.append(Block(start, lines[start - 1].strip("` "), "\n".join(lines[start : number - 1])))
            start = 0 if start else number
    assert not start, f"the block of line {start} has no end"
    return blocks


def inline_commands(markdown: str) -> list[str]:
    outside = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`((?:make|striate|pip|python|git|cd) [^`]+)`", outside)


def run_command(command: str) -> None:
    """Run or check one shell command; fail for one that this test does not know."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "striate":
        shorter = [extra for start, extra in SHORTER.items() if " ".join(words[1:]).startswith(start)]
        extra = [] if "--help" in words else shlex.split(" ".join(shorter))
        try:
            code = cli.main([*words[1:], *extra])
        except SystemExit as exit_:  # --help
            code = exit_.code  # type: ignore[assignment]
        assert not code, f"{command} ended with {code}"
    elif words[0] == "torchrun":
        short = shlex.split(
            f"{SHORTER['train --config biformer/nano_fashion']} {SHORTER['train']} --data.batch_size 32"
        )
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([*launcher, *words[1:], *short], check=True, capture_output=True, env=environment, timeout=300)
    elif command == "pip install .":
        assert (ROOT / "pyproject.toml").is_file()  # installing is what the packaging test does
    else:
        pytest.fail(f"README.md has a command that this test cannot run: {command}")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README speaks of, as their authors make them, only smaller or untrained."""
    monkeypatch.chdir(tmp_path)
    biformer, swin = striate.create_model("biformer_tiny"), striate.create_model("swin_tiny")
    dense = striate.create_model("swin_tiny", features_only=True, feature_norms=True)
    torch.save({"model": official_biformer(biformer.state_dict())}, "biformer_tiny_in1k.pth")
    torch.save({"model": official_swin(swin.state_dict())}, "swin_tiny_patch4_window7_224.pth")
    detector = {f"backbone.{key}": value for key, value in official_swin(dense.state_dict()).items()}
    detector["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": detector, "meta": {"epoch": 36}}, "mask_rcnn_swin_tiny_patch4_window7.pth")
    for split in ("train", "validation"):
        for number, name in enumerate(("bag", "shoe")):
            Path("images", split, name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (80, 70), (100 * number, 50 * i, 90)).save(f"images/{split}/{name}/{i}.png")
    with np.load(SUBSET) as whole:
        arrays = {key: whole[key][:128] if key.startswith("train") else whole[key][:40] for key in whole}
    np.savez("tiny.npz", **{key: arrays[key] for key in arrays if not key.endswith("indices")})
    return tmp_path


def official_biformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    rules = [
        (r"^stem\.conv1\.conv\.", "downsample_layers.0.0."),
        (r"^stem\.conv1\.norm\.", "downsample_layers.0.1."),
        (r"^stem\.conv2\.conv\.", "downsample_layers.0.3."),
        (r"^stem\.conv2\.norm\.", "downsample_layers.0.4."),
        (r"^stages\.(\d)\.downsample\.conv\.", r"downsample_layers.\1.0."),
        (r"^stages\.(\d)\.downsample\.norm\.", r"downsample_layers.\1.1."),
        (r"^(stages\.\d)\.blocks\.", r"\1."),
        (r"^(stages\.[012]\..*)\.attn\.qkv\.", r"\1.attn.qkv.qkv."),
        (r"^(stages\.[012]\..*)\.attn\.proj\.", r"\1.attn.wo."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.3."),
        (r"^head\.fc\.", "head."),
    ]
    return _renamed(state, rules)


def official_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    state = _renamed(state, [(r"^head\.fc\.", "head."), (r"^norms\.(\d)", r"norm\1")])
    move = re.compile(r"^layers\.(\d)\.downsample")  # the authors' stages end with the downsampling
    state = {move.sub(lambda found: f"layers.{int(found[1]) - 1}.downsample", key): v for key, v in state.items()}
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    return state | {key.replace("bias_table", "index"): torch.zeros(49, 49, dtype=torch.int64) for key in tables}


def _renamed(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def test_every_block_runs(workshop: Path, hub: Any, messages: Any) -> None:
    blocks = fenced_blocks(README)
    assert len(blocks) >= 8
    made: dict[str, Any] = {}
    for block in blocks:
        assert len(block.text.split("\n")) <= MAX_LINES, f"line {block.line}: more than {MAX_LINES} lines"
        if block.language == "sh":
            for command in filter(None, block.text.replace("\\\n", " ").split("\n")):
                run_command(command)
        elif block.language == "python":
            names = {"__name__": "__main__"}
            exec(compile("\n" * block.line + block.text, "README.md", "exec"), names)
            made |= names
        else:
            pytest.fail(f"line {block.line}: this test cannot run a block in {block.language!r}")
    assert made["logits"].isfinite().all()
    assert made["again"].get_classifier().out_features == 10
    assert (made["folder"] / "config.json").is_file()
    assert Path("runs/own/summary.json").is_file()
    assert any("neck" in said or "left out 1 tensors" in said for said in messages())  # nothing else of it was


def test_the_checkpoints_are_really_loaded(workshop: Path) -> None:
    (block,) = [b for b in fenced_blocks(README) if "checkpoint_path" in b.text]
    first, second, third = re.findall(r"^model = .*?\)$", block.text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"striate": striate}
    exec(first, names)
    file = torch.load("biformer_tiny_in1k.pth")["model"]
    assert torch.equal(names["model"].head.fc.weight, file["head.weight"])
    assert torch.equal(names["model"].stages[1].blocks[0].attn.qkv.weight, file["stages.1.0.attn.qkv.qkv.weight"])
    exec(second, names)
    file = torch.load("swin_tiny_patch4_window7_224.pth")["model"]
    assert torch.equal(names["model"].layers[1].downsample.norm.weight, file["layers.0.downsample.norm.weight"])
    exec(third, names)
    file = torch.load("mask_rcnn_swin_tiny_patch4_window7.pth")["state_dict"]
    assert torch.equal(names["model"].norms["2"].weight, file["backbone.norm2.weight"])


def test_commands_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = inline_commands(README)
    assert {"make demo", "make test"} < set(commands)
    for command in commands:
        run_command(command)


@pytest.mark.parametrize("command", ["rm -rf /tmp/x", "make coffee", "striate fly", "pip install striate"])
def test_unknown_commands_fail(command: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_command(command)


def test_the_two_commands_come_first() -> None:
    assert fenced_blocks(README)[0].text == "make demo\nmake test"


def table(heading: str) -> list[list[str]]:
    """The cells of the table whose first column is called `heading`."""
    lines = README.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_table_of_models() -> None:
    rows = table("model")
    assert [row[0].strip("`") for row in rows] == striate.list_models()
    for name, params, gmacs, size, top1 in rows:
        info = striate.model_info(name.strip("`"))
        assert (float(params), float(gmacs)) == (info.params, info.gmacs)
        assert int(size) == info.input_size[1] == info.input_size[2]
        value, _, pretraining = top1.partition(" ")
        assert (None if value == "–" else float(value)) == info.top1
        assert pretraining == (f"({info.pretraining})" if info.pretraining else "")


def test_the_table_of_licences() -> None:
    rows = table("family")
    families = {info.family.title: info.family for info in map(striate.model_info, striate.list_models())}
    assert [row[0] for row in rows] == sorted(families)
    for title, source, licence in rows:
        family = families[title]
        assert re.findall(r"\((.*?)\)", source) == [family.source, family.paper]
        assert licence == family.licence


def test_what_is_said_about_settings() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'requires-python = ">=(.*?)"', pyproject)
    assert f"Python {version} or newer" in README
    (paths,) = re.findall(r"`STRIATE_BACKEND` forces one: (.*?)\.\n", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", paths)) == {*_backend.PATHS, _backend.TORCH}
