"""`striate visualize`: Grad-CAM by its formula, and a picture per image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import striate
from striate.train.cli import main
from striate.train.visualize import draw_cam, grad_cam, seen_image


class Pooled(nn.Module):
    """A linear classifier of the mean of its map, which is the image itself."""

    def __init__(self, weight: Tensor, output_fmt: str) -> None:
        super().__init__()
        self.weight, self.output_fmt = nn.Parameter(weight), output_fmt
        self.feature_info = [{"reduction": 1, "module": ""}]

    def forward_features(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else x

    def forward_head(self, x: Tensor) -> Tensor:
        return x.mean((1, 2) if self.output_fmt == "NHWC" else (2, 3)) @ self.weight.T

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("output_fmt", ["NHWC", "NCHW"])
def test_grad_cam_of_a_linear_model_is_its_weighted_map(output_fmt: str) -> None:
    x, weight = torch.randn(2, 3, 5, 4), torch.randn(6, 3)
    model = Pooled(weight, output_fmt).train()
    got = grad_cam(model, x, torch.tensor([4, 1]))
    want = torch.stack([(w.view(3, 1, 1) * image).sum(0) for w, image in zip(weight[[4, 1]], x, strict=True)]).relu()
    assert torch.allclose(got, want / want.amax((1, 2), keepdim=True), atol=1e-6)
    assert model.training, "the mode is as it was"
    assert model.weight.grad is None
    assert grad_cam(model, -x.abs(), torch.tensor([0, 0])).isfinite().all()


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("test_efficientnet", (64, 96), (2, 3)),
        ("test_vit", (160, 160), (10, 10)),
        ("spikformer_nano", (32, 32), (4, 4)),
        ("bivit_nano", (32, 40), (4, 5)),
    ],
)
def test_every_layout_has_a_map(name: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = striate.create_model(name, num_classes=5)
    for module in model.modules():  # an untrained spiking model is silent
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.constant_(module.bias, 1.0)
    maps = grad_cam(model, torch.randn(2, 3, *size), torch.tensor([0, 3]))
    assert maps.shape == (2, *grid)
    assert bool(((maps >= 0) & (maps <= 1)).all())
    assert maps.amax() == 1


def test_where_a_class_token_is_classified_the_map_is_the_input_of_the_last_block() -> None:
    model = striate.create_model("test_vit", num_classes=3).eval()
    x, target = torch.randn(1, 3, 160, 160), torch.tensor([2])
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block in model.blocks[:-1]:
            tokens = block(tokens)
    tokens.requires_grad_()
    logits = model.forward_head(model.norm(model.blocks[-1](tokens)))
    assert torch.allclose(logits, model(x), atol=1e-6)
    (gradient,) = torch.autograd.grad(logits[0, 2], [tokens])
    want = (tokens[0, 1:] * gradient[0, 1:].mean(0)).sum(1).relu().detach().view(10, 10)
    assert torch.allclose(grad_cam(model, x, target)[0], want / want.max(), atol=1e-5)


def test_what_has_no_map_or_no_classes() -> None:
    with pytest.raises(ValueError, match="without a classifier"):
        grad_cam(striate.create_model("test_efficientnet", num_classes=0), torch.randn(1, 3, 32, 32), torch.tensor([0]))


def test_the_picture_shows_the_image_and_its_map() -> None:
    photo = Image.new("RGB", (224, 224), (100, 100, 100))
    cam = torch.zeros(2, 2)
    cam[1, 0] = 1
    picture = draw_cam(photo, cam, "a shoe, 93 %")
    left, top = 24, 48
    assert picture.getpixel((left + 50, top + 50)) == (100, 100, 100)
    right = left + 224 + 14
    assert sum(picture.getpixel((right + 10, top + 214))) > 2 * sum(picture.getpixel((right + 214, top + 10)))


def test_what_the_network_saw() -> None:
    preprocess = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    inputs = torch.from_numpy(pixels / 255).permute(2, 0, 1).float()
    inputs = (inputs - torch.tensor(preprocess["mean"]).view(3, 1, 1)) / torch.tensor(preprocess["std"]).view(3, 1, 1)
    assert np.array_equal(np.asarray(seen_image(inputs, preprocess)), pixels)


def test_a_picture_per_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / folder / "same.png")
    (tmp_path / "b" / "bad.jpg").write_text("no image")
    words = ["visualize", "test_efficientnet", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*words, "--output", str(tmp_path / "out"), "--target", "7", "--json"]) == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert [Path(entry["picture"]).name for entry in said["pictures"]] == ["same.png", "same_2.png"]
    assert "bad.jpg cannot be read" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["same.png", "same_2.png"]
    for entry in said["pictures"]:
        Image.open(entry["picture"]).load()


def test_a_biformer_shows_its_routing_unless_asked_otherwise(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "x.png")
    words = ["visualize", "biformer_nano", str(tmp_path / "x.png")]
    for extra, folder in (([], "routing"), (["--cam"], "cam")):
        assert main([*words, "--output", str(tmp_path / folder), *extra]) == 0
    routing, cam = (Image.open(tmp_path / folder / "x.png") for folder in ("routing", "cam"))
    assert routing.width > cam.width, "the image, and its routes at three stages"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--target", "1000"], "give 0 to 999"), (["--point", "[0.5, 1.0]"], "--point [0.5, 1.0] must be")],
)
def test_wrong_requests(tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    out = ["--output", str(tmp_path / "out")]
    assert main(["visualize", "test_efficientnet", str(tmp_path / "x.png"), *out, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
