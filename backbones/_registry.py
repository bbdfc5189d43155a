"""Names of models: registering them here and in timm, listing, describing, creating."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import fnmatch
import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import DefaultCfg, PretrainedCfg, is_model, is_model_pretrained, register_model
from torch import nn

from ._base import Backbone, FeaturePyramid
from ._checkpoint import load_checkpoint
from ._fetch import read_pretrained
from ._published import Weights, hub_place, published


@dataclasses.dataclass(frozen=True)
class Family:
    """What all sizes of a family share; `paper` and `source` are addresses, `licence` that of the source."""

    name: str
    title: str
    paper: str
    source: str
    licence: str


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known about a registered model without building it.

    `params` counts the 1000-class model, `gmacs` is 10^9 multiply-adds of one image of `input_size`, both as published
    or counted where the authors give none; `top1` is the paper's ImageNet-1k accuracy in percent, or None.
    """

    name: str
    family: Family
    input_size: tuple[int, int, int]
    params: float
    gmacs: float
    top1: float | None
    crop_pct: float
    pretraining: str
    entry: Callable[..., nn.Module] = dataclasses.field(repr=False, compare=False)

    def pretrained_cfg(self, weights: Weights | None = None) -> PretrainedCfg:
        """The same in timm's terms, for its transforms and hub format; with what `weights` were trained for."""
        cfg = PretrainedCfg(
            architecture=self.name,
            input_size=self.input_size,
            crop_pct=self.crop_pct,
            first_conv=self.entry.first_conv,  # type: ignore[attr-defined]
            classifier="head.fc",
            license=self.family.licence,
            origin_url=self.family.source,
            paper_name=self.family.title,
            paper_ids=self.family.paper.replace("https://arxiv.org/abs/", "arXiv:"),
        )
        if weights is None:
            return cfg
        return dataclasses.replace(
            cfg,
            tag=weights.tag,
            input_size=weights.input_size,
            num_classes=weights.num_classes,
            license=weights.licence,
            **weights.cfg,
        )


_MODELS: dict[str, ModelInfo] = {}


def register(
    family: Family,
    *,
    params: float,
    gmacs: float,
    top1: float | None = None,
    size: int = 224,
    crop_pct: float = 0.875,
    pretraining: str = "",
    first_conv: str | tuple[str, ...] = "patch_embed.proj",
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register the decorated function under its name, here and in timm unless timm has a model of that name.

    Args:
        params: millions of parameters; gmacs: 10^9 multiply-adds; top1: percent, all as published.
        size: native height and width of the input.
        pretraining: data set before ImageNet-1k for `top1`, empty if none.
        first_conv: name of the convolution that reads the image, or of several.
    """

    def decorate(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        name = function.__name__
        if name in _MODELS:
            raise ValueError(
                f"{name} is registered twice, by {_MODELS[name].entry.__module__} and {function.__module__}"
            )

        @functools.wraps(function)
        def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            return function(info=info, pretrained=pretrained, **kwargs)

        entry.first_conv = first_conv  # type: ignore[attr-defined]
        info = ModelInfo(name, family, (3, size, size), params, gmacs, top1, crop_pct, pretraining, entry)
        _MODELS[name] = info
        if not is_model(name):
            module = sys.modules[function.__module__]
            cfgs = module.__dict__.setdefault("default_cfgs", {})
            cfgs[name] = _timm_cfgs(info)
            register_model(entry)
        return entry

    return decorate


def _timm_cfgs(info: ModelInfo) -> DefaultCfg:
    """What timm's registry keeps: a description for every weight tag, with an address where there is one."""
    cfgs = {"": info.pretrained_cfg()}
    if entries := published(info.name):
        cfgs = {}
        for weights in entries:
            hub, file = hub_place(weights.mirrors[0]) if weights.mirrors else (None, None)
            cfg, url = info.pretrained_cfg(weights), weights.working_link
            cfgs[weights.tag] = dataclasses.replace(cfg, url=url, hf_hub_id=hub, hf_hub_filename=file)
    return DefaultCfg(tags=collections.deque(cfgs), cfgs=cfgs)


def list_models(pattern: str = "*", family: str | None = None) -> list[str]:
    """Names of our models that match a shell pattern, in natural order (`tiny_2` before `tiny_10`).

    Raises:
        ValueError: if there is no such family.
    """
    families = {info.family.name for info in _MODELS.values()}
    if family is not None and family not in families:
        raise ValueError(f"no family {family!r}; there are {', '.join(sorted(families))}")
    names = [n for n, info in _MODELS.items() if family in (None, info.family.name) and fnmatch.fnmatch(n, pattern)]
    return sorted(names, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)])


def model_info(name: str) -> ModelInfo:
    """What is known about one of our models.

    Raises:
        ValueError: if the name is unknown; it names the closest ones.
    """
    if name not in _MODELS:
        raise ValueError(_unknown(name, list(_MODELS)))
    return _MODELS[name]


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = (
        f"did you mean {', '.join(close)}?" if close else "striate.list_models() shows ours, timm.list_models() timm's"
    )
    return f"no model {name!r}; {hint}"


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create one of our models, or one of timm's, by name.

    Args:
        name: a name of `list_models()`, or any name timm knows (`convnext_tiny`, `resnet50.a1_in1k`). A weight tag
            (`swin_tiny.ms_in22k`) chooses among published weights, and sets classes and image size as they are.
        pretrained: load published weights: the first ones that `striate weights NAME` shows, or those of the tag.
        checkpoint_path: load this file: ours, the authors', or timm's; see `load_checkpoint`.
        **kwargs: arguments of the model: `num_classes`, `in_chans`, `drop_path_rate`, `features_only`, …; those that
            are None count as not given.

    Raises:
        ValueError: for an unknown name (with the closest ones), an argument that the model does not take, a
            checkpoint that does not fit, or weights that cannot be downloaded.
        striate.hub.HubError: (an OSError) if the network does not let weights through.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    base, _, tag = name.partition(".")
    if base in _MODELS and (tag in _tags(base) or not is_model_pretrained(name)):
        if tag:
            kwargs.setdefault("pretrained_cfg", tag)
        return _MODELS[base].entry(pretrained=pretrained, checkpoint_path=checkpoint_path, **kwargs)
    if not is_model(base):
        raise ValueError(_unknown(name, [*_MODELS, *timm.list_models()]))
    return timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint_path, **kwargs)


def build(
    cls: type[Backbone],
    arch: dict[str, Any],
    kwargs: dict[str, Any],
) -> nn.Module:
    """Build `cls(**arch)` with a user's `kwargs` on top: what every entry function ends in.

    Raises:
        ValueError: for an argument that neither `cls` nor the factory takes, or weights that cannot be loaded.
    """
    info: ModelInfo = kwargs.pop("info")
    pretrained = kwargs.pop("pretrained", False)
    checkpoint = kwargs.pop("checkpoint_path", None)
    tag_or_cfg, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    if isinstance(tag_or_cfg, str):
        weights = _find_weights(info, tag_or_cfg)
        kwargs = {**weights.args, "num_classes": weights.num_classes, **kwargs}
    cfg = _resolve_cfg(info, tag_or_cfg, overlay)
    cache_dir = kwargs.pop("cache_dir", None)
    kwargs.pop("pretrained_model_args", None)  # timm's record of the arguments that a saved config brought along
    pyramid = {key: kwargs.pop(key) for key in ("out_indices", "feature_norms", "keep_time") if key in kwargs}
    features_only = kwargs.pop("features_only", False)
    if pyramid and not features_only:
        raise ValueError(f"{', '.join(pyramid)} go with features_only=True")
    model = cls(**_options(cls, info, arch, kwargs))
    model.model_args = {k: v for k, v in kwargs.items() if k not in ("num_classes", "global_pool")}
    model.pretrained_cfg = _adapt_cfg(cfg, kwargs)
    model.default_cfg = model.pretrained_cfg  # timm's older name for the same
    result: Backbone | FeaturePyramid = FeaturePyramid(model, **pyramid) if features_only else model
    if checkpoint:
        load_checkpoint(result, checkpoint)
    elif pretrained:
        load_checkpoint(result, read_pretrained(model.pretrained_cfg, cache_dir))
    return result


def _options(cls: type[Backbone], info: ModelInfo, arch: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    accepted = _parameters(cls)
    if unknown := sorted(set(kwargs) - set(accepted)):
        raise ValueError(
            f"{info.name} takes no argument {', '.join(map(repr, unknown))}; it takes {', '.join(sorted(accepted))}"
        )
    return {**arch, **kwargs}


def _parameters(cls: type) -> set[str]:
    """Names of the arguments of `cls`, and of those that it passes on to its base as `**kwargs`."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in base.__dict__:
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
            names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return names


def _tags(name: str) -> list[str]:
    return ["", *(weights.tag for weights in published(name))]


def _find_weights(info: ModelInfo, tag: str) -> Weights:
    for weights in published(info.name):
        if weights.tag == tag:
            return weights
    known = ", ".join(_tags(info.name)[1:])
    raise ValueError(
        f"no weights {info.name}.{tag}: {f'the tags are {known}' if known else 'none are published under a tag'};"
        " pass checkpoint_path=FILE for others"
    )


def _resolve_cfg(info: ModelInfo, cfg: Any, overlay: dict[str, Any] | None) -> dict[str, Any]:
    """timm passes a PretrainedCfg, its dict, a weight tag, or nothing, which means the first published weights."""
    weights, given = None, {}
    if isinstance(cfg, str):
        weights = _find_weights(info, cfg)
    elif cfg is None:
        weights, given = next(iter(published(info.name)), None), {"num_classes": 1000}  # whatever they were trained on
    else:
        given = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg
    return {**info.pretrained_cfg(weights).to_dict(), **given, **(overlay or {})}


def _adapt_cfg(cfg: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The config of the model as built: its classes, channels and image size, not those of the published weights."""
    chans, height, width = cfg["input_size"]
    if (size := kwargs.get("img_size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
    cfg = {**cfg, "input_size": (kwargs.get("in_chans", chans), height, width)}
    return {**cfg, "num_classes": kwargs.get("num_classes", cfg.get("num_classes", 1000))}
