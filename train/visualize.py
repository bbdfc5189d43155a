"""Pictures of bi-level routing: which regions of an image a region attends to.

model = striate.create_model("local-dir:demo/hub/biformer_nano").eval()
stages = routed_stages(model, batch)                      # batch (B, in_chans, H, W)
draw_routing([RoutingRow(photo, "a shirt", stages[...], query)]).save("routing.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor, nn

from ..backbones.biformer import BiLevelRoutingAttention

Box = tuple[float, float, float, float]

_PANEL = 176
_GAP = 14
_MARGIN = 24
_LABELS = 168
_QUERY = (230, 97, 1)  # orange and blue are told apart by every kind of colour vision
_ROUTED = (33, 102, 172)
_INK = (30, 30, 30)
_SOFT = (110, 110, 110)


@dataclass(frozen=True)
class StageRoutes:
    """Where one attention layer sends the regions of a batch.

    Attributes:
        stage: number of the stage, from 1.
        routes: `(B, R, topk)` int64, regions numbered row by row, the most similar first.
        grid: regions per side (rows, columns).
        region: height and width of a region in pixels of the network's input.
    """

    stage: int
    routes: Tensor
    grid: tuple[int, int]
    region: tuple[int, int]

    def box(self, region: int, image: tuple[int, int]) -> Box:
        """Left, top, right, bottom of a region as fractions of an image of `(H, W)` pixels, padding cut off."""
        row, column = divmod(region, self.grid[1])
        (height, width), (h, w) = image, self.region
        return (
            min(column * w / width, 1),
            min(row * h / height, 1),
            min((column + 1) * w / width, 1),
            min((row + 1) * h / height, 1),
        )

    def region_at(self, y: float, x: float, image: tuple[int, int]) -> int:
        """The region that holds the point at fractions `(y, x)` of an image of `(H, W)` pixels."""
        row = min(int(y * image[0] / self.region[0]), self.grid[0] - 1)
        return row * self.grid[1] + min(int(x * image[1] / self.region[1]), self.grid[1] - 1)


@torch.no_grad()
def routed_stages(model: nn.Module, images: Tensor) -> list[StageRoutes]:
    """The routes of the last block of every routed stage.

    Args:
        model: a BiFormer, which is run once in evaluation mode and left as it was.
        images: `(B, in_chans, H, W)`, as the model takes them.

    Raises:
        ValueError: if the model routes nothing.
    """
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, BiLevelRoutingAttention):
            layers[int(name.split(".")[1])] = module  # the last of each stage stays
    if not layers:
        raise ValueError(f"a {type(model).__name__} has no routing attention; pass a BiFormer")
    found: dict[int, StageRoutes] = {}

    def note(stage: int, layer: BiLevelRoutingAttention, x: Tensor) -> None:
        stride = 4 * 2**stage
        _, (h, w) = layer.project(x)
        found[stage] = StageRoutes(stage + 1, layer.routes(x).cpu(), layer.num_regions, (h * stride, w * stride))

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, stage=stage: note(stage, module, args[0]))
        for stage, layer in layers.items()
    ]
    was_training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [found[stage] for stage in sorted(found)]


@dataclass(frozen=True)
class RoutingRow:
    """One line of the picture: an image and a point in it.

    Attributes:
        image: what the network saw, at any resolution.
        title: words beside it; lines are separated by newlines.
        index: of the image in the batch of the routes.
        point: (y, x) in fractions of height and width; the region that holds it is the query.
    """

    image: Image.Image
    title: str
    index: int
    point: tuple[float, float]


def draw_routing(rows: Sequence[RoutingRow], stages: Sequence[StageRoutes], input_size: tuple[int, int]) -> Image.Image:
    """One line per row: the image with the query region, then the regions it is routed to at each stage.

    Args:
        rows: what to show.
        stages: from `routed_stages`.
        input_size: (H, W) of the network's input, which the whole of each image stands for.
    """
    columns = 1 + len(stages)
    left, top = _MARGIN + _LABELS, _MARGIN + 92
    width = left + columns * (_PANEL + _GAP) - _GAP + _MARGIN
    canvas = Image.new("RGB", (width, top + len(rows) * (_PANEL + _GAP) - _GAP + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    _heading(draw, stages, left, top)
    for number, row in enumerate(rows):
        y = top + number * (_PANEL + _GAP)
        _words(draw, (_MARGIN, y + _PANEL // 2), row.title, anchor="lm")
        for column, stage in enumerate([None, *stages]):
            panel = _panel(row, stage or stages[0], stage is not None, input_size)
            canvas.paste(panel, (left + column * (_PANEL + _GAP), y))
    return canvas


def _panel(row: RoutingRow, stage: StageRoutes, show_routes: bool, input_size: tuple[int, int]) -> Image.Image:
    photo = row.image.convert("RGB").resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
    query = stage.region_at(*row.point, input_size)
    routed = stage.routes[row.index, query].tolist() if show_routes else []
    panel = photo
    if show_routes:  # everything else fades, so that what is attended to stands out without its outline
        panel = Image.blend(ImageEnhance.Brightness(photo).enhance(0.45), Image.new("RGB", photo.size, "white"), 0.35)
        for region in routed:
            box = _pixels(stage.box(region, input_size))
            panel.paste(photo.crop(box), box)
    draw = ImageDraw.Draw(panel)
    _outline(draw, _pixels(stage.box(query, input_size)), _QUERY, 4)
    for region in routed:
        _outline(draw, _pixels(stage.box(region, input_size)), _ROUTED, 3, inset=4 if region == query else 0)
    return panel


def _pixels(box: Box) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(value * _PANEL) for value in box)
    return left, top, right, bottom


def _outline(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: tuple[int, int, int], width: int, inset: int = 0
) -> None:
    left, top, right, bottom = box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset
    if right > left and bottom > top:  # a region may lie in the padding
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=width)


def _heading(draw: ImageDraw.ImageDraw, stages: Sequence[StageRoutes], left: int, top: int) -> None:
    _words(draw, (_MARGIN, _MARGIN), "Bi-level routing attention: where a region looks", 20)
    x = _MARGIN
    for colour, text in ((_QUERY, "query region"), (_ROUTED, "regions it is routed to (the rest is faded)")):
        draw.rectangle((x, _MARGIN + 35, x + 15, _MARGIN + 50), outline=colour, width=4)
        _words(draw, (x + 24, _MARGIN + 42), text, anchor="lm")
        x += 24 + round(draw.textlength(text, _font())) + 28
    for column, stage in enumerate([None, *stages]):
        text = "image" if stage is None else f"stage {stage.stage}: {_share(stage)}"
        _words(draw, (left + column * (_PANEL + _GAP) + _PANEL // 2, top - 8), text, anchor="ms")


def _share(stage: StageRoutes) -> str:
    return f"{stage.routes.shape[-1]} of {stage.grid[0] * stage.grid[1]} regions"


def _words(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int = 14, anchor: str | None = None
) -> None:
    first, *rest = text.split("\n")
    step = size + 5
    x, y = at[0], at[1] - (step * len(rest) // 2 if anchor == "lm" else 0)
    for number, line in enumerate((first, *rest)):
        draw.text((x, y + number * step), line, _SOFT if number else _INK, _font(size), anchor=anchor)


def _font(size: int = 14) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
