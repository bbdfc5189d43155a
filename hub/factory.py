"""Creating models by name, from a folder or from a hub."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path
from typing import Any

from torch import nn

from .. import backbones
from ..backbones import Backbone, FeaturePyramid, load_checkpoint
from ..backbones._checkpoint import read_file
from ..backbones._hub_files import Access
from ..backbones._recognise import find_fits
from .config import SavedConfig, is_ours, read_config
from .sources import CONFIG, WEIGHTS, Repository, Source, parse_source

logger = logging.getLogger("striate")


def create_model(
    name: str,
    pretrained: bool | None = None,
    checkpoint_path: str | Path | None = None,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a model: one of ours or of timm by its name, or a saved one from a folder or a hub.

    Args:
        name: a name of `list_models()`, any name timm knows (`convnext_tiny`, `resnet50.a1_in1k`), `local-dir:PATH` or
            `hf-hub:org/name[@revision]`: what `striate.push` and timm write, config.json and model.safetensors.
        pretrained: load weights. Default: yes for a folder or repository, no for a plain name.
        checkpoint_path: load this file instead: ours, the authors', or timm's; see `load_checkpoint`.
        **kwargs: arguments of the model: `num_classes`, `in_chans`, `drop_path_rate`, `features_only`, …; those that
            are None count as not given. They go before the saved ones: with another `num_classes` the classifier
            starts anew, with other `in_chans` the first convolution is adapted, and a warning of the logger `striate`
            says so.
        token: of a hub; default: huggingface_hub's login or HF_TOKEN; False for none.
        endpoint: address of a hub; default: HF_ENDPOINT, or the Hugging Face Hub.
        cache_dir: where downloaded files are kept; default: huggingface_hub's cache, and torch.hub's for other links.

    Config and weights of a hub are of one commit, and compared with its checksums. HF_HUB_OFFLINE=1 is honoured.

    Raises:
        ValueError: for an unknown name (with the closest ones), a malformed config.json, missing or damaged weights,
            an argument that the model does not take, or weights that do not fit.
        striate.hub.HubError: (an OSError) of the kind that says what is wrong: `NotFoundError`, `AccessError` (and of
            these `TokenError`), `UnreachableError`, `DamagedFileError` or `StorageError`.
    """
    source = parse_source(name)
    if source is not None:
        return _create_saved(source, Access(token, endpoint, cache_dir), pretrained, checkpoint_path, kwargs)
    if token is not None or endpoint is not None:
        raise ValueError(
            f"token and endpoint go with hf-hub:org/name; {name!r} is created here. Set HF_ENDPOINT instead"
        )
    if cache_dir is not None:
        kwargs["cache_dir"] = cache_dir
    model = backbones.create_model(name, bool(pretrained), checkpoint_path, **kwargs)
    if not isinstance(model, (Backbone, FeaturePyramid)):
        # timm before 1.0.31 keeps no record of them for `push`
        model.model_args = {key: value for key, value in kwargs.items() if value is not None}  # type: ignore[assignment]
    return model


def create_recognised(path: str | Path, **kwargs: Any) -> nn.Module:
    """Create the one registered model that a file of weights belongs to by its keys and shapes, with these weights.

    Raises:
        ValueError: the file cannot be read safely, no model fits, or several do, so that the name has to be given.
    """
    content = read_file(Path(path))
    fits = find_fits(content)
    names = [fit.name for fit in fits]
    if len(fits) != 1 or fits[0].changes:
        found = f"has the keys and shapes of {', '.join(names)}" if names else "fits no registered model"
        raise ValueError(f"{path} {found}; give the model's name, and the file as its checkpoint_path")
    logger.info("%s is recognised as %s", path, fits[0])
    model = backbones.create_model(names[0], **{**fits[0].args, **kwargs})
    load_checkpoint(model, content)  # type: ignore[arg-type]
    return model


def _create_saved(
    source: Source, access: Access, pretrained: bool | None, checkpoint: str | Path | None, kwargs: dict[str, Any]
) -> nn.Module:
    if "pretrained_cfg" in kwargs:
        raise ValueError(f"pretrained_cfg comes from {source}; change parts of it with pretrained_cfg_overlay")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    repository = Repository(source, access)
    config = read_config(repository.file(CONFIG))
    weights = None
    if pretrained is not False and checkpoint is None:
        weights = repository.file(WEIGHTS)
    try:
        if is_ours(config.architecture):
            return _create_ours(config, weights or checkpoint, kwargs)
        return _create_timm(source, config, weights, checkpoint, kwargs)
    except (ValueError, OSError):
        raise
    except Exception as error:  # arguments from a file reach constructors that were not written for bad ones
        reason = textwrap.shorten(str(error), 600, placeholder=" …")  # timm lists every missing key
        raise ValueError(
            f"{source}: {config.architecture} cannot be created with {config.model_args | kwargs}: {reason}"
        ) from error


def _create_ours(config: SavedConfig, weights: str | Path | None, kwargs: dict[str, Any]) -> nn.Module:
    args = {**config.model_args, "num_classes": config.num_classes, **kwargs}
    cfg = _cfg_for(config, args["num_classes"])
    return backbones.create_model(config.architecture, checkpoint_path=weights, pretrained_cfg=cfg, **args)


def _create_timm(
    source: Source, config: SavedConfig, weights: Path | None, checkpoint: str | Path | None, kwargs: dict[str, Any]
) -> nn.Module:
    args = {**config.model_args, **kwargs}
    wanted = args.pop("num_classes", config.num_classes)
    # timm loads strictly only where the classes are those of the file, so another head comes afterwards.
    built = wanted if weights is None else config.num_classes
    cfg = _cfg_for(config, built)
    if weights is not None:
        read_file(weights)  # to say what is wrong with a damaged file; timm then reads it itself
        cfg["file"] = str(weights)
    model = backbones.create_model(
        config.architecture, weights is not None, checkpoint, pretrained_cfg=cfg, num_classes=built, **args
    )
    final_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "file"}  # type: ignore[operator, union-attr]
    if wanted != built and not args.get("features_only"):
        logger.warning("%s has %d classes, the model %d: its classifier was not loaded", source, built, wanted)
        model.reset_classifier(wanted)  # type: ignore[operator]
        final_cfg = _cfg_for(config, wanted)
    model.pretrained_cfg = model.default_cfg = final_cfg  # type: ignore[assignment]
    model.model_args = {**args, "num_classes": wanted}  # type: ignore[assignment]
    return model


def _cfg_for(config: SavedConfig, num_classes: int) -> dict[str, Any]:
    """The saved description for a model of `num_classes`: names of other classes say nothing about them."""
    cfg = {**config.pretrained_cfg, "architecture": config.architecture, "num_classes": num_classes}
    if num_classes != config.num_classes:
        cfg.pop("label_names", None)
        cfg.pop("label_descriptions", None)
    return cfg
