"""`striate benchmark MODEL --loop`: what the training loop costs beyond the forward, backward and optimizer it runs."""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

from torch.nn import functional as F
from tqdm import tqdm

from .config import DataConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig, TrainConfig
from .data import Batch
from .loop import Trainer
from .measure import cpu_threads, environment, seconds_per_call
from .optim import build_optimizer

WARM_UP = 3


def measure_overhead(
    model: str, batch: int, size: int, steps: int = 200, threads: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Alternate steps of the loop, reports included, with bare ones of a copy of the model on the same batch.

    Returns `ratio` (median of the loop's time over that of the bare step beside it) and both times in seconds.
    Loading images is left out: it happens in other processes.

    Raises:
        ValueError: a model or device that cannot be had.
    """
    config = TrainConfig(
        model=ModelConfig(name=model),
        data=DataConfig(name="fashion-mnist-subset", image_size=size, batch_size=batch, workers=0),
        optim=OptimConfig(lr=1e-6),
        schedule=ScheduleConfig(epochs=1000),
        run=RunConfig(device=device),
    )
    with cpu_threads(threads), Trainer(config, begin=False) as trainer:
        images = next(trainer.batches(0, 1))
        bare_step, batches = _bare_step(trainer, images), itertools.repeat(images)
        loop_times, bare_times = [], []
        for step in tqdm(range(WARM_UP + steps), "steps", file=sys.stderr, disable=None):
            loop_times.append(seconds_per_call(lambda: trainer.advance(batches), 1, trainer.device))
            bare_times.append(seconds_per_call(bare_step, 1, trainer.device))
            if step == WARM_UP - 1:
                loop_times, bare_times = [], []
        found = environment(str(trainer.device))
    return {
        "model": model,
        "batch": batch,
        "size": size,
        "steps": steps,
        "loop_seconds": statistics.median(loop_times),
        "bare_seconds": statistics.median(bare_times),
        "ratio": statistics.median(a / b for a, b in zip(loop_times, bare_times, strict=True)),
        "environment": found,
    }


def _bare_step(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    """A step without anything around it, on a copy of the model."""
    model = copy.deepcopy(trainer.model)
    optimizer = build_optimizer(trainer.config.optim, model, device=trainer.device)

    def step() -> None:
        loss = F.cross_entropy(model(batch.images.to(trainer.device)), batch.labels.to(trainer.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def format_overhead(report: dict[str, Any]) -> str:
    """The report in one line of text."""
    return (
        f"{report['model']}, {report['batch']} x {report['size']} x {report['size']}: "
        f"{1e3 * report['loop_seconds']:.1f} ms a step in the loop, {1e3 * report['bare_seconds']:.1f} ms bare, "
        f"median of ratios {report['ratio']:.3f} over {report['steps']} steps"
    )
