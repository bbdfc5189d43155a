"""Finding, unwrapping, converting and strictly loading a checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor

from ._base import Backbone, FeaturePyramid
from ._reading import CheckpointError, read_file

logger = logging.getLogger("striate")

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net", "model_ema", "state_dict_ema")
EMA_WRAPPERS = ("model_ema", "state_dict_ema")


def load_checkpoint(
    model: Backbone | FeaturePyramid, source: str | Path | Mapping[str, Any], *, use_ema: bool = False
) -> None:
    """Load weights into `model`: our files, the authors' or timm's, `.pth` or `.safetensors`.

    Wrappers (`model`, `state_dict`, …) and prefixes (`module.`, `backbone.`, `encoder.`) are recognised, published keys
    are converted, derived buffers are recomputed. Everything is checked before the first weight changes. These
    adaptations are made, and reported once each as a warning of the logger `striate`: another number of classes
    leaves the classifier as it is; another number of input channels adapts the first convolution; a position table of
    another window is resized; a classifier for distillation that the checkpoint does not have stays as it is;
    classifier weights have no place in a feature pyramid; norms of a feature pyramid that a classification checkpoint
    does not have stay as they are.

    Args:
        model: a model of `create_model`.
        source: a file, or a mapping as it was saved.
        use_ema: prefer averaged weights where the file has both.

    Raises:
        ValueError: (as `CheckpointError`) if the file is damaged, holds code, or keys or shapes do not fit; all
            missing and unexpected keys are counted and the first ones named.
    """
    label = "the state dict" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_file(Path(source))
    state = unwrap(content, use_ema, label)
    target = model.state_dict()
    converted = state if state.keys() == target.keys() else _canonical(model, state)
    try:
        state = _fit(model, converted, target, label)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_whose(state)}") from None
    model.load_state_dict(state, strict=False)  # what may be missing was settled above


def _whose(state: dict[str, Tensor]) -> str:
    from ._recognise import find_fits  # which creates models, so it comes after this file

    fits = find_fits(state)
    return f". It has the keys and shapes of {' or '.join(map(str, fits))}" if fits else ""


def rename(key: str, patterns: Sequence[tuple[str, str]]) -> str:
    """Apply regular-expression replacements to a key, one after the other."""
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key


def unwrap(content: Mapping[str, Any], use_ema: bool, label: str) -> dict[str, Tensor]:
    names = (*EMA_WRAPPERS, *WRAPPERS) if use_ema else WRAPPERS
    for name in names:
        if isinstance(content.get(name), Mapping):
            return unwrap(content[name], use_ema, label)
    state = {key: value for key, value in content.items() if isinstance(value, Tensor) and isinstance(key, str)}
    if not state:
        raise CheckpointError(f"{label} holds no named tensors; its keys are {', '.join(map(str, list(content)[:8]))}")
    for prefix in ("module.", "_orig_mod."):  # of data-parallel and compiled models
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def strip_prefix(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str, int]:
    """Of a larger model, the tensors of its backbone; the prefix that they had, and how many others there are."""
    norms = {key: value for key, value in state.items() if key.startswith("norms.")}
    for prefix in ("backbone.", "encoder."):
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if inside:
            return {**inside, **norms}, prefix, len(state) - len(inside) - len(norms)
    return state, "", 0


def _canonical(model: Backbone | FeaturePyramid, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys as `model` has them: prefixes stripped, published names converted, what has no place in it left out."""
    backbone = model.backbone if isinstance(model, FeaturePyramid) else model
    state, prefix, dropped = strip_prefix(state)
    if dropped:
        logger.warning("left out %d tensors outside %s* of the checkpoint", dropped, prefix)
    state = backbone.complete(backbone.convert(state))
    if not isinstance(model, FeaturePyramid):
        return state
    kept = {}
    last = max(model.out_indices) - bool(backbone.stem_stride)  # the last stage; the stem's map may be the first level
    for key, value in state.items():
        stage = re.match(rf"(?:norms|{backbone.stages_name})\.(\d+)\.", key)
        if key.startswith("norms."):
            if model.norms is not None and stage and stage[1] in model.norms:
                kept[key] = value
        elif not key.startswith(("head.", "norm.")) and (stage is None or int(stage[1]) <= last):
            kept[f"backbone.{key}"] = value
    left = state.keys() - {key.removeprefix("backbone.") for key in kept}
    if parts := sorted({re.match(r"[^.]+(\.\d+)?", key)[0] for key in left}):  # type: ignore[index]
        logger.warning("a feature pyramid has no place for %s of the checkpoint: left out", ", ".join(parts))
    return kept


def _fit(
    model: Backbone | FeaturePyramid, state: dict[str, Tensor], target: dict[str, Tensor], label: str
) -> dict[str, Tensor]:
    """Adapt shapes where that has a meaning; raise if anything is left over.

    The keys of the result are those of `target`, but for a classifier that stays as it is.
    """
    backbone = model.backbone if isinstance(model, FeaturePyramid) else model
    convs = backbone.pretrained_cfg["first_conv"]
    prefix = "" if backbone is model else "backbone."
    first = {f"{prefix}{name}.weight" for name in ([convs] if isinstance(convs, str) else convs)}
    optional = {key for key in target if key.endswith("num_batches_tracked")}
    state = dict(state)
    wanted = target["head.fc.weight"].shape[0] if "head.fc.weight" in target else 0
    classifiers = {key for key in target if key.startswith(("head.fc.", "head.fc_dist."))}
    distilled = {key for key in classifiers if key.startswith("head.fc_dist.")}
    if backbone is model and "head.fc.weight" in state and state["head.fc.weight"].shape[0] != wanted:
        logger.warning("the checkpoint has %d classes, the model %d: its classifier was not loaded",
                       state["head.fc.weight"].shape[0], wanted)  # fmt: skip
        state = {key: value for key, value in state.items() if not key.startswith(("head.fc.", "head.fc_dist."))}
        optional |= classifiers
    elif distilled and not distilled & state.keys():
        logger.warning("the checkpoint has no classifier for distillation: the model's stays as it is")
        optional |= distilled
    norms = {key for key in target if key.startswith("norms.")}
    if norms and not norms & state.keys():
        logger.warning("the checkpoint has no feature norms: those of the pyramid stay as they are")
        optional |= norms
    missing = sorted(target.keys() - state.keys() - optional)
    unexpected = sorted(state.keys() - target.keys())
    shapes = []
    if not missing and not unexpected:
        state = {key: _adapted(backbone, key, value, target[key], key in first) for key, value in state.items()}
        shapes = [
            f"{key} is {tuple(value.shape)}, the model's {tuple(target[key].shape)}"
            for key, value in state.items()
            if value.shape != target[key].shape
        ]
    if missing or unexpected or shapes:
        found = [_sample("missing", missing), _sample("unexpected", unexpected), _sample("of another shape", shapes)]
        raise CheckpointError(
            f"{label} does not fit {backbone.pretrained_cfg['architecture']}: {'; '.join(filter(None, found))}."
            " Is it another model or size? (a detection checkpoint wants features_only=True, feature_norms=True)"
        )
    return state


def _adapted(backbone: Backbone, key: str, value: Tensor, target: Tensor, is_first: bool) -> Tensor:
    """`value` in the shape of `target` where that has a meaning, else as it is."""
    if value.ndim != target.ndim or value.shape == target.shape:
        return value
    if not is_first:
        return backbone.adapt(key.removeprefix("backbone."), value)
    if value.shape[1] != 3 or value.shape[0] != target.shape[0] or value.shape[2:] != target.shape[2:]:
        return value
    logger.warning("adapted %s from 3 input channels to %d", key, target.shape[1])
    return adapt_input_conv(target.shape[1], value)


def _sample(what: str, items: list[str], count: int = 6) -> str:
    if not items:
        return ""
    return f"{len(items)} {what} ({', '.join(items[:count])}{', …' if len(items) > count else ''})"
