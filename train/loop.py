"""The training loop.

A run is a sequence of steps, numbered from 0 over all epochs, and everything that a step does follows from the
configuration, the number of the step and the state of model, optimizer and moving average. So a run that is stopped
anywhere and started again ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import timm
import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor

from .. import __version__
from ..hub.config import describe
from .augment import eval_transform, train_transform
from .config import TrainConfig
from .data import (
    EvalImages,
    TrainImages,
    eval_loader,
    image_mode,
    open_sources,
    resolve_preprocess,
    train_loader,
)
from .evaluate import EvalResult, autocast, check_labels, choose_device, evaluate
from .log import RunLog
from .model import adopt_preprocess, build_model, count_parameters
from .objective import Objective, build_teacher
from .optim import build_ema, build_loss, build_mixup, build_optimizer, build_scheduler, lr_scale
from .sampler import TrainingOrder
from .seeding import derive_seed, seed_all
from .state import RunFolder

_logger = logging.getLogger(__name__)


class RunStoppedError(Exception):
    """A signal asked for the end; the state has been saved and the same command goes on from there."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; the state is saved")
        self.signal_number = signal_number


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or not a number."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and return its summary.

    Raises:
        ValueError, OSError: the configuration, the data or the folder does not allow the run. Nothing was done then.
        RunStoppedError: SIGINT or SIGTERM came; the state is saved.
        NonFiniteLossError: the loss is no longer finite; the last saved state is from before.
    """
    summary = finished_summary(config)
    if summary is not None:
        return summary
    with Trainer(config) as trainer:
        return trainer.fit()


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """The summary of the run in run.output if it is finished, else None.

    Raises:
        ValueError: run.output is missing, or holds something else or a run of another configuration.
    """
    if not config.run.output:
        raise ValueError("run.output is missing; give the folder of the run, --run.output DIR")
    folder = RunFolder(config.run.output)
    folder.check(config)
    return folder.finished(config)


class Trainer:
    """A run that is ready to go: model, data, optimizer and the state to continue from. Use as a context manager.

    Raises:
        ValueError, OSError: the configuration, the data or the folder does not allow the run.
    """

    rank = 0
    world_size = 1

    def __init__(self, config: TrainConfig) -> None:
        if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("run.tensorboard needs the package tensorboard; install it or leave the key out")
        self.config = config
        self.device = choose_device(config.run.device)
        self._build_model_and_data()
        self._build_optimization()
        self.step = 0
        self.evaluated_step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.last_eval: dict[str, Any] | None = None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss_count = 0
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.folder = RunFolder(config.run.output or "")
        self.folder.claim()
        try:
            self._restore()
            self.folder.begin(config)
        except BaseException:
            self.folder.release()
            raise

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.release()

    def _build_model_and_data(self) -> None:
        config = self.config
        train_source, eval_source = open_sources(config.data, config.model.in_chans)
        num_classes = config.model.num_classes or train_source.num_classes
        if num_classes is None:
            raise ValueError(f"data.name {config.data.name} does not tell its classes; give --model.num_classes")
        for source, split in ((train_source, config.data.train_split), (eval_source, config.data.eval_split)):
            check_labels(source, num_classes, split)
        self.num_classes = num_classes
        self.classes = train_source.classes if train_source.num_classes == num_classes else None
        seed_all(derive_seed(config.run.seed, "model"))
        self.model = build_model(config.model, num_classes, config.model.in_chans)
        in_chans = config.model.in_chans
        self.preprocess = resolve_preprocess(config.data, in_chans, getattr(self.model, "pretrained_cfg", None) or {})
        adopt_preprocess(self.model, self.preprocess, num_classes, self.classes)
        self.description = describe(self.model)
        self.model.to(self.device).train()
        transform = train_transform(config.augment, self.preprocess)
        self.train_images = TrainImages(train_source.images, transform, image_mode(in_chans), config.run.seed)
        self.eval_images = EvalImages(eval_source.images, eval_transform(self.preprocess), image_mode(in_chans))

    def _build_optimization(self) -> None:
        config = self.config
        scale = lr_scale(config.optim, config.data.batch_size, self.world_size)
        self.steps_per_epoch = self._order(0, 0).steps_per_epoch
        self.optimizer = build_optimizer(config.optim, self.model, scale)
        self.scheduler, self.epochs = build_scheduler(config.schedule, self.optimizer, self.steps_per_epoch, scale)
        self.total_steps = self.epochs * self.steps_per_epoch
        self.ema = build_ema(config.optim, self.model)
        self.mixup = build_mixup(config.augment, self.num_classes)
        self.objective = Objective(config.loss, build_loss(config.augment, self.mixup), self.model)
        in_chans = config.model.in_chans
        self.teacher = build_teacher(config.loss, self.num_classes, in_chans, self.preprocess, self.device)

    def _order(self, start_step: int, stop_step: int) -> TrainingOrder:
        config = self.config
        return TrainingOrder(
            len(self.train_images),
            config.data.batch_size,
            seed=config.run.seed,
            start_step=start_step,
            stop_step=stop_step,
            accumulation=config.optim.accumulation,
            repeats=config.augment.repeats,
            rank=self.rank,
            world_size=self.world_size,
        )

    def fit(self) -> dict[str, Any]:
        """Train and evaluate to the end, write summary.json and return it. See `train` for the errors."""
        config, start = self.config, self.step
        if start:
            _logger.info("resuming %s at step %d of %d", self.folder.path, start, self.total_steps)
        started = time.monotonic() - self.seconds
        with (
            _StopSignals() as stop,
            RunLog(self.folder.log, start, self.total_steps, config.run.tensorboard) as log,
        ):
            batches = train_loader(
                self.train_images, self._order(start, self.total_steps), config.data.workers, self.device
            )
            clock = _Clock(start)
            while True:
                self.seconds = time.monotonic() - started
                if self._evaluation_is_due() and stop.signal_number is None:
                    self._evaluate(log, stop)
                    clock = _Clock(self.step)
                if stop.signal_number is not None:
                    self._save()
                    raise RunStoppedError(stop.signal_number, self.step)
                if self.step == self.total_steps:
                    break
                self._train_step(batches)
                log.advance()
                if self.step % config.run.log_steps == 0 or self.step == self.total_steps:
                    self._report(log, clock)
                    clock = _Clock(self.step)
                if config.run.checkpoint_steps and self.step % config.run.checkpoint_steps == 0:
                    self.seconds = time.monotonic() - started
                    self._save()
        summary = self._summary()
        self.folder.write_summary(summary)
        return summary

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        config, passes = self.config, self.config.optim.accumulation
        # The schedule is a function of the step alone, so a resumed run needs no state of it.
        self.scheduler.step_update(self.step)
        if self.mixup is not None and config.augment.mix_off_epoch:
            self.mixup.mixup_enabled = self.step // self.steps_per_epoch < config.augment.mix_off_epoch
        for forward_pass in range(passes):
            images, labels = next(batches)
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            seed_all(derive_seed(config.run.seed, "step", self.step, forward_pass, self.rank))
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            with autocast(self.device, config.run.precision):
                outputs = self.model(images)
                hints = self.teacher(images) if self.teacher is not None else None
            loss = self.objective(outputs, labels, hints) / passes
            loss.backward()
            self._accumulate(loss.detach())
        if config.optim.clip_grad is not None:
            dispatch_clip_grad(self.model.parameters(), config.optim.clip_grad, config.optim.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.loss_count += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def _accumulate(self, loss: Tensor) -> None:
        """Add to the running loss and note the first step with a bad one, without waiting for the device."""
        self.loss_sum += loss
        is_first = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(is_first, self.step + 1)

    def _check_finite(self) -> None:
        step = int(self.first_bad_step)
        if step >= 0:
            raise NonFiniteLossError(
                f"the loss is not finite at step {step} (epoch {self._epoch(step)}); lower optim.lr, set "
                "optim.clip_grad or a longer warm-up. The last saved state is from before"
            )

    def _report(self, log: RunLog, clock: _Clock) -> None:
        self._check_finite()
        images = (self.step - clock.step) * self._images_per_step()
        log.train(
            {
                "step": self.step,
                "epoch": self._epoch(self.step),
                "loss": float(self.loss_sum) / self.loss_count,
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "images_per_second": images / clock.elapsed(),
            }
        )
        self.loss_sum.zero_()
        self.loss_count = 0

    def _evaluation_is_due(self) -> bool:
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        at_end = self.step == self.total_steps
        return self.step > self.evaluated_step and rest == 0 and (at_end or epoch % self.config.run.eval_epochs == 0)

    def _evaluate(self, log: RunLog, stop: _StopSignals) -> None:
        self._check_finite()
        config, began = self.config, time.monotonic()
        loader = eval_loader(self.eval_images, config.data.batch_size, config.data.workers, self.device)
        result = evaluate(
            self._deployed(), loader, self.device, config.run.precision, lambda: stop.signal_number is not None
        )
        if result is None:
            return
        record = self._eval_record(result)
        is_best = self.best is None or record["correct"] > self.best["correct"]
        if is_best:
            self.best = record
            self.folder.save_weights("best", self._deployed(), self._metadata(record))
        self.last_eval = record
        self.evaluated_step = self.step
        log.evaluation(record, is_best)
        self.seconds += time.monotonic() - began
        self._save()

    def _deployed(self) -> torch.nn.Module:
        """The model to evaluate and to export: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def _eval_record(self, result: EvalResult) -> dict[str, Any]:
        weights = "model" if self.ema is None else "ema"
        return {"step": self.step, "epoch": self._epoch(self.step), **result.record(), "weights": weights}

    def _epoch(self, step: int) -> int:
        """The number of the epoch that ends with or contains `step`, counted from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def _images_per_step(self) -> int:
        return self.config.data.batch_size * self.config.optim.accumulation * self.world_size

    def _metadata(self, record: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "striate": __version__,
            "config": self.description,
            "weights": "model" if self.ema is None else "ema",
            "step": self.step,
            "metrics": record,
        }

    def _save(self) -> None:
        """Save last.safetensors and the state that a resumed run starts from."""
        self._check_finite()
        is_evaluated = self.last_eval is not None and self.last_eval["step"] == self.step
        self.folder.save_weights("last", self._deployed(), self._metadata(self.last_eval if is_evaluated else None))
        self.folder.save_state(
            {
                "step": self.step,
                "evaluated_step": self.evaluated_step,
                "steps_per_epoch": self.steps_per_epoch,
                "seconds": self.seconds,
                "best": self.best,
                "last_eval": self.last_eval,
                "loss_sum": self.loss_sum,
                "loss_count": self.loss_count,
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def _restore(self) -> None:
        state = self.folder.load_state()
        if state is None:
            return
        if state["step"] > self.total_steps:
            raise ValueError(
                f"{self.folder.path} is at step {state['step']}, past the {self.total_steps} of this "
                "configuration; raise schedule.epochs"
            )
        if (state["ema"] is None) != (self.ema is None):
            raise ValueError("optim.ema_decay was switched on or off after the start of the run; use a new run.output")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.folder.state} does not fit this configuration: {reason}") from error
        self.step, self.evaluated_step = state["step"], state["evaluated_step"]
        self.seconds, self.best, self.last_eval = state["seconds"], state["best"], state["last_eval"]
        self.loss_sum.copy_(state["loss_sum"])
        self.loss_count = state["loss_count"]

    def _summary(self) -> dict[str, Any]:
        return {
            "model": self.config.model.name,
            "model_args": self.description["model_args"],
            "parameters": count_parameters(self.model),
            "data": self.config.data.name,
            "train_images": len(self.train_images),
            "eval_images": len(self.eval_images),
            "classes": self.classes,
            "epochs": self.epochs,
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "seed": self.config.run.seed,
            "device": str(self.device),
            "best": self.best,
            "final": self.last_eval,
            "versions": {"striate": __version__, "torch": torch.__version__, "timm": timm.__version__},
        }


class _Clock:
    """Measures the speed from `step` on."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._began = time.monotonic()

    def elapsed(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)


class _StopSignals:
    """Turns the first SIGINT or SIGTERM into `signal_number`; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        # Python lets only the main thread set handlers; in another one the caller decides about signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
