"""Evaluation: exact counts, and the `striate validate` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .augment import eval_transform
from .config import ConfigParser, DataConfig, ModelConfig, load_config
from .data import EvalImages, Source, eval_loader, image_mode, open_source, resolve_preprocess
from .model import build_model, load_trained
from .state import RunFolder


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
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


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
            logits = logits.float()
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


def open_images(model: nn.Module, config: DataConfig, in_chans: int | None = None) -> tuple[Source, EvalImages]:
    """data.eval_split, and its images made inputs of `model`, as its `pretrained_cfg` (or `in_chans`) and data.* say.

    Raises:
        ValueError: an unknown data set or split, or a wrong configuration.
        FileNotFoundError: the data set is not there.
    """
    pretrained_cfg = getattr(model, "pretrained_cfg", None) or {}
    in_chans = in_chans or next(iter(pretrained_cfg.get("input_size") or (3,)))
    source = open_source(config, config.eval_split, in_chans)
    preprocess = resolve_preprocess(config, in_chans, pretrained_cfg)
    return source, EvalImages(source.images, eval_transform(preprocess), image_mode(in_chans))


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
    """
    source, images = open_images(model, config, in_chans)
    check_labels(source, int(model.num_classes), config.eval_split)  # type: ignore[arg-type]
    loader = eval_loader(images, config.batch_size, config.workers, device)
    bar = tqdm(loader, unit="batch", file=sys.stderr, disable=None if progress else True)
    result = evaluate(model.to(device), bar, device, precision)
    assert result is not None
    return result


def validate_parser() -> ConfigParser:
    """The parser of `striate validate`."""
    parser = ConfigParser(prog="striate validate", description="Evaluate a run folder or a model on a data set.")
    parser.add_argument("source", type=str, help="run folder, model name, local-dir:path or hf-hub:org/name")
    parser.add_argument("--weights", type=str, default="best", help="best or last weights of a run folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_keys("model", ["checkpoint_path", "num_classes", "in_chans", "pretrained", "options"])
    parser.add_keys("data", [name for name in DataConfig.__dataclass_fields__ if name != "train_split"])
    parser.add_keys("run", ["device", "precision"])
    return parser


def take_defaults(parser: ConfigParser, source: str) -> RunFolder | None:
    """If `source` is a run folder, return it and let its configuration have the defaults of data.* and run.*."""
    run = RunFolder(source)
    if not run.config.is_file():
        return None
    trained = load_config(run.config)
    values = {
        f"{group}.{key}": value for group in ("data", "run") for key, value in vars(getattr(trained, group)).items()
    }
    known = {action.dest for action in parser._actions}
    parser.set_defaults({key: value for key, value in values.items() if key in known})
    return run


def open_model(values: dict[str, Any], run: RunFolder | None) -> tuple[nn.Module, int | None]:
    """The model of a parsed command, and the image channels it was asked for: None if it knows them itself.

    Raises:
        ValueError: an unknown name or argument, or weights that do not fit.
        FileNotFoundError: there are no such weights.
    """
    if run is not None:
        return load_trained(run.path, values["weights"], values["model"]["options"]), None
    config = ModelConfig(name=values["source"], **values["model"])
    in_chans = None if config.name.startswith(("hf-hub:", "local-dir:")) else config.in_chans
    return build_model(config, config.num_classes, in_chans), in_chans


def main(argv: Sequence[str] | None = None) -> int:
    """`striate validate`: print top-1 and the counts of a model on a data set.

    Raises:
        ValueError, OSError: the model, its weights or the data set cannot be had; the message says why.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = validate_parser()
    if argv and argv[0].startswith("-") and not {"-h", "--help"} & set(argv):
        raise ValueError(f"give the run folder or the model first, before {argv[0]}")
    run = take_defaults(parser, argv[0]) if argv else None
    values = parser.parse(argv)
    device = choose_device(values["run"]["device"])
    model, in_chans = open_model(values, run)
    data = DataConfig(**values["data"])
    result = validate(model, data, device, values["run"]["precision"], progress=True, in_chans=in_chans)
    if values["json"]:
        print(json.dumps({"source": values["source"], **result.record()}))
    else:
        print(
            f"top-1 {result.top1:.2f} % ({result.correct}/{result.total}), top-5 {result.top5:.2f} %, "
            f"loss {result.loss:.4f}"
        )
    return 0
