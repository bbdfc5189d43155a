"""Other users of backbones: torchvision's detectors, segmentation_models_pytorch and transformers."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from transformers import TimmBackbone, TimmBackboneConfig

import striate  # noqa: F401, registers our names with timm
from striate.detection.torchvision import retinanet


def read_set(folder: Path) -> list[tuple[Tensor, dict[str, Tensor]]]:
    content = json.loads((folder / "annotations.json").read_text())
    out = []
    for image in content["images"]:
        pixels = np.array(Image.open(folder / "images" / image["file_name"]), dtype=np.float32) / 255
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in mine]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = dict(boxes=boxes, labels=torch.tensor([a["category_id"] for a in mine], dtype=torch.int64))
        out.append((torch.from_numpy(pixels).permute(2, 0, 1), target))
    return out


def ap50(model: torch.nn.Module, folder: Path) -> float:
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for number, (image, _) in enumerate(read_set(folder)):
            (found,) = model.eval()([image])
            for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
                left, top, right, bottom = box.tolist()
                place = [left, top, right - left, bottom - top]
                results.append(dict(image_id=number, category_id=int(label), bbox=place, score=float(score)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "annotations.json"))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


def test_torchvision_learns(drawn) -> None:
    torch.manual_seed(0)
    norms = dict(feature_norms=True)
    model = retinanet("biformer_nano", 4, backbone=norms, channels=64, min_size=128, max_size=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps, data = 150, read_set(drawn / "train")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images, targets = zip(*(data[int(i)] for i in torch.randint(len(data), (4,), generator=order)), strict=True)
        loss = sum(model.train()(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    found = ap50(model, drawn / "val")
    print(f"AP50 {found:.3f}")
    assert found >= 0.4


@pytest.mark.parametrize("name", ["swin_tiny", "biformer_nano", "davit_tiny", "vig_h_tiny", "crossformer_small"])
@pytest.mark.parametrize("decoder", ["Unet", "UPerNet"])
def test_encoders_of_segmentation_models_pytorch(name, decoder) -> None:
    model = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=3)
    assert model.encoder.name == name
    x = torch.randn(2, 3, 64, 96)
    out = model(x)
    assert out.shape == (2, 3, 64, 96)
    out.square().mean().backward()
    inside = [p.grad for key, p in model.encoder.named_parameters() if "blocks" in key]
    assert inside
    assert all(gradient is not None for gradient in inside)


@pytest.mark.parametrize("name", ["swin_tiny", "biformer_nano"])
def test_transformers(name) -> None:
    config = TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=(1, 3))
    model = TimmBackbone(config).eval()
    maps = model(torch.randn(1, 3, 64, 96)).feature_maps
    assert [m.shape[2:] for m in maps] == [(8, 12), (2, 3)]
    assert list(model.channels) == [m.shape[1] for m in maps]
