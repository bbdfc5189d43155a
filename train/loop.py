"""The training loop.

A run is a sequence of steps, numbered from 0 over all epochs, and everything that a step does follows from the
configuration, the number of the step and the state of model, optimizer and moving average. So a run that is stopped
anywhere and started again ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
import signal
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import timm
import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from .. import __version__
from ..hub.config import describe
from .augment import TransformSchedule, eval_transform
from .config import TrainConfig
from .data import (
    Batch,
    BrokenImage,
    BrokenImages,
    EvalImages,
    TrainImages,
    eval_loader,
    image_mode,
    open_sources,
    resolve_preprocess,
    train_loader,
)
from .distributed import Processes, Replica, load_shards, save_shards, shard, share_buffers, whole_state_dict
from .evaluate import EvalResult, autocast, check_labels, evaluate
from .guard import BadStep, Guard, first_bad_module
from .log import Clock, RunLog
from .model import adopt_preprocess, build_model, count_parameters, prepare
from .objective import Objective, WithMap, build_teacher
from .optim import build_ema, build_loss, build_mixup, build_optimizer, build_scheduler, lr_scale
from .sampler import TrainingOrder
from .seeding import derive_seed, seed_all
from .signals import StopSignals
from .state import RunFolder

_logger = logging.getLogger(__name__)


class RunStoppedError(Exception):
    """A signal asked for the end; the state has been saved and the same command goes on from there."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; the state is saved")
        self.signal_number = signal_number


class NonFiniteLossError(ArithmeticError):
    """More steps in a row than run.max_skipped had a loss or gradient that was infinite or not a number."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and return its summary.

    Raises:
        ValueError, OSError: the configuration, the data or the folder does not allow the run. Nothing was done then.
        RunStoppedError: SIGINT, SIGTERM or SIGUSR1 came; the state is saved.
        NonFiniteLossError: too many steps in a row were not finite; the last saved state is from before.
        BrokenDataError: too many training images cannot be read.
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

    Under torchrun every process has one; the first writes the folder, which all of them have to see. Without `begin`
    the folder is left alone, and the run cannot be carried out.

    Raises:
        ValueError, OSError: the configuration, the data or the folder does not allow the run.
    """

    def __init__(self, config: TrainConfig, begin: bool = True) -> None:
        if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("run.tensorboard needs the package tensorboard; install it or leave the key out")
        self.config = config
        self.processes = Processes(config.run.device)
        self.device = self.processes.device
        self.folder = RunFolder(config.run.output or "")
        try:
            self._build_model_and_data()
            self._build_optimization()
            self._start_from_nothing()
            if begin:
                self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _start_from_nothing(self) -> None:
        self.step = 0
        self.evaluated_step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.last_eval: dict[str, Any] | None = None
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=self.device)  # and how many losses it is of
        self.log = RunLog(None, 0, self.total_steps)
        self._clock = Clock(0)

    def _begin(self) -> None:
        if self.processes.is_first:
            self.folder.claim()
        self._restore()
        if self.processes.is_first:
            self.folder.begin(self.config)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.release()
        self.processes.leave()

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
        self.memory_format = torch.channels_last if config.run.channels_last else torch.contiguous_format
        self.model.to(self.device).to(memory_format=self.memory_format).train()
        prepare(self.model, config.model)
        mode = image_mode(in_chans)
        transforms = TransformSchedule(config.augment, self.preprocess, config.schedule.image_sizes)
        self.train_images = TrainImages(train_source.images, transforms, mode, config.run.seed)
        self.eval_images = EvalImages(eval_source.images, eval_transform(self.preprocess), mode)
        self.broken = BrokenImages(config.data.broken_limit, len(self.train_images))

    def _build_optimization(self) -> None:
        config = self.config
        scale = lr_scale(config.optim, config.data.batch_size, self.processes.size)
        self.steps_per_epoch = self._order(0, 0).steps_per_epoch
        self.ema = build_ema(config.optim, self.model)
        wrap = WithMap if config.loss.feature_weight else _itself
        self.replica = Replica(self.model, config.run, self.processes, wrap)
        self.model = self.replica.module
        if self.ema is not None and self.replica.sharded:
            self.ema.module = shard(self.ema.module, self.processes)
        self.optimizer = build_optimizer(config.optim, self.model, scale, self.device)
        self.scheduler, self.epochs = build_scheduler(config.schedule, self.optimizer, self.steps_per_epoch, scale)
        self.total_steps = self.epochs * self.steps_per_epoch
        self.mixup = build_mixup(config.augment, self.num_classes)
        labelled = build_loss(config.augment, config.loss, self.mixup)
        self.objective = Objective(config.loss, labelled, self.model)
        in_chans = config.model.in_chans
        self.teacher = build_teacher(config.loss, self.num_classes, in_chans, self.preprocess, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.run.precision == "float16")
        self.guard = Guard(config.run.max_skipped, self.processes, self.model)
        # an optimizer that takes the verdict as a tensor need not wait for it
        self._waits = self.scaler.is_enabled() or not getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def _order(self, start_step: int, stop_step: int, rank: int | None = None) -> TrainingOrder:
        config = self.config
        return TrainingOrder(
            len(self.train_images),
            config.data.batch_size,
            seed=config.run.seed,
            start_step=start_step,
            stop_step=stop_step,
            accumulation=config.optim.accumulation,
            repeats=config.augment.repeats,
            rank=self.processes.rank if rank is None else rank,
            world_size=self.processes.size,
        )

    def batches(self, start_step: int, stop_step: int, workers: int = 0) -> Iterator[Batch]:
        """What this process trains on in some steps, in their order."""
        return train_loader(self.train_images, self._order(start_step, stop_step), workers, self.device)

    def fit(self) -> dict[str, Any]:
        """Train and evaluate to the end, write summary.json and return it. See `train` for the errors."""
        config, start = self.config, self.step
        if start and self.processes.is_first:
            _logger.info("resuming %s at step %d of %d", self.folder.path, start, self.total_steps)
        started = time.monotonic() - self.seconds
        with StopSignals() as stop, self._open_log(start) as self.log:
            batches = self.batches(start, self.total_steps, config.data.workers)
            self._clock = Clock(start)
            while True:
                self.seconds = time.monotonic() - started
                asked = self.processes.agree(stop.number)
                if self._evaluation_is_due() and not asked:
                    self._evaluate(lambda: stop.number != 0)
                    asked = max(self.processes.gather(stop.number))
                    self._clock = Clock(self.step)
                if asked:
                    self._save()
                    raise RunStoppedError(asked, self.step)
                if self.step == self.total_steps:
                    break
                self.advance(batches)
                if config.run.checkpoint_steps and self.step % config.run.checkpoint_steps == 0:
                    self.seconds = time.monotonic() - started
                    self._save()
        summary = self._summary()
        if self.processes.is_first:
            self.folder.write_summary(summary)
        self.processes.wait()
        return summary

    def _open_log(self, start: int) -> RunLog:
        path = self.folder.log if self.processes.is_first else None
        return RunLog(path, start, self.total_steps, self.config.run.tensorboard)

    def advance(self, batches: Iterator[Batch]) -> None:
        """Take a step, and report it and those before it when it is time."""
        self._train_step(batches)
        self.log.advance()
        if self.step % self.config.run.log_steps == 0 or self.step == self.total_steps:
            self._report()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        passes = self.config.optim.accumulation
        # The schedule is a function of the step alone, so a resumed run needs no state of it.
        self.scheduler.step_update(self.step)
        self.guard.begin()
        for forward_pass in range(passes):
            batch = next(batches)
            for broken in self.broken.add(batch.broken):
                _logger.warning("%s cannot be read (%s); another image takes its place", broken.path, broken.reason)
            with self.replica.exchanging(gradients=forward_pass + 1 == passes):
                loss = self._loss(batch, self.step, forward_pass)
                self.scaler.scale(loss / passes).backward()
            self._accumulate(loss.detach())
        self.step += 1
        self._update()
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def _loss(self, batch: Batch, step: int, forward_pass: int) -> Tensor:
        """The loss of a batch in a pass of `step`, a function of them and of the weights."""
        config = self.config
        images = batch.images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        labels = batch.labels.to(self.device, non_blocking=True)
        seed_all(derive_seed(config.run.seed, "step", step, forward_pass, self.processes.rank))
        if self.mixup is not None:
            if config.augment.mix_off_epoch:
                self.mixup.mixup_enabled = step // self.steps_per_epoch < config.augment.mix_off_epoch
            images, labels = self.mixup(images, labels)
        with autocast(self.device, config.run.precision):
            outputs = self.replica.forward(images)
            hints = self.teacher(images) if self.teacher is not None else None
        return self.objective(outputs, labels, hints)

    def _accumulate(self, loss: Tensor) -> None:
        """Add to the running loss, if it is finite, without waiting for the device."""
        self.guard.watch(loss)
        counted = torch.stack((loss.double(), torch.ones_like(loss, dtype=torch.float64)))
        self.loss_sum += torch.where(torch.isfinite(loss), counted, 0)

    def _update(self) -> None:
        """One step of the optimizer, unless the loss or the gradient is not finite."""
        optim = self.config.optim
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        bad = self.guard.judge(self.step, norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not self._waits:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad  # type: ignore[attr-defined]
        if not self._waits or not bad:
            if optim.clip_grad is not None and optim.clip_mode == "norm":
                torch.nn.utils.clip_grads_with_norm_(parameters, optim.clip_grad, norm)
            elif optim.clip_grad is not None:
                dispatch_clip_grad(parameters, optim.clip_grad, optim.clip_mode)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.guard.restore_statistics(bad)

    def _report(self) -> None:
        self._report_faults()
        total, count = self.processes.sum(self.loss_sum).tolist()
        self.loss_sum.zero_()
        if not count:
            return
        images = (self.step - self._clock.step) * self.images_per_step
        self.log.train(
            {
                "step": self.step,
                "epoch": self._epoch(self.step),
                "loss": total / count,
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "images_per_second": images / self._clock.elapsed(),
            }
        )
        self._clock = Clock(self.step)

    def _report_faults(self) -> None:
        """Share what images are broken, log the steps that were skipped, and end the run after too many of either."""
        for images in self.processes.gather(self.broken.state()):
            self.broken.add(BrokenImage(*values) for values in images)
        skipped = self.guard.read()
        for bad in skipped:
            record = {"step": bad.step, "epoch": self._epoch(bad.step), "ranks": bad.ranks}
            self.log.skipped(record | {"images": self._images_of(bad.step - 1)})
        if self.guard.has_failed:
            self._fail(skipped[-1])

    def _images_of(self, step: int) -> list[list[int]]:
        """The images of a step, by rank, as their numbers in the data set."""
        ranks = range(self.processes.size)
        return [[key.image for batch in self._order(step, step + 1, rank) for key in batch] for rank in ranks]

    def _fail(self, bad: BadStep) -> None:
        """Save the run as it was before the last bad step, as a run folder of its own, and end."""
        self.step, dump = bad.step - 1, self.folder.path / "nonfinite"
        self.guard.in_a_row.fill_(self.guard.limit)
        if self.folder.path.name != dump.name:
            self._save(RunFolder(dump))
        where = self._first_bad_module()
        ranks = f"the loss of rank {bad.ranks}" if bad.ranks else "the gradient"
        raise NonFiniteLossError(
            f"{self.guard.limit + 1} steps in a row were not finite (run.max_skipped {self.guard.limit}); in the last, "
            f"step {bad.step} (epoch {self._epoch(bad.step)}), {ranks}"
            + (f", first the output of {where}" if where else "")
            + "; lower optim.lr, set optim.clip_grad or a longer warm-up. Nothing after the last good step has changed "
            f"a weight; `striate train --config {dump}/config.yaml --run.output {dump}` repeats that step"
        )

    def _first_bad_module(self) -> str | None:
        """Where the numbers of the next step stop being finite, on this process."""
        if self.replica.sharded:
            return None
        batch = next(self.batches(self.step, self.step + 1))
        seed_all(derive_seed(self.config.run.seed, "step", self.step, 0, self.processes.rank))
        return first_bad_module(self.model, batch.images.to(self.device))

    def _evaluation_is_due(self) -> bool:
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        at_end = self.step == self.total_steps
        return self.step > self.evaluated_step and rest == 0 and (at_end or epoch % self.config.run.eval_epochs == 0)

    def _evaluate(self, should_stop: Callable[[], bool]) -> None:
        self._report_faults()
        self._share_buffers()
        began = time.monotonic()
        result = self._results(should_stop)
        if result is None:
            return
        record = self._eval_record(result)
        is_best = self.best is None or record["correct"] > self.best["correct"]
        if is_best:
            self.best = record
            self._save_weights(self.folder, "best", record)
        self.last_eval = record
        self.evaluated_step = self.step
        self.log.evaluation(record, is_best)
        self.seconds += time.monotonic() - began
        self._save()

    def _results(self, should_stop: Callable[[], bool]) -> EvalResult | None:
        """The counts over all processes, or None if one of them was asked to stop. Predictions are this process's."""
        config, processes = self.config, self.processes
        loader = eval_loader(
            self.eval_images, config.data.batch_size, config.data.workers, self.device, processes.rank, processes.size
        )
        result = evaluate(self._deployed(), self._even(loader), self.device, config.run.precision, should_stop)
        if processes.size == 1:
            return result
        counts = processes.gather(None if result is None else _counts(result))
        if None in counts:
            return None
        correct, correct5, total, loss = map(sum, zip(*counts, strict=True))
        assert result is not None
        return EvalResult(correct, correct5, total, loss / total, result.predictions)

    def _even(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, and as many without images that all processes have the same number: shards need everyone."""
        images = labels = None
        for images, labels in loader:
            yield images, labels
        largest = -(-len(self.eval_images) // self.processes.size)
        missing = -(-largest // self.config.data.batch_size) - len(loader)
        for _ in range(missing if self.replica.sharded else 0):
            assert images is not None
            assert labels is not None
            yield images[:0], labels[:0]

    def _share_buffers(self) -> None:
        share_buffers(self.model, self.processes)
        if self.ema is not None:
            share_buffers(self.ema.module, self.processes)

    def _deployed(self) -> torch.nn.Module:
        """The model to evaluate and to export: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def _eval_record(self, result: EvalResult) -> dict[str, Any]:
        weights = "model" if self.ema is None else "ema"
        return {"step": self.step, "epoch": self._epoch(self.step), **result.record(), "weights": weights}

    def _epoch(self, step: int) -> int:
        """The number of the epoch that ends with or contains `step`, counted from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    @property
    def images_per_step(self) -> int:
        """Over all passes and processes."""
        return self.config.data.batch_size * self.config.optim.accumulation * self.processes.size

    def _metadata(self, record: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "striate": __version__,
            "config": self.description,
            "weights": "model" if self.ema is None else "ema",
            "step": self.step,
            "metrics": record,
        }

    def _save_weights(self, folder: RunFolder, which: str, record: dict[str, Any] | None) -> None:
        tensors = whole_state_dict(self._deployed())
        if self.processes.is_first:
            folder.save_weights(which, tensors, self._metadata(record))

    def _save(self, folder: RunFolder | None = None) -> None:
        """Save last.safetensors and the state that a resumed run starts from."""
        if folder is None:
            folder = self.folder
            self._report_faults()
        else:
            if self.processes.is_first:
                folder.path.mkdir(exist_ok=True)
                folder.begin(self.config)
            self.processes.wait()
        self._share_buffers()
        is_evaluated = self.last_eval is not None and self.last_eval["step"] == self.step
        self._save_weights(folder, "last", self.last_eval if is_evaluated else None)
        state = {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "images_per_step": self.images_per_step,
            "seconds": self.seconds,
            "best": self.best,
            "last_eval": self.last_eval,
            "loss_sums": self.processes.gather(self.loss_sum.tolist()),
            "skipped_in_a_row": int(self.guard.in_a_row),
            "broken": self.broken.state(),
            "scaler": self.scaler.state_dict(),
            "has_ema": self.ema is not None,
        }
        ema = None if self.ema is None else self.ema.module
        if self.replica.sharded:
            self._save_shards(folder, state, ema)
        elif self.processes.is_first:
            tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            folder.save_state(state | tensors | {"ema": None if ema is None else ema.state_dict()})
        self.processes.wait()

    def _save_shards(self, folder: RunFolder, state: dict[str, Any], ema: torch.nn.Module | None) -> None:
        path = folder.new_shards(self.step)
        save_shards(path, self.model, self.optimizer, ema)
        self.processes.wait()
        if self.processes.is_first:
            folder.save_state(state | {"shards": path.name})
            folder.drop_shards(but=path.name)

    def _restore(self) -> None:
        state = self.folder.load_state()
        steps = self.processes.gather(None if state is None else state["step"])
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes found states of steps {steps} in run.output {self.folder.path}; give a folder that all "
                "of them share"
            )
        if state is None:
            return
        self._check_state(state)
        ema = None if self.ema is None else self.ema.module
        try:
            if self.replica.sharded:
                load_shards(self.folder.path / state["shards"], self.model, self.optimizer, ema)
            else:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                if ema is not None:
                    ema.load_state_dict(state["ema"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.folder.state} does not fit this configuration: {reason}") from error
        self.step, self.evaluated_step = state["step"], state["evaluated_step"]
        self.seconds, self.best, self.last_eval = state["seconds"], state["best"], state["last_eval"]
        self.guard.in_a_row.fill_(state["skipped_in_a_row"])
        self.broken.load(state["broken"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        sums = torch.tensor(state["loss_sums"], dtype=torch.float64)
        mine = sums[self.processes.rank] if len(sums) == self.processes.size else sums.sum(0) / self.processes.size
        self.loss_sum.copy_(mine)

    def _check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that this run cannot go on from."""
        if state["step"] > self.total_steps:
            raise ValueError(
                f"{self.folder.path} is at step {state['step']}, past the {self.total_steps} of this "
                "configuration; raise schedule.epochs"
            )
        if state["has_ema"] != (self.ema is not None):
            raise ValueError("optim.ema_decay was switched on or off after the start of the run; use a new run.output")
        if ("shards" in state) != self.replica.sharded:
            raise ValueError(
                f"{self.folder.state} was saved {'in shards' if 'shards' in state else 'whole'}, which this run does "
                "not do; give the run.parallel of before, with several processes if it was fsdp"
            )
        images = self.images_per_step
        if state["images_per_step"] != images and not self.config.run.allow_config_change:
            raise ValueError(
                f"a step had {state['images_per_step']} images and would have {images} with {self.processes.size} "
                "processes; start as many as before, change optim.accumulation, or give --run.allow_config_change true"
            )

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
            "world_size": self.processes.size,
            "platform": platform.platform(),
            "python": platform.python_version(),
            "best": self.best,
            "final": self.last_eval,
            "versions": {"striate": __version__, "torch": torch.__version__, "timm": timm.__version__},
        }


def _itself(model: torch.nn.Module) -> torch.nn.Module:
    return model


def _counts(result: EvalResult) -> tuple[float, ...]:
    return result.correct, result.correct5, result.total, result.loss * result.total
