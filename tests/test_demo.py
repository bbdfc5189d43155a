"""The demo from training to picture, and the picture itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import striate
from striate.backbones.biformer import BiLevelRoutingAttention
from striate.ops import route_regions
from striate.train import demo, visualize
from striate.train.datasets import SUBSET
from striate.train.visualize import RoutingRow, StageRoutes, draw_routing, routed_stages


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 8 training and 5 test images of every class of the embedded set."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    with np.load(SUBSET) as whole:
        arrays = {"classes": whole["classes"]}
        for split, count in (("train", 8), ("test", 5)):
            labels = whole[f"{split}_labels"]
            chosen = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)])
            arrays |= {f"{split}_{part}": whole[f"{split}_{part}"][chosen] for part in ("images", "labels")}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def finished(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A demo folder of one short epoch, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("work") / "demo"
    argv = ["--output", str(folder), "--epochs", "1", "--data.name", "npz", "--data.root", str(tiny_set)]
    argv += ["--schedule.warmup_epochs", "0", "--data.batch_size", "16"]
    assert demo.main(argv) == 0
    return folder, argv


def test_every_step_leaves_its_result(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    summary = json.loads((folder / "run" / "summary.json").read_text())
    hub = folder / "hub" / "biformer_nano"
    files = ["README.md", "config.json", "metrics.json", "model.safetensors", "recipe.txt"]
    assert sorted(p.name for p in hub.iterdir()) == files
    card = (hub / "README.md").read_text()
    assert f"{summary['best']['top1']:.6g}" in card
    assert "80 photos" in card
    assert "--config biformer/nano_fashion" in card
    config = json.loads((hub / "config.json").read_text())
    assert config["label_names"][9] == "Ankle boot"
    model = striate.create_model(f"local-dir:{hub}")
    assert model.pretrained_cfg["input_size"][0] == 1
    with Image.open(folder / "routing.png") as picture:
        routed = sum(isinstance(m, BiLevelRoutingAttention) for m in model.modules())
        assert routed
        assert picture.width > 600
        assert picture.height > 6 * visualize._PANEL
    assert not list(folder.rglob("*.tmp"))


def test_a_second_run_repeats_the_checks_only(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = finished
    log = (folder / "run" / "log.jsonl").read_bytes()
    (folder / "routing.png").unlink()
    (folder / "hub" / "biformer_nano" / "model.safetensors").write_bytes(b"damaged")
    assert demo.main(argv) == 0
    assert (folder / "run" / "log.jsonl").read_bytes() == log
    said = capsys.readouterr().out
    correct = json.loads((folder / "run" / "summary.json").read_text())["best"]["correct"]
    assert f"{correct} of 50 held-out images right" in said
    assert f"{correct} of 50 right: the same to the last image" in said
    assert said.count("%\n") >= demo.NUM_CLASSIFIED
    assert (folder / "routing.png").is_file()
    for line in ("run: the training", "biformer_nano: the published model", "routing.png: where"):
        assert f"{folder}" in said
        assert line in said


def test_a_folder_of_another_run_is_not_touched(finished: tuple[Path, list[str]]) -> None:
    folder, argv = finished
    with pytest.raises(ValueError, match=r"give another --output"):
        demo.main([*argv, "--optim.lr", "0.5"])
    assert (folder / "run" / "summary.json").is_file()


def test_a_model_that_answers_differently_is_noticed(
    finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, argv = finished
    push = demo.push

    def push_another(model: torch.nn.Module, *args: object, **kwargs: object) -> str:
        with torch.no_grad():
            model.head.fc.weight.mul_(-1)  # type: ignore[union-attr, operator]
        return push(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "_run_command", lambda words: 0)  # it is finished
    monkeypatch.setattr(demo, "push", push_another)
    with pytest.raises(ValueError, match="has .* right"):
        demo.main(argv)


def test_the_whole_recipe_must_reach_its_accuracy(
    finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    monkeypatch.setattr(demo, "_run_command", lambda words: 0)  # as if the run in the folder were the whole recipe's
    with pytest.raises(ValueError, match="below the 82"):
        demo.main(["--output", str(folder)])


@pytest.mark.parametrize("code", [1, 75, 130])
def test_a_stopped_training_ends_the_demo(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_run_command", lambda words: code)
    assert demo.main(["--output", str(tmp_path)]) == code
    assert not list(tmp_path.iterdir())


def test_extreme_points() -> None:
    pixels = np.full((28, 28), 100, np.uint8)
    pixels[:7, 21:] = 200
    pixels[14:21, :7] = 0
    assert demo.extreme_points(Image.fromarray(pixels)) == ((0.125, 0.875), (0.625, 0.125))


@pytest.mark.parametrize(("size", "regions"), [((64, 64), 4), ((72, 100), (2, 4))])
def test_the_routes_are_those_of_the_model(size: tuple[int, int], regions: int | tuple[int, int]) -> None:
    model = striate.create_model("biformer_nano", num_regions=regions, topks=(1, 2, 4, 0)).train()
    images = torch.randn(2, 3, *size)
    stages = routed_stages(model, images)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [stage.stage for stage in stages] == [1, 2, 3]
    assert [stage.routes.shape[-1] for stage in stages] == [1, 2, 4]
    model.eval()
    x = model.embed(images)  # type: ignore[operator]
    for number, stage in enumerate(stages):
        blocks = model.stages[number].blocks  # type: ignore[index, union-attr]
        x = model.stages[number].downsample(x)  # type: ignore[index, union-attr]
        for block in blocks[:-1]:
            x = block(x)
        block, stride = blocks[-1], 4 * 2**number
        inside = x + block.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        qkv, region = block.attn.project(block.norm1(inside))
        wanted = route_regions(qkv, region=region, topk=stage.routes.shape[-1], scale=block.attn.scale)
        assert torch.equal(stage.routes, wanted)
        assert stage.region == (region[0] * stride, region[1] * stride)
        assert stage.grid[0] * stage.grid[1] == wanted.shape[1]
        assert stage.region[0] * stage.grid[0] >= size[0]
        x = block(x)


def test_only_routing_models_have_routes() -> None:
    with pytest.raises(ValueError, match="no routing attention"):
        routed_stages(torch.nn.Linear(2, 2), torch.randn(1, 2))


def test_regions_and_points() -> None:
    stage = StageRoutes(1, torch.zeros(1, 8, 1, dtype=torch.int64), (2, 4), (48, 32))
    assert stage.box(0, (72, 100)) == (0, 0, 0.32, 48 / 72)
    assert stage.box(7, (72, 100)) == (0.96, 48 / 72, 1, 1)  # cut off where the padding begins
    assert [stage.region_at(y, x, (72, 100)) for y, x in ((0.1, 0.1), (0.9, 0.5), (0.999, 0.999))] == [0, 5, 7]


def test_the_picture_marks_query_and_routed_regions() -> None:
    routes = torch.zeros(2, 16, 2, dtype=torch.int64)
    routes[1, 5] = torch.tensor([2, 15])
    routes[1, 0] = torch.tensor([0, 15])
    stages = [StageRoutes(1, routes, (4, 4), (16, 16))]
    photo = Image.new("L", (28, 28), 200)
    rows = [RoutingRow(photo, "a\nb", 1, (0.3, 0.3)), RoutingRow(photo, "c", 1, (0.1, 0.1))]
    picture = draw_routing(rows, stages, (64, 64))
    panel, cell = visualize._PANEL, visualize._PANEL // 4
    left = visualize._MARGIN + visualize._LABELS + panel + visualize._GAP
    top = picture.height - visualize._MARGIN - 2 * panel - visualize._GAP

    def pixel(row: int, region: int, offset: int) -> tuple[int, int, int]:
        y = top + row * (panel + visualize._GAP) + region // 4 * cell + offset
        return picture.getpixel((left + region % 4 * cell + offset, y))  # type: ignore[return-value]

    plain, faded = (200, 200, 200), pixel(0, 8, cell // 2)
    assert faded not in (plain, (255, 255, 255))
    for region in range(16):
        expected = plain if region in (2, 15) else faded
        edge = {5: visualize._QUERY, 2: visualize._ROUTED, 15: visualize._ROUTED}.get(region, faded)
        assert pixel(0, region, cell // 2) == expected
        assert pixel(0, region, 0) == edge
    assert (pixel(1, 0, 0), pixel(1, 0, 5)) == (visualize._QUERY, visualize._ROUTED)  # routed to itself: both outlines
    assert pixel(1, 0, cell // 2) == plain
    first = picture.getpixel((left - panel - visualize._GAP + cell, top + cell))  # the image without routes
    assert first == visualize._QUERY
