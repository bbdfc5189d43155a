"""`striate train --dry-run`: what a run would do, how much memory it takes and the learning rate on the way."""

from __future__ import annotations

from collections.abc import Sequence

from .config import TrainConfig
from .data import train_loader
from .loop import Trainer
from .measure import saved_bytes
from .model import count_parameters

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT = 60, 6


def describe_plan(config: TrainConfig) -> str:
    """Build a run without touching its folder, do one forward pass of two of its images, and describe it in text.

    Raises:
        ValueError, OSError: the configuration or the data does not allow the run.
    """
    with Trainer(config, begin=False) as trainer:
        return "\n".join((*_work(trainer), *_memory(trainer), *_learning_rates(trainer)))


def _work(trainer: Trainer) -> list[str]:
    config = trainer.config
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    frozen = count_parameters(trainer.model) - trained
    images = trainer.images_per_step
    sizes = {0: trainer.preprocess["input_size"][1], **config.schedule.image_sizes}
    steps = trainer.total_steps
    evaluations = -(-trainer.epochs // config.run.eval_epochs)
    return [
        f"model       {config.model.name}, {trained / 1e6:.2f} M parameters"
        + (f" and {frozen / 1e6:.2f} M frozen" if frozen else ""),
        f"images      {len(trainer.train_images)} to train on, {len(trainer.eval_images)} to evaluate on, "
        f"{trainer.num_classes} classes, "
        + ", ".join(f"{side} pixels from epoch {epoch} on" for epoch, side in sorted(sizes.items())),
        f"step        {images} images: {trainer.processes.size} processes x {config.optim.accumulation} passes x "
        f"{config.data.batch_size}, {config.run.precision} on {trainer.device}",
        f"run         {trainer.epochs} epochs x {trainer.steps_per_epoch} steps = {steps} steps, "
        f"{steps * images} images, {evaluations} evaluations",
    ]


def _memory(trainer: Trainer) -> list[str]:
    """Of each process: weights, gradients, optimizer and moving average, and what a pass keeps for its backward."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    shards = trainer.processes.size if trainer.replica.sharded else 1
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / shards
    trained = sum(p.numel() * p.element_size() for p in parameters) / shards
    moments = 2 if "adam" in trainer.config.optim.name or "lamb" in trainer.config.optim.name else 1
    fixed = weights * (1 if trainer.ema is None else 2) + trained * (1 + moments)
    two = _kept_by_a_pass(trainer, 2)
    activations = two / 2 * trainer.config.data.batch_size
    return [
        f"memory      about {_size(fixed + activations)} per process: {_size(fixed)} for weights, gradients, optimizer"
        f"{'' if trainer.ema is None else ', moving average'}; {_size(activations)} kept for the backward pass"
    ]


def _kept_by_a_pass(trainer: Trainer, images: int) -> int:
    """Bytes of the tensors that a forward pass of so many images saves, parameters left out."""
    order = trainer._order(0, 1)
    order.batch_size = images
    batch = next(train_loader(trainer.train_images, order, 0, trainer.device))
    return saved_bytes(lambda: trainer._loss(batch, 0, 0), skip=list(trainer.model.parameters()))


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _learning_rates(trainer: Trainer) -> list[str]:
    """The largest learning rate of all groups at evenly spaced steps, as bars."""
    total = trainer.total_steps
    steps = [round(column * (total - 1) / (_WIDTH - 1)) for column in range(_WIDTH)]
    rates = []
    for step in steps:
        trainer.scheduler.step_update(step)
        rates.append(max(group["lr"] for group in trainer.optimizer.param_groups))
    head = f"lr          {rates[0]:.2e} at first, {max(rates):.2e} at most, {rates[-1]:.2e} in the last step"
    return [head, *(f"            {row}" for row in _plot(rates)), f"            step 0{total!s:>{_WIDTH - 6}}"]


def _plot(values: Sequence[float]) -> list[str]:
    """Bars of up to `_HEIGHT` lines, the largest at the top."""
    eighths = [round(value / (max(values) or 1) * _HEIGHT * 8) for value in values]
    return ["".join(_BARS[min(8, max(0, height - 8 * row))] for height in eighths) for row in reversed(range(_HEIGHT))]
