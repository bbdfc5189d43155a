"""Which registered models a state dict belongs to, told from its keys and shapes alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._base import Backbone, FeaturePyramid
from ._checkpoint import _canonical, _fit, logger, strip_prefix, unwrap
from ._reading import CheckpointError
from ._registry import create_model, list_models, model_info

_CLASSIFIER = re.compile(r"(classifier\.)?(head|classifier|head\.fc)\.weight")
_UNCOUNTED = re.compile(r"running_(mean|var)$|attn_mask$|relative_coords_table$|^(head_kd|head\.fc_dist)\.")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A registered model that a state dict loads into.

    Attributes:
        name: the model.
        args: the arguments of `create_model` with which it does: classes, channels, parts.
        changes: what loading then changes and says: tables resized, scales left out; empty if nothing.
    """

    name: str
    args: Mapping[str, Any]
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        args = {key: value for key, value in self.args.items() if key not in ("num_classes", "out_indices")}
        given = ", ".join(f"{key}={value}" for key, value in args.items())
        return f"{self.name} ({given})" if given else self.name


def recognise(state: Mapping[str, Any]) -> list[str]:
    """Names of the registered models that a state dict, or a mapping as it was saved, belongs to.

    Several names mean that these models have the same keys and shapes, so that only its source can tell; none, that
    no registered model fits. Wrappers, prefixes and the authors' keys are understood as by `load_checkpoint`; the
    number of classes is free. A model whose position tables would have to be resized counts only where no other fits.

    Raises:
        ValueError: if there are no named tensors in it.
    """
    return [fit.name for fit in find_fits(state)]


def find_fits(content: Mapping[str, Any], use_ema: bool = False) -> list[Fit]:
    """The same with the arguments that each model takes."""
    state, _, _ = strip_prefix(unwrap(content, use_ema, "the state dict"))
    tried = (try_fit(name, state) for name in _near(state, 0.01))
    fits = [fit for fit in tried if isinstance(fit, Fit)]
    fits = [fit for fit in fits if not fit.changes] or fits
    return [fit for fit in fits if _agrees(fit, state)] or fits


def find_closest(content: Mapping[str, Any], use_ema: bool = False, count: int = 2) -> list[str]:
    """Of a state dict that no model fits: what differs from the models that it has most tensors in common with."""
    state, _, _ = strip_prefix(unwrap(content, use_ema, "the state dict"))
    found = []
    for name in _near(state, 0.5):
        fit = try_fit(name, state)
        if isinstance(fit, CheckpointError):
            model = _on_meta(name)
            with collected_messages():
                theirs = {(key, value.shape) for key, value in _canonical(model, state).items()}
            ours = {(key, value.shape) for key, value in model.state_dict().items()}
            found.append((len(theirs & ours) / len(theirs | ours), str(fit).partition(". Is it")[0]))
    return [reason for _, reason in sorted(found, reverse=True)[:count]]


def try_fit(name: str, state: dict[str, Tensor]) -> Fit | Exception:
    """Whether `state`, unwrapped and without a prefix, loads into model `name`; if not, the error that says why."""
    try:
        with collected_messages() as messages:
            args = _arguments(name, state)
            model = _build(name, args)
            target = model.state_dict()
            own = state if state.keys() == target.keys() else _canonical(model, state)
            _fit(model, own, target, "it")
    except Exception as error:  # converting the keys of another family fails in many ways
        return error
    return Fit(name, args, tuple(messages))


def _arguments(name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of `create_model` that the tensors tell."""
    whole = _on_meta(name)
    own = whole.convert(state)
    unknown = len(own.keys() - whole.state_dict().keys())
    if unknown > len(own) / 2:  # another family, which is not worth building again
        raise CheckpointError(f"it does not fit {name}, which does not know {unknown} of its {len(own)} keys")
    args: dict[str, Any] = {}
    convs = model_info(name).entry.first_conv  # type: ignore[attr-defined]
    first = own.get(f"{convs if isinstance(convs, str) else convs[0]}.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != 3:
        args["in_chans"] = first.shape[1]
    if "head.fc_dist.weight" in own:
        args["distilled"] = True
    if levels := sorted({int(match[1]) for key in own if (match := re.match(r"norms\.(\d+)\.", key))}):
        return {**args, "features_only": True, "feature_norms": True, "out_indices": tuple(levels)}
    if "head.fc.weight" in own:
        return {**args, "num_classes": own["head.fc.weight"].shape[0]}
    final = [key for key in whole.state_dict() if key.startswith(("norm.", "head.norm."))]
    if final and not any(key in own for key in final):
        return {**args, "features_only": True}
    return {**args, "num_classes": 0}


class _WithoutValues(TorchFunctionMode):
    """Leaves out the drawing of weights that have a shape alone: of the time to build a model, it is 3/4."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        drawing = getattr(func, "__name__", "") in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_")
        if drawing and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _build(name: str, args: Mapping[str, Any]) -> Any:
    return _on_meta(name, **{key: value for key, value in args.items() if (key, value) != ("num_classes", 1000)})


@functools.lru_cache(maxsize=256)
def _on_meta(name: str, **args: Any) -> Any:
    with torch.device("meta"), _WithoutValues():
        return create_model(name, **args)


def _near(state: dict[str, Tensor], spread: float) -> list[str]:
    """Models of about as many parameters as `state` has, the nearest first: building all of them takes long."""
    count = sum(v.numel() for k, v in state.items() if v.is_floating_point() and not _UNCOUNTED.search(k))
    # published counts are those with 1000 classes; without a classifier, its inputs are the channels of some norm
    heads = [value.shape for key, value in state.items() if _CLASSIFIER.fullmatch(key) and value.ndim == 2]
    widths = {value.numel() for key, value in state.items() if value.ndim == 1 and "norm" in key}
    counts = [count + (1000 - rows) * (width + 1) for rows, width in heads]
    counts = counts or [count + 1000 * (width + 1) for width in {-1, *widths}]
    distances = {}
    for name in list_models():
        wanted = model_info(name).params * 1e6
        distance = min(abs(count - wanted) for count in counts)
        if distance <= 60_000 + spread * wanted:  # `params` are rounded
            distances[name] = distance
    return sorted(distances, key=lambda name: distances[name])


def _agrees(fit: Fit, state: dict[str, Tensor]) -> bool:
    """Whether tables that the authors save, although they follow from the model, are as large as those of this one."""
    model: Backbone | FeaturePyramid = _build(fit.name, fit.args)
    backbone = model.backbone if isinstance(model, FeaturePyramid) else model
    buffers = dict(backbone.named_buffers())
    return all(key not in buffers or buffers[key].numel() == value.numel() for key, value in state.items())


@contextlib.contextmanager
def collected_messages() -> Iterator[list[str]]:
    """What this thread would log about loading, kept instead."""
    messages: list[str] = []
    thread = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        if record.thread != thread:
            return True
        messages.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        yield messages
    finally:
        logger.removeFilter(keep)
