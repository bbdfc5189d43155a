"""Evaluation: exact counts, and the `striate validate` command."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..hub.factory import create_recognised
from ..hub.folders import write_whole
from .augment import eval_transform
from .config import ConfigParser, DataConfig, ModelConfig, check_output, load_config
from .data import EvalImages, LabelledImages, Source, eval_loader, image_mode, open_source, resolve_preprocess
from .errors import CommandFailedError
from .model import build_model, load_trained, read_metadata
from .state import RunFolder

SOURCE_HELP = "run folder, its weight file, model name, local-dir:path or hf-hub:org/name"
MODEL_KEYS = ("checkpoint_path", "num_classes", "in_chans", "pretrained", "options")


@dataclass(frozen=True)
class EvalResult:
    """Counts over a data set. `predictions` (total,) are the class numbers, in the order of the data set."""

    correct: int
    correct5: int
    total: int
    loss: float
    predictions: Tensor

    @property
    def top1(self) -> float:
        """Per cent of images whose class has the largest logit."""
        return 100 * self.correct / self.total

    @property
    def top5(self) -> float:
        """Per cent of images whose class is among the five largest logits."""
        return 100 * self.correct5 / self.total

    def record(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "correct": self.correct,
            "total": self.total,
            "loss": self.loss,
        }


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of run.precision."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def choose_device(name: str) -> torch.device:
    """The device of run.device.

    Raises:
        ValueError: no such device, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"run.device {name!r} is no device; give cpu, cuda, cuda:1, … or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"run.device {name}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu")
    return device


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    precision: str = "float32",
    should_stop: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """Count correct answers of `model` over `batches` of images `(B, C, H, W)` and labels `(B,)`.

    Returns None if `should_stop` said so before the end. The model's training mode is left as it was.

    Raises:
        ValueError: there are no images.
    """
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    correct5, loss = correct.clone(), correct.double()
    predictions = []
    try:
        for images, labels in batches:
            if should_stop():
                return None
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast(device, precision):
                logits = model(images)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == labels[:, None]
            correct += hits[:, 0].sum()
            correct5 += hits.sum()
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            predictions.append(best[:, 0])
    finally:
        model.train(was_training)
    if not predictions:
        raise ValueError("there are no images to evaluate on")
    guesses = torch.cat(predictions).cpu()
    return EvalResult(int(correct), int(correct5), len(guesses), float(loss) / len(guesses), guesses)


def check_labels(source: Source, num_classes: int, split: str) -> None:
    """Refuse a data set with more classes than the model has outputs.

    Raises:
        ValueError: names both numbers.
    """
    if source.num_classes is not None and source.num_classes > num_classes:
        raise ValueError(
            f"split {split!r} has {source.num_classes} classes, the model {num_classes}; "
            f"give --model.num_classes {source.num_classes}"
        )


def model_inputs(model: nn.Module, config: DataConfig, in_chans: int | None = None) -> tuple[dict[str, Any], str]:
    """How an image becomes an input of `model`, see `resolve_preprocess`, and the mode to convert it to first.

    Both follow the model's `pretrained_cfg` (or `in_chans`) and data.*.
    """
    pretrained_cfg = getattr(model, "pretrained_cfg", None) or {}
    in_chans = in_chans or next(iter(pretrained_cfg.get("input_size") or (3,)))
    return resolve_preprocess(config, in_chans, pretrained_cfg), image_mode(in_chans)


def open_images(model: nn.Module, config: DataConfig, in_chans: int | None = None) -> tuple[Source, EvalImages]:
    """data.eval_split, and its images made inputs of `model`, as its `pretrained_cfg` (or `in_chans`) and data.* say.

    Raises:
        ValueError: an unknown data set or split, or a wrong configuration.
        FileNotFoundError: the data set is not there.
    """
    preprocess, mode = model_inputs(model, config, in_chans)
    source = open_source(config, config.eval_split, preprocess["input_size"][0])
    return source, EvalImages(source.images, eval_transform(preprocess), mode)


def validate(
    model: nn.Module,
    config: DataConfig,
    device: torch.device,
    precision: str = "float32",
    progress: bool = False,
    in_chans: int | None = None,
) -> EvalResult:
    """Evaluate `model` on data.eval_split, with inputs as its `pretrained_cfg` (or `in_chans`) and data.* say.

    Raises:
        ValueError: the data set and the model do not fit, or the configuration is wrong.
        FileNotFoundError: the data set is not there.
        CommandFailedError: an image cannot be read.
    """
    source, images = open_images(model, config, in_chans)
    check_labels(source, int(model.num_classes), config.eval_split)  # type: ignore[arg-type]
    return _answer(model, images, config, device, precision, progress)[0]


@contextmanager
def in_the_middle(work: str) -> Iterator[None]:
    """What `cli.main` takes for a wrong request becomes a failure of `work`, an accident after the request was checked.

    Raises:
        CommandFailedError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CommandFailedError(f"{work} failed: {error}") from error


def _answer(
    model: nn.Module, images: EvalImages, config: DataConfig, device: torch.device, precision: str, progress: bool
) -> tuple[EvalResult, Tensor]:
    """The counts, and the true classes `(total,)` in the same order as `predictions`."""
    loader = eval_loader(images, config.batch_size, config.workers, device)
    bar = tqdm(loader, unit="batch", file=sys.stderr, disable=None if progress else True)
    seen: list[Tensor] = []

    def noted() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in bar:
            seen.append(labels)
            yield inputs, labels

    with in_the_middle("evaluating"):
        result = evaluate(model.to(device), noted(), device, precision)
    assert result is not None
    return result, torch.cat(seen)


class FlipAverage(nn.Module):
    """The mean of the logits of an image and of its mirror image: images `(B, C, H, W)` -> `(B, classes)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return (self.model(images) + self.model(images.flip(-1))) / 2


def read_real_labels(path: Path) -> list[list[int]]:
    """The labels of ImageNet-ReaL (Beyer et al., arXiv 2006.07159; google-research/reassessed-imagenet, real.json).

    One list of valid classes per validation image, in the order of the files; an empty one where no class was agreed.

    Raises:
        ValueError: the file holds something else.
        FileNotFoundError: there is no such file.
    """
    try:
        labels = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); give the real.json of ImageNet-ReaL") from error
    rows: list[Any] = labels if isinstance(labels, list) else [None]
    if not all(isinstance(row, list) and all(type(number) is int for number in row) for row in rows):
        raise ValueError(f"{path} must hold a list with one list of class numbers per image, as real.json does")
    return rows


def order_real_labels(rows: Sequence[list[int]], images: LabelledImages, path: Path) -> list[list[int]]:
    """The rows in the order of `images`: a folder is sorted by class, the rows are by name of file.

    Raises:
        ValueError: there are more or fewer rows than images, or no image has a label.
    """
    if len(rows) != len(images):
        raise ValueError(f"{path} has labels of {len(rows)} images, the split has {len(images)}; give the ones of it")
    if not any(rows):
        raise ValueError(f"{path} has no label for any image")
    names = getattr(getattr(images, "reader", None), "samples", None)
    if names is None:
        return list(rows)
    by_name = sorted(range(len(rows)), key=lambda index: os.path.basename(_sample_name(names[index])))
    ordered = dict(zip(by_name, rows, strict=True))
    return [ordered[index] for index in range(len(rows))]


def _sample_name(sample: Any) -> str:
    """The file name in what a reader of timm keeps per image: (path, class), or (tar entry, class, …)."""
    return str(getattr(sample[0], "name", sample[0]))


def count_real(predictions: Tensor, rows: Sequence[list[int]]) -> dict[str, Any]:
    """Top-1 by ImageNet-ReaL: right if the class is among the valid ones. Images without any are left out."""
    pairs = [(guess, valid) for guess, valid in zip(predictions.tolist(), rows, strict=True) if valid]
    correct = sum(guess in valid for guess, valid in pairs)
    return {"top1": 100 * correct / len(pairs), "correct": correct, "total": len(pairs)}


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Counts `(num_classes, num_classes)` int64: rows are true classes, columns predicted ones."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def class_names(classes: Sequence[str] | None, count: int) -> list[str]:
    """One name for each of `count` classes: the known ones, then numbers."""
    known = list(classes or ())[:count]
    return known + [str(number) for number in range(len(known), count)]


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_whole(path, write)


def source_parser(command: str, description: str, **kwargs: Any) -> ConfigParser:
    """A parser whose first argument is a model in any form that `open_model` takes, with the keys for it."""
    parser = ConfigParser(prog=f"striate {command}", description=description, **kwargs)
    parser.add_argument("source", type=str, help=SOURCE_HELP)
    parser.add_argument("--weights", type=str, default="best", help="best or last weights of a run folder")
    parser.add_keys("model", MODEL_KEYS)
    return parser


def validate_parser() -> ConfigParser:
    """The parser of `striate validate`."""
    parser = source_parser("validate", "Evaluate a run folder or a model on a data set.")
    parser.add_argument(
        "--tta", action="store_true", help="answer with the mean logits of the image and its mirror image"
    )
    parser.add_argument(
        "--confusion",
        type=str,
        default=None,
        metavar="FILE.csv",
        help="write counts of answers: a row per true class, a column per predicted class",
    )
    parser.add_argument(
        "--predictions",
        type=str,
        default=None,
        metavar="FILE.csv",
        help="write the true and the predicted class of every image, in the order of the data set",
    )
    parser.add_argument(
        "--real_labels",
        type=str,
        default=None,
        metavar="FILE.json",
        help="also count top-1 with the labels of ImageNet-ReaL (real.json); images without any are left out",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_keys("data", [name for name in DataConfig.__dataclass_fields__ if name not in _TRAINING_KEYS])
    parser.add_keys("run", ["device", "precision"])
    return parser


_TRAINING_KEYS = ("train_split", "broken_limit")


def take_defaults(parser: ConfigParser, source: str) -> RunFolder | None:
    """Let the configuration of the run that `source` is, or lies in, have the defaults of data.* and run.*.

    Returns the run if `source` is its folder, None for everything else.
    """
    is_file = Path(source).is_file()
    run = RunFolder(Path(source).parent if is_file else source)
    if not run.config.is_file():
        return None
    trained = load_config(run.config)
    values = {
        f"{group}.{key}": value for group in ("data", "run") for key, value in vars(getattr(trained, group)).items()
    }
    known = {action.dest for action in parser._actions}
    parser.set_defaults({key: value for key, value in values.items() if key in known})
    return None if is_file else run


def parse_source(parser: ConfigParser, argv: Sequence[str]) -> tuple[dict[str, Any], RunFolder | None]:
    """Parse a command whose first word is the model; the run folder if it is one, which then has the defaults.

    Raises:
        ValueError: the model does not come first, or the arguments are wrong.
    """
    if argv and argv[0].startswith("-") and not {"-h", "--help"} & set(argv):
        raise ValueError(f"give the run folder or the model first, before {argv[0]}")
    run = take_defaults(parser, argv[0]) if argv else None
    return parser.parse(argv), run


def open_model(values: dict[str, Any], run: RunFolder | None) -> tuple[nn.Module, int | None]:
    """The model of a parsed command, and the image channels it was asked for: None if it knows them itself.

    Raises:
        ValueError: an unknown name or argument, or weights that do not fit.
        FileNotFoundError: there are no such weights.
    """
    source, keys = values["source"], values["model"]
    is_file = Path(source).is_file()
    if run is not None or is_file:
        for key in ("checkpoint_path", "num_classes", "pretrained"):
            if keys.get(key):
                raise ValueError(f"--model.{key} does not go with {source}, which has weights; leave it out")
    if run is not None:
        return load_trained(run.path, values["weights"], keys["options"]), None
    if is_file:
        return load_file(Path(source), keys["options"]), None
    config = ModelConfig(name=source, **keys)
    in_chans = None if config.name.startswith(("hf-hub:", "local-dir:")) else config.in_chans
    return build_model(config, config.num_classes, in_chans), in_chans


def load_file(path: Path, options: dict[str, Any] | None = None) -> nn.Module:
    """The model in a weight file: one that a run or `striate average` wrote, see `load_trained`, or the authors'.

    Raises:
        ValueError: the file does not tell which model it holds, or its weights do not fit.
    """
    try:
        read_metadata(path)
    except ValueError:
        try:
            return create_recognised(path, **(options or {})).eval()
        except ValueError as error:
            raise ValueError(f"{error}: NAME --model.checkpoint_path FILE") from error
    return load_trained(path.parent, path.stem, options)


def main(argv: Sequence[str] | None = None) -> int:
    """`striate validate`: print top-1 and the counts of a model on a data set.

    Raises:
        ValueError, OSError: the model, its weights or the data set cannot be had; the message says why.
        CommandFailedError: an image cannot be read.
    """
    values, run = parse_source(validate_parser(), list(sys.argv[1:] if argv is None else argv))
    confusion, table = (check_output(f"--{key}", values[key]) for key in ("confusion", "predictions"))
    device = choose_device(values["run"]["device"])
    real_file = None if values["real_labels"] is None else Path(values["real_labels"])
    real_labels = None if real_file is None else read_real_labels(real_file)
    model, in_chans = open_model(values, run)
    data, num_classes = DataConfig(**values["data"]), int(model.num_classes)  # type: ignore[arg-type]
    source, images = open_images(model, data, in_chans)
    check_labels(source, num_classes, data.eval_split)
    if real_file is not None and real_labels is not None:
        real_labels = order_real_labels(real_labels, source.images, real_file)
    answering = FlipAverage(model) if values["tta"] else model
    result, labels = _answer(answering, images, data, device, values["run"]["precision"], True)
    record: dict[str, Any] = {"source": values["source"], "tta": values["tta"], **result.record()}
    if real_labels is not None:
        record["real"] = count_real(result.predictions, real_labels)
    names = class_names(source.classes or label_names(model), num_classes)
    print(json.dumps(record) if values["json"] else _describe(record), flush=True)
    with in_the_middle("writing"):
        _write_answers(confusion, table, labels, result.predictions, names)
    return 0


def _write_answers(
    confusion: Path | None, table: Path | None, labels: Tensor, predictions: Tensor, names: list[str]
) -> None:
    if confusion is not None:
        matrix = confusion_matrix(labels, predictions, len(names)).tolist()
        write_csv(confusion, [["true", *names], *([name, *row] for name, row in zip(names, matrix, strict=True))])
    if table is not None:
        pairs = zip(labels.tolist(), predictions.tolist(), strict=True)
        rows = ([index, names[label], names[guess]] for index, (label, guess) in enumerate(pairs))
        write_csv(table, [["image", "true", "predicted"], *rows])


def label_names(model: nn.Module) -> list[str] | None:
    """The names of the classes, where the model's `pretrained_cfg` has them."""
    known = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return list(known.values() if isinstance(known, dict) else known) if known else None


def _describe(record: dict[str, Any]) -> str:
    lines = [
        f"top-1 {record['top1']:.2f} % ({record['correct']}/{record['total']}), top-5 {record['top5']:.2f} %, "
        f"loss {record['loss']:.4f}"
    ]
    if real := record.get("real"):
        lines.append(f"ReaL top-1 {real['top1']:.2f} % ({real['correct']}/{real['total']})")
    return "\n".join(lines)
