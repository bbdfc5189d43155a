"""config.json in timm's hub format: written from a model, and read with suspicion."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, is_model
from torch import nn

from .. import __version__
from ..backbones import Backbone, FeaturePyramid, list_models
from ..backbones._registry import _unknown

logger = logging.getLogger("striate")

# Where weights come from is decided by who loads them, never by a file that came along.
_LOCATIONS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
_OF_ITS_ORIGIN = {"tag", "label_names", "label_offset"}
_FACTORY_ARGS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_NOT_SAVED = {*_FACTORY_ARGS, "pretrained_model_args", "device", "dtype", "scriptable", "exportable", "no_jit"}
_KNOWN_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}


@dataclasses.dataclass(frozen=True)
class SavedConfig:
    """What a config.json says: the registered name, its arguments, and timm's description of input and classes."""

    architecture: str
    num_classes: int
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def describe(model: nn.Module, label_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of config.json for `model`.

    Raises:
        ValueError: for a model that no name and JSON arguments can recreate, or labels that do not fit its classes.
    """
    body = model.backbone if isinstance(model, FeaturePyramid) else model
    cfg = dict(getattr(body, "pretrained_cfg", None) or {})
    architecture = cfg.pop("architecture", None)
    if not isinstance(architecture, str) or not isinstance(getattr(body, "num_classes", None), int):
        raise ValueError(
            f"a {type(model).__name__} cannot be described by a model name; push a model of striate.create_model"
            " (of timm's, not one made with features_only=True)"
        )
    args = _model_args(model, body)
    labels = list(label_names if label_names is not None else cfg.get("label_names") or ())
    if labels and len(labels) != body.num_classes:
        raise ValueError(f"{len(labels)} label_names for {body.num_classes} classes; give one name per class")
    config = {
        "architecture": architecture,
        "num_classes": body.num_classes,
        "num_features": body.num_features,
        "global_pool": args.get("global_pool"),
        "label_names": labels or None,
        "model_args": args,
        "pretrained_cfg": _input_cfg(cfg, args) | {"num_classes": body.num_classes},
        "striate_version": __version__,
    }
    return {key: value for key, value in config.items() if value is not None}


def _model_args(model: nn.Module, body: nn.Module) -> dict[str, Any]:
    """Arguments that make the model from its name. Drop rates stay out: they belong to a training, not to weights."""
    given = body.model_args if isinstance(body, Backbone) else getattr(model, "_model_args", None)
    args = dict(given if given is not None else getattr(model, "model_args", {}))
    args = {key: value for key, value in args.items() if key not in _NOT_SAVED and not _is_drop_rate(key)}
    if args.get("features_only") and not isinstance(model, FeaturePyramid):
        raise ValueError("timm's features_only models cannot be loaded back; push the model they were taken from")
    if isinstance(model, FeaturePyramid):
        args |= {"features_only": True, "out_indices": list(model.out_indices)}
        if model.norms is not None:
            args["feature_norms"] = True
    else:
        args["num_classes"] = body.num_classes
        if isinstance(pool := getattr(body, "global_pool", None), str):
            args["global_pool"] = pool
    for key, value in args.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"argument {key}={value!r} cannot be saved as JSON; create the model without it"
            ) from error
    return args


def _is_drop_rate(key: str) -> bool:
    return key in ("drop_rate", "drop_path_rate", "drop_block_rate") or key.endswith("_drop_rate")


def _input_cfg(cfg: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """timm's description of the input as the model takes it: its channels and size, not those of its origin."""
    cfg = {key: value for key, value in cfg.items() if value is not None and key not in _LOCATIONS | _OF_ITS_ORIGIN}
    chans, height, width = cfg["input_size"]
    if (size := args.get("img_size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
    chans = args.get("in_chans", chans)
    for key in ("mean", "std"):
        values = cfg[key]
        cfg[key] = list(values) if len(values) == chans else [sum(values) / len(values)] * chans
    for key in ("test_input_size", "min_input_size"):
        if key in cfg:
            cfg[key] = [chans, *cfg[key][1:]]
    return {**cfg, "input_size": [chans, height, width]}


def read_config(path: Path) -> SavedConfig:
    """Read and check a config.json; nothing is built.

    Raises:
        ValueError: if it is no JSON object, names no registered model, or holds values of the wrong kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object with 'architecture'")
    if "pretrained_cfg" not in content:  # timm's first format: everything in one object
        content = {"architecture": content.get("architecture"), "pretrained_cfg": content}
    architecture, cfg, args = content.get("architecture"), content["pretrained_cfg"], content.get("model_args", {})
    if not isinstance(architecture, str):
        raise ValueError(f"{path}: 'architecture' is {architecture!r}; it must be the name of a model")
    if not is_model(architecture):
        raise ValueError(f"{path}: {_unknown(architecture, [*list_models(), *timm.list_models()])}")
    for key, value in (("pretrained_cfg", cfg), ("model_args", args)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {key!r} is {value!r}; it must be an object")
    if taken := sorted(_FACTORY_ARGS & args.keys()):
        raise ValueError(f"{path}: 'model_args' may not hold {', '.join(taken)}; remove it")
    num_classes = content.get("num_classes", cfg.get("num_classes", PretrainedCfg.num_classes))
    if type(num_classes) is not int or num_classes < 0:
        raise ValueError(f"{path}: 'num_classes' is {num_classes!r}; it must be an integer of 0 or more")
    if args.get("num_classes", num_classes) != num_classes:
        raise ValueError(f"{path}: 'model_args' has {args['num_classes']} classes, but 'num_classes' is {num_classes}")
    if labels := content.get("label_names"):
        cfg = {**cfg, "label_names": labels}
    return SavedConfig(architecture, num_classes, args, _checked_cfg(path, cfg, num_classes))


def _checked_cfg(path: Path, cfg: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """The fields of timm's PretrainedCfg that do not say where weights are, with lists as tuples."""
    ignored = {"architecture", "num_features", "labels", *_LOCATIONS}
    if unknown := sorted(cfg.keys() - _KNOWN_FIELDS - ignored):
        logger.warning("%s: the installed timm knows no %s: left out", path, ", ".join(unknown))
    kept = {key: value for key, value in cfg.items() if key in _KNOWN_FIELDS - ignored and value is not None}
    for key, (fits, rule) in _FIELD_RULES.items():
        if key in kept and not fits(kept[key]):
            raise ValueError(f"{path}: {key!r} is {kept[key]!r}; it must be {rule}")
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}
    return {**kept, "num_classes": num_classes}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int and v > 0 for v in value)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or _is_strings(value)


_SIZE_RULE = (_is_size, "three positive integers (channels, height, width)")
_FIELD_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": _SIZE_RULE,
    "test_input_size": _SIZE_RULE,
    "min_input_size": _SIZE_RULE,
    "mean": (_is_numbers, "a list of numbers"),
    "std": (_is_numbers, "a list of numbers"),
    "crop_pct": (lambda value: _is_number(value) and value > 0, "a positive number"),
    "interpolation": (lambda value: isinstance(value, str), "a string"),
    "crop_mode": (lambda value: isinstance(value, str), "a string"),
    "first_conv": (_is_names, "a parameter name or a list of them"),
    "classifier": (_is_names, "a parameter name or a list of them"),
    "label_names": (lambda value: isinstance(value, dict) or _is_strings(value), "a list of strings"),
}


def is_ours(architecture: str) -> bool:
    """Whether `architecture` is built by this package rather than by timm."""
    return architecture in list_models()
