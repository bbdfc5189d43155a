"""`striate visualize`: pictures of where a model looks.

Of a BiFormer, bi-level routing: which regions of an image a region attends to.

model = striate.create_model("local-dir:demo/hub/biformer_nano").eval()
stages = routed_stages(model, batch)                      # batch (B, in_chans, H, W)
draw_routing([RoutingRow(photo, "a shirt", stages[...], query)]).save("routing.png")

Of any other classifier, Grad-CAM: which parts of the image speak for a class.

maps = grad_cam(model, batch, batch.new_tensor([3]).long())   # (B, h, w), from 0 to 1
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor, nn

from ..backbones.biformer import BiLevelRoutingAttention
from ..hub.folders import write_whole
from .augment import eval_transform
from .config import ConfigParser, DataConfig
from .evaluate import choose_device, in_the_middle, model_inputs, open_model, parse_source, source_parser
from .predict import find_images, predict, read_image, read_names

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


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391) on the last map of `model`.

    The channels of the map are weighted by the mean gradient that the logit of the class has in them, summed, and what
    speaks against the class is cut off. Where a class token alone is classified, the map is the input of the last
    block, since its output carries no gradient elsewhere. Maps of several time steps are averaged.

    Args:
        model: a classifier with timm's contract, which is run in evaluation mode and left as it was.
        images: `(B, in_chans, H, W)`, as the model takes them.
        classes: `(B,)` int64.

    Returns:
        `(B, h, w)` float32: each map from 0 to 1, its largest value; all 0 where nothing speaks for the class.

    Raises:
        ValueError: the model has no map of its image, or no logits.
    """
    if getattr(model, "num_classes", None) == 0:
        raise ValueError(f"a {type(model).__name__} without a classifier has nothing to explain; give it num_classes")
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            features, logits = _last_map(model, images)
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), [features])
    finally:
        model.train(was_training)
    layout = _layout(model, images)
    values, weights = layout(features.detach()), layout(gradient).mean((2, 3), keepdim=True)
    maps = (values * weights).sum(1).relu().float()
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def _last_map(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last map, as the model lays it out, and the logits that were made from it."""
    if getattr(model, "global_pool", None) != "token":
        with torch.no_grad():
            features = model.forward_features(images)  # type: ignore[operator]
        features = features.requires_grad_()
        return features, model.forward_head(features)  # type: ignore[operator]
    found: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(args[0].detach().requires_grad_())
        return (found[0], *args[1:])

    info: Any = model.feature_info
    last: Any = model.get_submodule(info[-1]["module"])
    hook = (last.blocks[-1] if hasattr(last, "blocks") else last).register_forward_pre_hook(cut)
    try:
        logits = model(images)
    finally:
        hook.remove()
    return found[0], logits


def _layout(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from maps of `model` to `(B, C, h, w)`."""
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    stride = model.feature_info[-1]["reduction"]  # type: ignore[index]
    rows, columns = (math.ceil(side / stride) for side in images.shape[-2:])

    def change(x: Tensor) -> Tensor:
        if x.dim() == 5:
            x = x.mean(0)
        if x.dim() == 3 and x.shape[1] >= rows * columns:  # class tokens come first
            return x[:, -rows * columns :].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        if x.dim() != 4:
            raise ValueError(f"the last features of a {type(model).__name__} are {tuple(x.shape)}: no map of the image")
        return x.permute(0, 3, 1, 2) if channels_last else x

    return change


# Anchors of a map of colours that grows evenly brighter, from dark violet to light yellow.
_HEAT = np.array([(13, 8, 60), (92, 18, 110), (168, 46, 95), (229, 92, 48), (251, 165, 10), (252, 255, 164)], float)


def draw_cam(photo: Image.Image, cam: Tensor, title: str) -> Image.Image:
    """The image beside itself under its map of colours.

    Args:
        photo: what the network saw.
        cam: `(h, w)`, from 0 to 1.
        title: a line above.
    """
    scale = max(1, round(224 / max(photo.size)))
    size = (photo.width * scale, photo.height * scale)
    photo = photo.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    heat = Image.fromarray(cam.cpu().numpy().astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    at = np.asarray(heat).clip(0, 1) * (len(_HEAT) - 1)
    colours = np.stack([np.interp(at, range(len(_HEAT)), channel) for channel in _HEAT.T], axis=-1)
    overlay = Image.blend(photo, Image.fromarray(colours.astype(np.uint8)), 0.6)
    top = _MARGIN + 24
    canvas = Image.new("RGB", (2 * _MARGIN + 2 * size[0] + _GAP, top + size[1] + _MARGIN), "white")
    _words(ImageDraw.Draw(canvas), (_MARGIN, _MARGIN - 4), title)
    canvas.paste(photo, (_MARGIN, top))
    canvas.paste(overlay, (_MARGIN + size[0] + _GAP, top))
    return canvas


def visualize_parser() -> ConfigParser:
    """The parser of `striate visualize`."""
    parser = source_parser(
        "visualize",
        "Draw where a model looks: the routing of a BiFormer, Grad-CAM of every other classifier.",
        usage="striate visualize MODEL IMAGE_OR_FOLDER [IMAGE_OR_FOLDER …] --output DIR [OPTIONS]",
    )
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE_OR_FOLDER", help="folders with all inside them")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="folder for one PNG file per image")
    parser.add_argument("--cam", action="store_true", help="Grad-CAM of a BiFormer too, instead of its routing")
    parser.add_argument(
        "--target", type=int, default=None, help="class to explain by its number; default the likeliest"
    )
    parser.add_argument(
        "--point",
        type=tuple[float, float],
        default=(0.5, 0.5),
        help="[y, x] in [0, 1): whose region's routes are drawn",
    )
    parser.add_argument("--classes", type=str, default=None, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_keys("data", ["image_size", "preprocess"])
    parser.add_keys("run", ["device"])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`striate visualize`: 0 if a picture of every image was drawn, 1 if some could not be read.

    Raises:
        ValueError, OSError: the model, an image or a folder cannot be had, or the request does not fit the model.
    """
    values, run = parse_source(visualize_parser(), list(sys.argv[1:] if argv is None else argv))
    if not all(0 <= part < 1 for part in values["point"]):
        raise ValueError(f"--point {list(values['point'])} must be [y, x] with both in [0, 1)")
    device, paths = choose_device(values["run"]["device"]), find_images(values["images"])
    model, in_chans = open_model(values, run)
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    names = read_names(values["classes"], model, num_classes)
    if values["target"] is not None and not 0 <= values["target"] < num_classes:
        raise ValueError(f"--target {values['target']} is no class of the model; give 0 to {num_classes - 1}")
    preprocess, mode = model_inputs(model, DataConfig(name="folder", **values["data"]), in_chans)
    transform, model = eval_transform(preprocess), model.eval().to(device)
    folder = Path(values["output"])
    folder.mkdir(parents=True, exist_ok=True)
    written: list[dict[str, str]] = []
    failures: list[str] = []
    for path in paths:
        try:
            image = read_image(path, transform, mode)
        except ValueError as error:
            failures.append(str(error))
            continue
        picture = _picture(model, path, image.to(device), seen_image(image, preprocess), names, values)
        file = _free_name(folder, path.stem, {entry["picture"] for entry in written})
        with in_the_middle("writing"):
            write_whole(file, lambda temporary, picture=picture: picture.save(temporary, "PNG"))  # type: ignore[misc]
        written.append({"image": str(path), "picture": str(file)})
    record = {"source": values["source"], "pictures": written, "failures": failures}
    lines = (f"{entry['image']}: {entry['picture']}" for entry in written)
    print(json.dumps(record) if values["json"] else "\n".join(lines))
    for failure in failures:
        print(f"striate visualize: {failure}", file=sys.stderr)
    return 1 if failures else 0


def seen_image(inputs: Tensor, preprocess: dict[str, Any]) -> Image.Image:
    """The picture that an input `(C, H, W)` was made from, as it was resized and cropped."""
    mean, std = (torch.tensor(preprocess[key]).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = ((inputs * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _picture(
    model: nn.Module, path: Path, image: Tensor, photo: Image.Image, names: Sequence[str], values: dict[str, Any]
) -> Image.Image:
    batch = image[None]
    (answer,) = predict(model, [path], batch, names, len(names))
    target = answer.classes[0] if values["target"] is None else values["target"]
    probability = 100 * answer.probabilities[answer.classes.index(target)]
    routed = not values["cam"] and any(isinstance(module, BiLevelRoutingAttention) for module in model.modules())
    if routed:
        row = RoutingRow(photo, f"{names[target]}\n{probability:.1f} %", 0, tuple(values["point"]))
        return draw_routing([row], routed_stages(model, batch), (image.shape[1], image.shape[2]))
    cam = grad_cam(model, batch, torch.tensor([target], device=image.device))[0]
    return draw_cam(photo, cam, f"{names[target]}, {probability:.1f} %")


def _free_name(folder: Path, stem: str, taken: set[str]) -> Path:
    """A file for the picture of `stem`, numbered where images of several folders have the same name."""
    name, number = f"{stem}.png", 2
    while str(folder / name) in taken:
        name, number = f"{stem}_{number}.png", number + 1
    return folder / name
