"""A run that is stopped and started again ends with the same bits as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from striate.train import loop
from striate.train.evaluate import EvalResult
from striate.train.loop import RunStoppedError, Trainer, train
from striate.train.model import read_metadata
from train_helpers import arguments, first_difference, read_jsonl, record_of, small_config, stop_after, write_small_npz

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in another order have other bits; child processes get one thread as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_npz(tmp_path_factory.mktemp("images") / "small.npz")


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(small_config(images, folder))
    torch.set_num_threads(threads)
    return record_of(folder)


def command(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "striate.train", *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "log.jsonl").is_file() or not any(
        line["step"] >= step for line in read_whole_lines(folder / "log.jsonl")
    ):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_the_run_is_reproducible_with_other_workers(images: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    train(small_config(images, tmp_path / "run", data__workers=2))
    assert first_difference(record_of(tmp_path / "run"), undisturbed) is None


def test_another_seed_gives_another_run(images: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    train(small_config(images, tmp_path / "run", run__seed=4))
    assert first_difference(record_of(tmp_path / "run"), undisturbed) is not None


@pytest.mark.parametrize(
    ("step", "workers"),
    [
        pytest.param(1, 2, id="before the first log line"),
        pytest.param(6, 0, id="inside a log interval of the first epoch"),
        pytest.param(11, 0, id="at the end of an epoch, before its evaluation"),
        pytest.param(27, 2, id="in the last epoch"),
        pytest.param(33, 0, id="after the last step"),
    ],
)
def test_stopped_by_a_signal(
    images: Path,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    workers: int,
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(patched, step)
        with pytest.raises(RunStoppedError, match=f"SIGTERM after step {step};"):
            train(small_config(images, folder))
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == step
    assert not (folder / "summary.json").exists()
    train(small_config(images, folder, data__workers=workers))
    assert first_difference(record_of(folder), undisturbed) is None


def test_stopped_twice_and_with_accumulation(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"data__batch_size": 4, "optim__accumulation": 2, "augment__repeats": 2, "augment__mix_off_epoch": 2}
    train(small_config(images, tmp_path / "whole", **changes))
    for step in (9, 16):
        with monkeypatch.context() as patched:
            stop_after(patched, step if step == 9 else step - 9)
            with pytest.raises(RunStoppedError, match=f"after step {step};"):
                train(small_config(images, tmp_path / "run", **changes))
    train(small_config(images, tmp_path / "run", **changes))
    assert first_difference(record_of(tmp_path / "run"), record_of(tmp_path / "whole")) is None


def test_routed_attention(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "model__name": "biformer_nano",
        "model__drop_rate": 0.0,
        "schedule__epochs": 2,
    }
    train(small_config(images, tmp_path / "whole", **changes))
    with monkeypatch.context() as patched:
        stop_after(patched, 14)
        with pytest.raises(RunStoppedError, match="after step 14;"):
            train(small_config(images, tmp_path / "run", **changes))
    train(small_config(images, tmp_path / "run", **changes))
    assert first_difference(record_of(tmp_path / "run"), record_of(tmp_path / "whole")) is None


def test_sigterm_to_the_whole_process_group(images: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """As a job scheduler sends it: loader processes get it too."""
    folder = tmp_path / "run"
    process = command(arguments(images, folder, data__workers=2))
    wait_for_step(folder, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert "stopped by SIGTERM after step" in said
    assert 4 <= torch.load(folder / "state.pt", weights_only=True)["step"] < 33
    train(small_config(images, folder))
    assert first_difference(record_of(folder), undisturbed) is None


def test_killed_without_warning(images: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """SIGKILL: the run goes on from the last periodic checkpoint, and the log has no step twice."""
    folder = tmp_path / "run"
    words = arguments(images, folder, run__checkpoint_steps=5)
    process = command(words)
    wait_for_step(folder, 8, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    saved = torch.load(folder / "state.pt", weights_only=True)["step"]
    assert saved >= 5
    (folder / "log.jsonl").open("a").write('{"type": "train", "st')
    again = command(words)
    _, said = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert f"resuming after step {saved} of 33" in said
    lines = [(line["type"], line["step"]) for line in read_jsonl(folder / "log.jsonl")]
    assert len(lines) == len(set(lines))
    assert first_difference(record_of(folder), undisturbed) is None


def test_a_finished_run_is_left_alone(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = train(small_config(images, folder, schedule__epochs=2))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert train(small_config(images, folder, schedule__epochs=2, data__workers=1)) == summary
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_changed_configuration_is_refused_unless_allowed(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(small_config(images, folder, schedule__epochs=2))
    before = (folder / "config.yaml").read_text()
    changes = {"schedule__epochs": 3, "optim__lr": 2e-3}
    with pytest.raises(ValueError, match=r"optim.lr: 0.001 -> 0.002; schedule.epochs: 2 -> 3.*allow_config_change"):
        train(small_config(images, folder, **changes))
    assert (folder / "config.yaml").read_text() == before
    summary = train(small_config(images, folder, **changes, run__allow_config_change=True))
    assert summary["steps"] == 33
    assert "epochs: 3" in (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match="past the 22 of this configuration"):
        train(small_config(images, folder, schedule__epochs=2, optim__lr=2e-3, run__allow_config_change=True))


def test_another_model_does_not_take_over_the_folder(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(small_config(images, folder, schedule__epochs=2))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for changes, message in (
        ({"model__name": "test_resnet"}, "does not fit this configuration"),
        ({"optim__ema_decay": None}, "ema_decay was switched"),
    ):
        allowed = {"schedule__epochs": 2, "run__allow_config_change": True, **changes}
        with pytest.raises(ValueError, match=message):
            train(small_config(images, folder, **allowed))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the run break off when `step` steps are done, without a chance to save."""
    train_step = Trainer._train_step

    def train_step_or_crash(trainer: Trainer, batches: Any) -> None:
        if trainer.step == step:
            raise KeyError("crash")
        train_step(trainer, batches)

    monkeypatch.setattr(Trainer, "_train_step", train_step_or_crash)


@pytest.mark.parametrize("step", [3, 11, 25])
def test_a_crash_goes_back_to_the_last_saved_state(
    images: Path, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before the first state, right after an evaluation, and after one with lines in the log that must go."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        crash_at(patched, step)
        with pytest.raises(KeyError, match="crash"):
            train(small_config(images, folder))
    assert (folder / "state.pt").exists() == (step >= 11)
    train(small_config(images, folder))
    assert first_difference(record_of(folder), undisturbed) is None


def test_the_best_of_before_is_remembered(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = iter([9, 3, 4])
    monkeypatch.setattr(loop, "evaluate", lambda *_: EvalResult(next(correct), 15, 20, 1.0, torch.zeros(20)))
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        crash_at(patched, 12)
        with pytest.raises(KeyError, match="crash"):
            train(small_config(images, folder))
    summary = train(small_config(images, folder))
    assert (summary["best"]["correct"], summary["best"]["step"]) == (9, 11)
    assert (summary["final"]["correct"], summary["final"]["step"]) == (4, 33)
    assert read_metadata(folder / "best.safetensors")["step"] == 11
