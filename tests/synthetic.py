"""Drawn images for detection and segmentation: coloured circles, squares and triangles on a noisy ground."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "square", "triangle")
COLOURS = ((220, 60, 50), (60, 190, 70), (60, 90, 230))


def outline(kind: int, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a shape: a circle has 24."""
    corners = (24, 4, 3)[kind]
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def draw_image(rng: np.random.RandomState, height: int, width: int) -> tuple[Image.Image, Image.Image, list[Any]]:
    """One image, its label map (0 is the ground) and `(class, polygon)` of its shapes, which do not overlap."""
    ground = rng.randint(90, 150) + rng.randint(-25, 25, (height, width, 3))
    image = Image.fromarray(ground.astype(np.uint8))
    labels = Image.new("L", (width, height), 0)
    shapes: list[Any] = []
    places: list[tuple[float, float, float]] = []
    for _ in range(rng.randint(2, 5)):
        radius = rng.uniform(0.1, 0.24) * min(height, width)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if any(math.hypot(x - a, y - b) < radius + r for a, b, r in places):
            continue
        places.append((x, y, radius))
        kind = rng.randint(len(CLASSES))
        polygon = outline(kind, x, y, radius, rng.uniform(0, 2 * math.pi))
        colour = tuple(int(np.clip(c + rng.randint(-40, 40), 0, 255)) for c in COLOURS[kind])
        ImageDraw.Draw(image).polygon(polygon, fill=colour)
        ImageDraw.Draw(labels).polygon(polygon, fill=kind + 1)
        shapes.append((kind, polygon))
    return image, labels, shapes


def write_set(folder: Path, count: int, seed: int, height: int = 128, width: int = 128) -> Path:
    """Write `images/`, `labels/` (one PNG each) and `annotations.json` in COCO's format; returns `folder`."""
    rng = np.random.RandomState(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        image, labels, shapes = draw_image(rng, height, width)
        name = f"{number:04d}.png"
        image.save(folder / "images" / name)
        labels.save(folder / "labels" / name)
        images.append(dict(id=number, file_name=name, height=height, width=width))
        for kind, polygon in shapes:
            points = np.array(polygon)
            (left, top), (right, bottom) = points.min(0), points.max(0)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=kind + 1,
                    bbox=[left, top, right - left, bottom - top],
                    area=float((right - left) * (bottom - top)),
                    segmentation=[points.ravel().tolist()],
                    iscrowd=0,
                )
            )
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder
