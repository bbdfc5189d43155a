"""What a run says it will do, and what its loop costs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from striate.train import cli
from striate.train.data import train_loader
from striate.train.loop import Trainer
from striate.train.plan import describe_plan
from train_helpers import arguments, small_config, write_small_npz


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_npz(tmp_path_factory.mktemp("images") / "small.npz")


VIT = {"model__name": "test_vit", "model__options": {"img_size": 32}}


def test_the_plan_is_what_the_run_does(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    changes = {"optim__accumulation": 2, "data__batch_size": 4, "schedule__image_sizes": {"2": 48}}
    changes |= {"model__freeze": ["conv_stem"], "run__eval_epochs": 2}
    assert cli.main(["train", "--dry-run", *arguments(images, folder, **changes)]) == 0
    assert not folder.exists()
    said = capsys.readouterr().out
    assert "90 to train on, 20 to evaluate on, 10 classes, 32 pixels from epoch 0 on, 48 pixels from epoch 2 on" in said
    assert "8 images: 1 processes x 2 passes x 4, float32 on cpu" in said
    assert "3 epochs x 11 steps = 33 steps, 264 images, 2 evaluations" in said
    with Trainer(small_config(images, folder, **changes)) as trainer:
        frozen = trainer.model.conv_stem.weight.numel()
        assert f"{frozen / 1e6:.2f} M frozen" in said
        assert trainer.fit()["steps"] == 33
    rates = [line["lr"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "lr" in line]
    first, most, last = map(float, re.findall(r"(\S+) at first, (\S+) at most, (\S+) in the last", said)[0])
    assert first == pytest.approx(1e-6)
    assert most >= max(rates) * 0.99
    assert last == pytest.approx(rates[-1], rel=1e-2)


def test_the_plot_follows_the_schedule(images: Path, tmp_path: Path) -> None:
    """Columns of the last line are filled; the first line has the peak, from the last part of the warm-up on."""
    changes = {**VIT, "schedule__epochs": 3, "schedule__warmup_epochs": 1, "schedule__min_lr": 5e-4}
    rows = describe_plan(small_config(images, tmp_path / "run", **changes)).splitlines()[-7:-1]
    top, bottom = rows[0][12:], rows[-1][12:]
    assert bottom[5:] == "█" * 55
    assert 15 <= next(column for column, bar in enumerate(top) if bar != " ") <= 20
    assert top[-1] == " "


def test_memory_grows_with_the_batch_and_with_what_is_kept(images: Path, tmp_path: Path) -> None:
    def kept(**changes: Any) -> tuple[float, float]:
        said = describe_plan(small_config(images, tmp_path / "run", **VIT, **changes))
        fixed, passing = re.findall(r"(\d+) MiB for .*?(\d+) MiB kept", said)[0]
        return float(fixed), float(passing)

    fixed, passing = kept(data__batch_size=64)
    assert kept(data__batch_size=32)[1] == pytest.approx(passing / 2, abs=1)
    assert kept(data__batch_size=64, model__grad_checkpointing=True)[1] < 0.7 * passing
    with Trainer(small_config(images, tmp_path / "run", **VIT), begin=False) as trainer:
        weights = sum(p.numel() * 4 for p in trainer.model.parameters())
    assert fixed == pytest.approx(5 * weights / 2**20, abs=1), "weights, average, gradient and two moments"


def test_the_loop_waits_for_no_number_between_reports(images: Path, tmp_path: Path) -> None:
    """With an optimizer that takes the verdict on a step as a tensor; the plain one also reads its own counters."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            waits[0] += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    for options, waits_at_all in (({"fused": True}, False), ({}, True)):
        changes = {**VIT, "optim__options": options, "run__log_steps": 100, "optim__ema_decay": None}
        with Trainer(small_config(images, tmp_path / str(waits_at_all), **changes, optim__ema_warmup=False)) as trainer:
            batches = train_loader(trainer.train_images, trainer._order(0, 3), 0, trainer.device)
            trainer.advance(batches)
            ready = iter(list(batches))
            waits = [0]
            with Waits():
                trainer.advance(ready)
            assert (waits[0] > 0) == waits_at_all


def test_the_cost_of_the_loop_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["benchmark", "test_vit", "--loop", "--batch", "2", "--size", "160", "--rounds", "4", "--json"]
    assert cli.main([*words, "--output", str(tmp_path / "loop.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "loop.json").read_text())
    assert report["steps"] == 4
    assert report["bare_seconds"] > 0
    assert report["ratio"] > 0
    with pytest.raises(SystemExit):
        cli.main([*words, "--against", "test_vit2"])
