"""Several processes, started by torchrun on a CPU: the numbers of one process, and runs that survive."""

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
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from striate.train.config import RunConfig
from striate.train.distributed import Processes
from striate.train.loop import Trainer, train
from striate.train.model import load_trained
from train_helpers import arguments, first_difference, read_jsonl, record_of, small_config, write_small_npz

REPOSITORY = Path(__file__).resolve().parent.parent
EXACT = 1e-10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 images to evaluate on: the second process gets one less."""
    return write_small_npz(tmp_path_factory.mktemp("images") / "small.npz", num_test=19)


def torchrun(words: list[str], restarts: int = 0) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.2"]
    return subprocess.Popen(
        [*launcher, *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out + error


@pytest.fixture(scope="module")
def results(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first step and an evaluation in float64: 2 processes x 4 images, and 1 process x 2 passes of 4."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(REPOSITORY / "tests" / "ranks.py")
    two = torchrun([script, str(folder / "two.pt"), str(images), str(folder / "two"), "4", "1", "ddp", "fsdp"])
    code, said = finish(two)
    assert code == 0, said
    one = [sys.executable, script, str(folder / "one.pt"), str(images), str(folder / "one"), "4", "2", "ddp"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run(one, cwd=REPOSITORY, env=environment, check=True, timeout=300, capture_output=True)
    found = torch.load(folder / "two.pt", weights_only=True)
    return {"one": torch.load(folder / "one.pt", weights_only=True)["ddp"], **found}


class TestNumbers:
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
    @pytest.mark.parametrize("what", ["gradients", "weights"])
    def test_gradients_and_weights(self, results: dict[str, Any], strategy: str, what: str) -> None:
        """Weights after a step of AdamW: its division makes more of a difference of tiny gradients."""
        one, two = results["one"][what], results[strategy][what]
        assert results[strategy]["sharded"] == (strategy == "fsdp")
        assert one.keys() == two.keys()
        largest = max(value.abs().max().item() for value in one.values())
        assert max((one[name] - two[name]).abs().max().item() for name in one) < EXACT * largest

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
    def test_losses_and_counts(self, results: dict[str, Any], strategy: str) -> None:
        one, two = results["one"], results[strategy]
        assert two["loss"] == pytest.approx(one["loss"], rel=EXACT)
        assert two["counts"] == one["counts"]
        assert two["counts"][2] == two["predictions"] == 19
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=EXACT)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, said = finish(torchrun(["-m", "striate.train", *words_of(images, folder)]))
    assert code == 0, said
    assert said.count("best top-1") == 1, "only the first process talks"
    return record_of(folder)


class TestSurvival:
    def test_one_asked_to_stop_and_one_killed(self, images: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
        """SIGUSR1 to the second process stops both at the same step; killing it later costs a restart and no bit."""
        folder = tmp_path / "run"
        words = ["-m", "striate.train", *words_of(images, folder)]
        first = torchrun(words)
        signal_rank(first, 1, signal.SIGUSR1, folder, after_step=4)
        code, said = finish(first)
        assert code != 0
        assert "stopped by SIGUSR1 after step" in said
        assert "exitcode  : 75" in said, said
        step = torch.load(folder / "state.pt", weights_only=True)["step"]
        assert 4 <= step < 33
        second = torchrun(words, restarts=1)
        signal_rank(second, 1, signal.SIGKILL, folder, after_step=max(12, step + 4))
        code, said = finish(second)
        assert code == 0, said
        assert f"resuming after step {step} of 33" in said
        assert said.count("resuming after step") == 2
        lines = [(line["type"], line["step"]) for line in read_jsonl(folder / "log.jsonl")]
        assert len(lines) == len(set(lines))
        assert first_difference(record_of(folder), undisturbed) is None

    def test_without_restarts_a_death_ends_the_job(self, images: Path, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        job = torchrun(["-m", "striate.train", *words_of(images, folder, schedule__epochs=50)])
        signal_rank(job, 0, signal.SIGKILL, folder, after_step=4)
        killed = time.monotonic()
        code, _ = finish(job, timeout=60)
        assert code != 0
        assert time.monotonic() - killed < 60

    def test_other_numbers_of_processes_are_refused_unless_allowed(
        self, images: Path, tmp_path: Path, undisturbed: dict[str, Any]
    ) -> None:
        folder = tmp_path / "run"
        train(small_config(images, folder, data__batch_size=4, schedule__epochs=2))
        state = torch.load(folder / "state.pt", weights_only=True)
        assert state["images_per_step"] == 4
        torch.save(state | {"images_per_step": 8}, folder / "state.pt")
        (folder / "summary.json").unlink()
        changes = {"data__batch_size": 4, "schedule__epochs": 2}
        with pytest.raises(ValueError, match=r"a step had 8 images and would have 4 with 1 processes; start as many"):
            train(small_config(images, folder, **changes))
        train(small_config(images, folder, **changes, run__allow_config_change=True))


class TestShards:
    """FSDP2: the state is in the shards of torch.distributed.checkpoint."""

    def test_stopped_resumed_and_converted(self, images: Path, tmp_path: Path) -> None:
        changes = {"model__name": "test_vit", "model__options": {"img_size": 32}, "run__parallel": "fsdp"}
        changes |= {"schedule__epochs": 2, "data__batch_size": 10, "run__log_steps": 1}
        whole, folder = tmp_path / "whole", tmp_path / "run"
        for words in (words_of(images, whole, **changes), words_of(images, folder, **changes)):
            job = torchrun(["-m", "striate.train", *words])
            if str(folder) in words:
                signal_rank(job, 0, signal.SIGTERM, folder, after_step=2)
            code, said = finish(job)
            assert (code == 0) == (str(whole) in words), said
        stopped = torch.load(folder / "state.pt", weights_only=True)
        assert stopped["shards"] == f"shards-{stopped['step']}"
        code, said = finish(torchrun(["-m", "striate.train", *words_of(images, folder, **changes)]))
        assert code == 0, said
        assert [path.name for path in folder.glob("shards-*")] == ["shards-8"]
        for name in ("last", "best"):
            weights = [load_file(run / f"{name}.safetensors") for run in (whole, folder)]
            assert first_difference(*weights) is None
        dcp_to_torch_save(folder / "shards-8", tmp_path / "one.pt")
        shards = torch.load(tmp_path / "one.pt", weights_only=True)
        assert first_difference(shards["ema"], load_file(folder / "last.safetensors")) is None
        assert load_trained(folder, "last").state_dict().keys() == shards["model"].keys()
        with pytest.raises(ValueError, match=r"was saved in shards, which this run does not do"):
            train(small_config(images, folder, **changes, optim__lr=1e-4, run__allow_config_change=True))


def words_of(images: Path, folder: Path, **changes: Any) -> list[str]:
    """Like the small run, with half the images per process, so that two make the same steps."""
    changes = {"data__batch_size": 4, "run__checkpoint_steps": 5, "run__log_steps": 2, **changes}
    return arguments(images, folder, **changes)


def signal_rank(job: subprocess.Popen[str], rank: int, number: int, folder: Path, after_step: int) -> None:
    """Send a signal to one process of a job once its log has a step."""
    deadline = time.monotonic() + 200
    while not any(step >= after_step for step in steps_of(folder / "log.jsonl")):
        assert job.poll() is None, finish(job)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(next(pid for pid in children(job.pid) if f"RANK={rank}".encode() in environment_of(pid)), number)


def steps_of(log: Path) -> list[int]:
    if not log.is_file():
        return []
    return [json.loads(line)["step"] for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def children(pid: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == pid:
                yield int(entry.name)


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_a_numbered_device_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"run.device cuda:1 for 2 processes; give cuda"):
        Processes("cuda:1")


def test_one_process_needs_no_group(images: Path, tmp_path: Path) -> None:
    assert RunConfig().parallel == "ddp"
    with Trainer(small_config(images, tmp_path / "run", run__parallel="fsdp")) as trainer:
        assert not trainer.replica.sharded
        assert trainer.replica.forward is trainer.model
        assert not torch.distributed.is_initialized()
