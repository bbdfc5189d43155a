"""A training run small enough for tests, and comparisons of run folders."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from striate.train.config import TrainConfig, parse_config
from striate.train.datasets import SUBSET
from striate.train.log import RunLog

# Every source of randomness is on: order, crops, policy, erasing, mixing, stochastic depth, dropout. Batch norm and
# the moving average bring buffers into the state. 90 images make 11 steps of 8, and 2 that are left over.
EVERYTHING = {
    "model.name": "test_efficientnet",
    "model.drop_rate": 0.1,
    "model.drop_path_rate": 0.2,
    "data.name": "npz",
    "data.image_size": 32,
    "data.batch_size": 8,
    "data.workers": 0,
    "augment.auto_augment": "rand-m9-mstd0.5-inc1",
    "augment.erasing": 0.25,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.label_smoothing": 0.1,
    "optim.clip_grad": 5.0,
    "optim.ema_decay": 0.95,
    "optim.ema_warmup": True,
    "schedule.epochs": 3,
    "schedule.warmup_epochs": 1,
    "run.device": "cpu",
    "run.log_steps": 4,
    "run.seed": 3,
}


def write_small_npz(path: Path, num_train: int = 90, num_test: int = 20) -> Path:
    """A few images of the embedded set in a file of their own."""
    with np.load(SUBSET) as arrays:
        few = {key: arrays[key][:num_train] for key in ("train_images", "train_labels")}
        few |= {key: arrays[key][:num_test] for key in ("test_images", "test_labels")}
        np.savez(path, classes=arrays["classes"], **few)
    return path


def arguments(root: Path, output: Path, **changes: Any) -> list[str]:
    """Command line of the small run; `changes` are keys with __ for the point."""
    keys = EVERYTHING | {"data.root": str(root), "run.output": str(output)}
    keys |= {key.replace("__", ".", 1): value for key, value in changes.items()}
    words = []
    for key, value in keys.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def small_config(root: Path, output: Path, **changes: Any) -> TrainConfig:
    """The small run as a configuration."""
    return parse_config(arguments(root, output, **changes))


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal right after `step`."""
    advance = RunLog.advance
    steps = iter(range(1, step + 1))

    def advance_and_kill(log: RunLog) -> None:
        advance(log)
        if next(steps, None) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunLog, "advance", advance_and_kill)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record_of(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without what depends on the time of day."""
    lines = [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_jsonl(folder / "log.jsonl")]
    state = torch.load(folder / "state.pt", weights_only=True)
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "log": lines,
        "state": {key: value for key, value in state.items() if key != "seconds"},
        "best": load_file(folder / "best.safetensors"),
        "last": load_file(folder / "last.safetensors"),
        "summary": {key: value for key, value in summary.items() if key != "seconds"},
    }


def first_difference(a: Any, b: Any, where: str = "") -> str | None:
    """The path to the first value in which two nested records differ in a bit, or None."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else where
    if type(a) is not type(b):
        return where
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where} keys"
        return next((d for key in a if (d := first_difference(a[key], b[key], f"{where}.{key}"))), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where} length"
        return next(
            (d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := first_difference(x, y, f"{where}.{i}"))),
            None,
        )
    return None if a == b else where
