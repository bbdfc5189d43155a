"""What a step minimises: the labels' loss, per time step or of a spiking model's mean, and what a teacher knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import load_checkpoint as load_timm_checkpoint
from torch import Tensor, nn

from ..backbones import Backbone, load_checkpoint
from .config import LossConfig, ModelConfig
from .model import build_model, load_trained
from .state import RunFolder


class Objective:
    """The loss of a model's outputs; turns on what the model has to return for it.

    `tet` is temporal efficient training (arXiv 2202.11946); what a teacher knows is learned as in arXiv 1503.02531, or
    with temperature 0 as its decisions (arXiv 2012.12877).

    Args:
        config: see `LossConfig`.
        labelled: loss of logits `(B, classes)` and labels.
        model: the model to train; one with time steps returns the logits of each for `tet`, and one with a head for
            distillation (timm's `head_dist`) those of both heads where there is a teacher.

    Raises:
        ValueError: `tet` of a model without time steps.
    """

    def __init__(self, config: LossConfig, labelled: nn.Module, model: nn.Module) -> None:
        self.config, self.labelled = config, labelled
        if config.tet is not None:
            if not hasattr(model, "step_logits"):
                raise ValueError(
                    f"loss.tet is {config.tet}, but {type(model).__name__} has no time steps; leave it out"
                )
            model.step_logits = True  # type: ignore[assignment]
        if config.teacher is not None and getattr(model, "head_dist", None) is not None:
            model.set_distilled_training(True)  # type: ignore[operator]

    def __call__(self, outputs: Any, labels: Tensor, hints: Any = None) -> Tensor:
        """The loss, a scalar in float32, or float64 if the outputs are.

        Args:
            outputs: of the model in training: logits `(B, classes)`, with `tet` `(T, B, classes)`, or a pair of them of
                which the second learns from the teacher. With `feature_weight` a pair of these and the last map, as
                `WithMap` gives them.
            labels: class numbers `(B,)`, or probabilities `(B, classes)`.
            hints: logits of the teacher `(B, classes)`, with `feature_weight` and its last map.
        """
        if self.config.feature_weight and hints is not None:
            (outputs, own), (hints, wanted) = outputs, hints
            transfer = self.config.feature_weight * attention_transfer(_at_least_float(own), _at_least_float(wanted))
            return self._of_logits(outputs, labels, hints) + transfer
        return self._of_logits(outputs, labels, hints)

    def _of_logits(self, outputs: Tensor | Sequence[Tensor], labels: Tensor, hints: Tensor | None) -> Tensor:
        logits, pupil = outputs if isinstance(outputs, (tuple, list)) else (outputs, outputs)
        loss = self._from_labels(_at_least_float(logits), labels)
        if hints is None:
            return loss
        weight = self.config.distillation_weight
        return (1 - weight) * loss + weight * self._from_teacher(_at_least_float(pupil), _at_least_float(hints))

    def _from_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.tet is None:
            return self.labelled(logits, labels)
        steps = torch.stack([self.labelled(step, labels) for step in logits]).mean()
        return (1 - self.config.tet) * steps + self.config.tet * (logits - 1).square().mean()

    def _from_teacher(self, logits: Tensor, hints: Tensor) -> Tensor:
        logits = logits.mean(0) if logits.ndim == 3 else logits
        t = self.config.temperature
        if t == 0:
            return F.cross_entropy(logits, hints.argmax(1))
        log_p, log_q = F.log_softmax(logits / t, 1), F.log_softmax(hints / t, 1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * t**2


def attention_transfer(own: Tensor, wanted: Tensor) -> Tensor:
    """How differently two maps `(B, C, H, W)`, of any channels and sizes, are active over their places, a scalar.

    The mean square over channels, as a vector of length 1 over the places (arXiv 1612.03928, "activation-based"); the
    squared distance of both, which is in [0, 2], is averaged over the batch.
    """
    if own.shape[2:] != wanted.shape[2:]:
        wanted = F.interpolate(wanted.square().mean(1, keepdim=True), own.shape[2:], mode="area").sqrt()
    places = [F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (own, wanted)]
    return (places[0] - places[1]).square().sum(1).mean()


class WithMap(nn.Module):
    """A model that returns its last map `(B, C, H, W)` too, through timm's `forward_intermediates`.

    Raises:
        ValueError: the model has no such method.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(
                f"loss.feature_weight needs models with forward_intermediates; {type(model).__name__} has none"
            )
        self.model = model

    def forward(self, images: Tensor) -> tuple[Any, Tensor]:
        """Outputs as of the model, and its map."""
        features, maps = self.model.forward_intermediates(images, indices=1)  # type: ignore[operator]
        return self.model.forward_head(features), maps[-1]  # type: ignore[operator]


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Teacher:
    """A frozen model that answers for images which were normalised for its pupil."""

    def __init__(
        self, model: nn.Module, preprocess: Mapping[str, Any], device: torch.device, with_map: bool = False
    ) -> None:
        model = model.to(device).eval().requires_grad_(False)
        self.model = WithMap(model) if with_map else model
        cfg = getattr(model, "pretrained_cfg", None) or preprocess
        mean, std, own_mean, own_std = (
            torch.tensor(source[key], dtype=torch.float32, device=device)[:, None, None]
            for source in (preprocess, cfg)
            for key in ("mean", "std")
        )
        self.factor, self.offset = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """Logits `(B, classes)`, and the last map if asked for it."""
        return self.model(images * self.factor + self.offset)


def build_teacher(
    config: LossConfig, num_classes: int, in_chans: int, preprocess: Mapping[str, Any], device: torch.device
) -> Teacher | None:
    """The teacher of a configuration, or None.

    Raises:
        ValueError: an unknown name, weights that cannot be had, or other classes than the pupil's.
        FileNotFoundError: there is no such run or file.
    """
    if config.teacher is None:
        return None
    if RunFolder(config.teacher).config.is_file():
        if config.teacher_options:
            raise ValueError(
                f"loss.teacher {config.teacher} is a run, which has its weights and options; leave yours out"
            )
        model = load_trained(Path(config.teacher))
    else:
        model = _named_teacher(config, num_classes, in_chans)
    if getattr(model, "num_classes", num_classes) != num_classes:
        raise ValueError(f"loss.teacher {config.teacher} has {model.num_classes} classes, the model {num_classes}")
    return Teacher(model, preprocess, device, config.feature_weight > 0)


def _named_teacher(config: LossConfig, num_classes: int, in_chans: int) -> nn.Module:
    name, options = str(config.teacher), dict(config.teacher_options)
    file = options.pop("checkpoint_path", None)
    saved = name.startswith(("hf-hub:", "local-dir:"))  # its channels are its own
    described = ModelConfig(name=name, pretrained=not file, options=options)
    # left to itself, a model has the classes of its weights; given others, it would have an untrained classifier
    model = build_model(described, num_classes if file else None, None if saved else in_chans)
    if file and isinstance(model, Backbone):
        untrained = model.head.fc.weight.detach().clone()
        load_checkpoint(model, file)
        if torch.equal(model.head.fc.weight, untrained):
            raise ValueError(f"loss.teacher_options: {file} has a classifier of other than {num_classes} classes")
    elif file:
        try:
            load_timm_checkpoint(model, file)
        except RuntimeError as error:
            raise ValueError(f"loss.teacher_options: {file} does not fit {name}: {error}") from error
    return model
