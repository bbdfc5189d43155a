"""What detectors and segmentation models rely on: any image size, padded batches, torchvision's detectors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import striate
from helpers import relative
from striate.detection.torchvision import fasterrcnn, maskrcnn, retinanet

# a thin form of every family with a pyramid, for large images
THIN: dict[str, dict[str, Any]] = {
    "biformer_small": dict(dims=(32, 32, 64, 64), depths=(1, 1, 1, 1), num_regions=16),
    "swin_tiny": dict(dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
    "swinv2_tiny_window8_256": dict(dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
    "davit_tiny": dict(dims=(32, 32, 64, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "crossformer_small": dict(dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
    "crossformer_pp_small": dict(dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
    "vig_h_tiny": dict(dims=(32, 32, 64, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
}
# shorter sides of 480 to 800 with the longer at most 1333, both ways, as they are and padded to multiples of 32
SIZES = [(480, 641), (800, 1333), (1333, 800), (608, 911), (736, 736), (480, 1333), (512, 672), (800, 1344)]


def thin(name: str, **kwargs: Any) -> nn.Module:
    return striate.create_model(name, features_only=True, **{**THIN[name], **kwargs}).eval()


@pytest.mark.parametrize("name", list(THIN))
def test_sizes_of_multi_scale_training(name) -> None:
    model = thin(name, feature_norms=True)
    strides = model.feature_info.reduction()
    with torch.no_grad():
        for height, width in SIZES:
            maps = model(torch.rand(1, 3, height, width))
            assert [tuple(m.shape[2:]) for m in maps] == [(-(-height // s), -(-width // s)) for s in strides]
            assert all(torch.isfinite(m).all() for m in maps)


@pytest.mark.parametrize("name", list(THIN))
def test_another_image_in_the_batch_changes_nothing(name) -> None:
    torch.manual_seed(1)
    model = thin(name)
    x = torch.rand(1, 3, 160, 224)
    other = torch.rand(1, 3, 160, 224)
    with torch.no_grad():
        alone, together = model(x), model(torch.cat([x, other]))
    assert max(relative(b[:1], a) for a, b in zip(alone, together, strict=True)) < 1e-5


def padded(x: Tensor, height: int, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


def inside(maps: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The part of padded maps that the image covers."""
    return [m[:, :, : small.shape[2], : small.shape[3]] for m, small in zip(maps, like, strict=True)]


@pytest.mark.parametrize(
    ("name", "levels", "side"),
    [
        ("swin_tiny", (0, 1, 2, 3), 224),
        ("swinv2_tiny_window8_256", (0, 1, 2, 3), 256),
        ("crossformer_small", (0,), 224),
        ("crossformer_pp_small", (0,), 224),
    ],
)
def test_padding_stays_outside_of_windows_that_end_with_the_image(name, levels, side) -> None:
    torch.manual_seed(1)
    model = thin(
        name, depths=(1, 1, 1, 1), out_indices=levels
    )  # no shifted and no dilated windows, `side` is whole ones
    x = torch.rand(1, 3, side, side)
    with torch.no_grad():
        alone, bordered = model(x), model(padded(x, side + 32, side + 96))
    assert max(relative(b, a) for a, b in zip(alone, inside(bordered, alone), strict=True)) < 1e-5


def test_padding_reaches_as_far_as_shifted_windows() -> None:
    """As in the papers' code, padded pixels are not masked: the tokens near the border see them, no others do."""
    torch.manual_seed(1)
    model = thin("swin_tiny", depths=(2, 1, 1, 1), out_indices=(0,))
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        alone, bordered = model(x), model(padded(x, 256, 320))
    (first,), (wide,) = alone, inside(bordered, alone)
    assert relative(wide[..., :-7, :-7], first[..., :-7, :-7]) < 1e-5
    assert relative(wide, first) > 1e-3


@pytest.mark.parametrize("detector", [fasterrcnn, maskrcnn, retinanet])
def test_torchvision(detector) -> None:
    model = detector("biformer_nano", 4, backbone=dict(feature_norms=True), channels=32, min_size=96, max_size=96)
    masks = torch.zeros(1, 96, 96, dtype=torch.uint8)
    masks[:, 20:60, 10:50] = 1
    target = dict(boxes=torch.tensor([[10.0, 20.0, 50.0, 60.0]]), labels=torch.tensor([2]), masks=masks)
    losses = model([torch.rand(3, 96, 96)], [target])
    sum(losses.values()).backward()
    gradients = {key: p.grad for key, p in model.backbone.body.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for key, g in gradients.items() if "norms.0" not in key)
    assert any(g.abs().sum() > 0 for g in gradients.values())
    (found,) = model.eval()([torch.rand(3, 70, 96)])
    assert found["boxes"].shape[1] == 4


def test_anchors_follow_the_strides() -> None:
    usual = fasterrcnn("biformer_nano", 2, channels=8)
    assert usual.backbone.strides == (4, 8, 16, 32, 64)
    assert usual.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert usual.roi_heads.box_roi_pool.featmap_names == ["0", "1", "2", "3"]
    two = fasterrcnn("biformer_nano", 2, out_indices=(1, 2), channels=8)
    assert two.rpn.anchor_generator.sizes == ((64,), (128,), (256,))
    assert two.roi_heads.box_roi_pool.featmap_names == ["0", "1"]
    one_stage = retinanet("biformer_nano", 2, channels=8)
    assert one_stage.backbone.strides == (8, 16, 32, 64, 128)
    assert one_stage.anchor_generator.sizes[0] == (32, 40, 51)


def test_torchvision_takes_models_of_timm() -> None:
    swin = dict(img_size=64, strict_img_size=False, depths=(1, 1, 1, 1))  # its maps are (B, H, W, C)
    model = retinanet("swin_tiny_patch4_window7_224", 2, backbone=swin, channels=8)
    maps = model.eval().backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps.values()] == [
        (1, 8, 8, 12),
        (1, 8, 4, 6),
        (1, 8, 2, 3),
        (1, 8, 1, 2),
        (1, 8, 1, 1),
    ]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("biformer_nan", {}, "biformer_nano"),
        ("biformer_nano", dict(out_indices=(0, 4)), "levels 0 to 3"),
        ("biformer_nano", dict(out_indices=(2, 1)), "finest first"),
        ("resnet18", dict(out_indices=(0, 7)), "resnet18 has no stages"),
        ("biformer_nano", dict(backbone=dict(windows=7)), "windows"),
    ],
)
def test_wrong_requests(name, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        fasterrcnn(name, 2, **options)


def test_nothing_of_openmmlab_is_needed() -> None:
    """Importing loads nothing of it, and the commands say what is missing."""
    code = """
import sys
sys.modules.update(dict.fromkeys(["mmengine", "mmcv", "mmdet", "mmseg"]))  # as if not installed
import striate.detection, striate.segmentation, striate.detection.torchvision, striate.segmentation.cli
for command, config in (("detection", "swin/mask_rcnn_tiny_1x"), ("segmentation", "swin/upernet_tiny_160k")):
    try:
        __import__(f"striate.{command}.cli", fromlist=["main"]).main(["train", config])
    except ValueError as error:
        print(error)
"""
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert out.count("mmengine is not installed") == 2
