"""Models of a run: built from its configuration, or read back from its folder."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .. import create_model
from .config import ModelConfig
from .state import RunFolder


def build_model(config: ModelConfig, num_classes: int | None, in_chans: int | None) -> nn.Module:
    """The model of a configuration; None for `num_classes` or `in_chans` leaves them as the name has them.

    Raises:
        ValueError: an unknown name or argument, or a checkpoint that does not fit.
        FileNotFoundError: there is no such checkpoint.
    """
    # Arguments left at 0 are not passed on: not every model of timm takes them.
    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    arguments: dict[str, Any] = {key: rate for key, rate in rates.items() if rate > 0}
    if config.checkpoint_path is not None and not Path(config.checkpoint_path).is_file():
        raise FileNotFoundError(f"model.checkpoint_path {config.checkpoint_path} does not exist")
    given = {"num_classes": num_classes, "in_chans": in_chans, "checkpoint_path": config.checkpoint_path}
    arguments |= {key: value for key, value in given.items() if value is not None}
    if repeated := sorted(set(arguments) & set(config.options)):
        raise ValueError(f"model.options repeats {repeated[0]!r}; set model.{repeated[0]} instead")
    # None and not False: a saved model (hf-hub:, local-dir:) comes with its weights unless they are refused.
    pretrained = True if config.pretrained else None
    try:
        return create_model(config.name, pretrained=pretrained, **arguments, **config.options)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"model.name {config.name} with {arguments | config.options}: {error}") from error


def prepare(model: nn.Module, config: ModelConfig) -> None:
    """Freeze parameters and turn on checkpointing, as a configuration says.

    Raises:
        ValueError: model.freeze has an entry that fits no parameter, or leaves none to train, or the model cannot
            recompute activations.
    """
    if config.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"model.grad_checkpointing is true, but {config.name} cannot do that; leave it out")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    for pattern in config.freeze:
        matching = [
            parameter
            for name, parameter in model.named_parameters()
            if name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
        ]
        if not matching:
            raise ValueError(f"model.freeze has {pattern!r}, which is no parameter of {config.name} and no prefix")
        for parameter in matching:
            parameter.requires_grad_(False)
    if config.freeze and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model.freeze {config.freeze} leaves no parameter to train; take out the head's, say")
    for module in model.modules():
        if isinstance(module, _NormBase) and module.affine and not module.weight.requires_grad:
            module.eval()  # its statistics belong to its frozen weights
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def adopt_preprocess(
    model: nn.Module, preprocess: dict[str, Any], num_classes: int, classes: Sequence[str] | None
) -> None:
    """Write how the model's inputs are made into its `pretrained_cfg`, so that whoever gets the model can make them."""
    config = {**(getattr(model, "pretrained_cfg", None) or {}), **preprocess, "num_classes": num_classes}
    config.pop("label_names", None)
    if classes is not None:
        config["label_names"] = list(classes)
    model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]


def load_trained(run: str | Path, weights: str = "best", options: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a run folder with its "best" or "last" weights, in evaluation mode.

    Its `pretrained_cfg` has the input size, mean, std and crop that it was evaluated with, and the class names.
    `options` are arguments of the model that take the place of the run's, with the same weights.

    Raises:
        FileNotFoundError: the run has not saved such weights yet.
        ValueError: the file is not one of a run, or its weights do not fit the model with these options.
    """
    options = dict(options or {})
    if fixed := sorted({"num_classes", "in_chans"} & options.keys()):
        raise ValueError(f"model.options may not hold {fixed[0]}: the run's weights decide it; leave it out")
    path = RunFolder(run).weights(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; train the run up to its first evaluation")
    saved = read_metadata(path)["config"]
    arguments = saved["model_args"] | options
    try:
        model = create_model(saved["architecture"], checkpoint_path=path, **arguments)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{saved['architecture']} with {arguments}: {error}") from error
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in saved["pretrained_cfg"].items()}
    adopt_preprocess(model, cfg, saved["num_classes"], saved.get("label_names"))
    return model.eval()


def read_metadata(path: Path) -> dict[str, Any]:
    """What a run wrote beside the weights in `path`.

    `config` is the content of a hub config.json (architecture, model_args, pretrained_cfg, …), `weights` is "ema" or
    "model", `step` where they were taken and `metrics` the evaluation there, if there was one.

    Raises:
        ValueError: the file was not written by a run.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            texts = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if "config" not in texts:
        raise ValueError(f"{path} was not written by a training run: its header has no config")
    return {key: value if key == "format" else json.loads(value) for key, value in texts.items()}
