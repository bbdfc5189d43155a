"""Optimizer, schedule, moving average, mixing and loss of a run, all from timm."""

from __future__ import annotations

import inspect

import torch
from timm.data.mixup import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from .config import AugmentConfig, LossConfig, OptimConfig, ScheduleConfig

_FUSED = ("adam", "adamw", "sgd", "momentum")  # timm's names of optimizers that torch has with one kernel per step


def lr_scale(config: OptimConfig, batch_size: int, world_size: int = 1) -> float:
    """Factor of lr, warmup_lr and min_lr: real batch per step over `reference_batch`, or 1."""
    if config.reference_batch is None:
        return 1.0
    return batch_size * config.accumulation * world_size / config.reference_batch


def build_optimizer(
    config: OptimConfig, model: nn.Module, scale: float = 1.0, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """The optimizer with weight decay exclusions and layer decay as the model declares them.

    On a CUDA `device`, optimizers that have a fused form use it unless optim.options say otherwise: it is the fastest,
    and skips a step without waiting for the device to say whether.

    Raises:
        ValueError: timm does not know the optimizer, or the optimizer does not know an option.
    """
    options = dict(config.options)
    if device is not None and device.type == "cuda" and config.name in _FUSED and options.get("foreach") is None:
        options.setdefault("fused", True)
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr * scale,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **options,
        )
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"optim.name {config.name} with options {config.options}: {error}") from error


def build_scheduler(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int, scale: float = 1.0
) -> tuple[Scheduler, int]:
    """The schedule, stepped per update, and the number of epochs (with the cooldown or cycles that options add).

    Raises:
        ValueError: an unknown or impossible option.
    """
    ours = {"optimizer", "sched", "num_epochs", "warmup_epochs", "warmup_lr", "min_lr", "step_on_epochs"}
    known = set(inspect.signature(create_scheduler_v2).parameters) - ours - {"updates_per_epoch", "patience_epochs"}
    for key in config.options:
        if key not in known:
            raise ValueError(f"schedule.options has the unknown key {key!r}; the keys are {', '.join(sorted(known))}")
    try:
        return create_scheduler_v2(
            optimizer,
            sched=config.name,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr * scale,
            min_lr=config.min_lr * scale,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **config.options,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"schedule.name {config.name} with options {config.options}: {error}") from error


def build_ema(config: OptimConfig, model: nn.Module) -> ModelEmaV3 | None:
    """The moving average of weights and buffers, or None."""
    if config.ema_decay is None:
        return None
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup)


def build_mixup(config: AugmentConfig, num_classes: int) -> Mixup | None:
    """Mixup and CutMix on whole batches, or None where both are off.

    Raises:
        ValueError: an unknown option.
    """
    if not (config.mixup > 0 or config.cutmix > 0 or config.mix_options.get("cutmix_minmax") is not None):
        return None
    known = ("prob", "switch_prob", "mode", "correct_lam", "cutmix_minmax")
    for key in config.mix_options:
        if key not in known:
            raise ValueError(f"augment.mix_options has the unknown key {key!r}; the keys are {', '.join(known)}")
    if config.mix_options.get("mode", "batch") not in ("batch", "pair", "elem"):
        raise ValueError(f"augment.mix_options mode is {config.mix_options['mode']!r}, but must be batch, pair or elem")
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
        **config.mix_options,
    )


def build_loss(config: AugmentConfig, loss: LossConfig, mixup: Mixup | None) -> nn.Module:
    """The loss of mixed, smoothed or plain labels; logits `(B, num_classes)`, a scalar mean."""
    if loss.name == "binary_cross_entropy":
        return BinaryCrossEntropy(smoothing=0.0 if mixup is not None else config.label_smoothing)
    if mixup is not None:
        return SoftTargetCrossEntropy()
    if config.label_smoothing > 0:
        return LabelSmoothingCrossEntropy(config.label_smoothing)
    return nn.CrossEntropyLoss()
