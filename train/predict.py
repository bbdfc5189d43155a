"""`striate predict`: what a model sees in images."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..hub.folders import write_whole
from .augment import Transform, eval_transform
from .benchmark import align
from .config import ConfigParser, DataConfig, check_output
from .evaluate import (
    autocast,
    choose_device,
    class_names,
    in_the_middle,
    label_names,
    model_inputs,
    open_model,
    parse_source,
    source_parser,
    write_csv,
)

DATA_KEYS = ("image_size", "batch_size", "preprocess")
DRAWING = {"detect": "..detection.cli", "segment": "..segmentation.cli"}  # the task's command line
COLUMNS = ("image", "rank", "class", "name", "probability")


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the best first."""

    image: str
    classes: list[int]
    names: list[str]
    probabilities: list[float]

    def rows(self) -> list[tuple[str, int, int, str, float]]:
        """One row per class, as in COLUMNS."""
        ranked = zip(self.classes, self.names, self.probabilities, strict=True)
        return [(self.image, rank, *one) for rank, one in enumerate(ranked, 1)]

    def record(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "image": self.image,
            "predictions": [dict(zip(COLUMNS[1:], row[1:], strict=True)) for row in self.rows()],
        }


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files in `paths`, and the images in its folders and their folders, sorted.

    Raises:
        ValueError: a folder without images.
        FileNotFoundError: there is no such file or folder.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
            if not inside:
                raise ValueError(f"{path} holds no images ({', '.join(IMG_EXTENSIONS)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"no image or folder {path}")
    return found


def read_image(path: Path, transform: Transform, mode: str) -> Tensor:
    """The input `(C, H, W)` that an image file becomes.

    Raises:
        ValueError: it cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return transform(image.convert(mode))
    except Exception as error:  # damaged bytes raise nearly anything: OSError, SyntaxError, struct.error, …
        raise ValueError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from error


def read_batches(
    paths: Sequence[Path], transform: Transform, mode: str, size: int, failures: list[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of at most `size` readable images; why the others cannot be read is appended to `failures`."""
    names: list[Path] = []
    inputs: list[Tensor] = []
    for path in paths:
        try:
            inputs.append(read_image(path, transform, mode))
        except ValueError as error:
            failures.append(str(error))
            continue
        names.append(path)
        if len(names) == size:
            yield names, torch.stack(inputs)
            names, inputs = [], []
    if names:
        yield names, torch.stack(inputs)


@torch.inference_mode()
def predict(
    model: nn.Module, paths: Sequence[Path], images: Tensor, names: Sequence[str], topk: int, precision: str = "float32"
) -> list[Prediction]:
    """The `topk` likeliest classes of images `(B, C, H, W)`, which is all of them where there are fewer."""
    with autocast(images.device, precision):
        logits = model(images)
    best = logits.float().softmax(1).topk(min(topk, logits.shape[1]), dim=1)
    return [
        Prediction(str(path), indices, [names[index] for index in indices], values)
        for path, indices, values in zip(paths, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def predict_parser() -> ConfigParser:
    """The parser of `striate predict`."""
    parser = source_parser(
        "predict", "Classify images.", usage="striate predict MODEL IMAGE_OR_FOLDER [IMAGE_OR_FOLDER …] [OPTIONS]"
    )
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE_OR_FOLDER", help="folders with all inside them")
    parser.add_argument(
        "--task",
        type=str,
        default="classify",
        help="detect or segment: draw with CONFIG CHECKPOINT IMAGE …",
    )
    parser.add_argument("--topk", type=int, default=5, help="classes per image")
    parser.add_argument("--classes", type=str, default=None, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--output", type=str, default=None, metavar="FILE", help="write a .csv or .json file")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_keys("data", DATA_KEYS)
    parser.add_keys("run", ["device", "precision"])
    return parser


def read_names(path: str | None, model: nn.Module, num_classes: int) -> list[str]:
    """The names of the classes: the lines of `path`, else those the model has, else numbers.

    Raises:
        ValueError: there are not as many lines as classes, or no classes at all.
    """
    if num_classes == 0:
        raise ValueError("the model has no classes; give it some, --model.num_classes N")
    if path is None:
        return class_names(label_names(model), num_classes)
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if len(lines) != num_classes:
        raise ValueError(f"--classes {path} has {len(lines)} lines, the model {num_classes} classes; give one a line")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """`striate predict`: 0 if every image was classified, 1 if some could not be read.

    Raises:
        ValueError, OSError: the model, an image or a folder cannot be had, or the output cannot be written.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if (task := _task(words)) != "classify":
        return int(importlib.import_module(DRAWING[task], __package__).predict(words))
    values, run = parse_source(predict_parser(), words)
    output = check_output("--output", values["output"], (".csv", ".json"))
    data = DataConfig(name="folder", **values["data"])
    for option, number in (("--topk", values["topk"]), ("--data.batch_size", data.batch_size)):
        if number < 1:
            raise ValueError(f"{option} {number} must be at least 1")
    device, precision = choose_device(values["run"]["device"]), values["run"]["precision"]
    paths = find_images(values["images"])
    model, in_chans = open_model(values, run)
    names = read_names(values["classes"], model, int(model.num_classes))  # type: ignore[arg-type]
    preprocess, mode = model_inputs(model, data, in_chans)
    model = model.eval().to(device)
    failures: list[str] = []
    found: list[Prediction] = []
    for files, images in read_batches(paths, eval_transform(preprocess), mode, data.batch_size, failures):
        found += predict(model, files, images.to(device), names, values["topk"], precision)
    record = {"source": values["source"], "images": [one.record() for one in found], "failures": failures}
    print(json.dumps(record) if values["json"] else _table(found), flush=True)
    if output is not None:
        with in_the_middle("writing"):
            _write(output, record, found)
    for failure in failures:
        print(f"striate predict: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _task(words: list[str]) -> str:
    """What `--task` says; it is taken out of `words`.

    Raises:
        ValueError: there is no such task.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--task", default="classify")
    try:
        found, words[:] = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if found.task not in ("classify", *DRAWING):
        raise ValueError(f"--task {found.task}: give classify, {' or '.join(DRAWING)}")
    return str(found.task)


def _write(path: Path, record: dict[str, Any], found: Sequence[Prediction]) -> None:
    if path.suffix == ".json":
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    else:
        write_csv(path, [COLUMNS, *(row for one in found for row in one.rows())])


def _table(found: Sequence[Prediction]) -> str:
    rows: list[tuple[str, ...]] = [("image", "class", "name", "%")]
    for one in found:
        for image, rank, number, name, probability in one.rows():
            rows.append((image if rank == 1 else "", str(number), name, f"{100 * probability:.2f}"))
    return "\n".join(align(rows, left=3))
