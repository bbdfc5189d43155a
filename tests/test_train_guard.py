"""Steps whose loss or gradient is not finite, and files that cannot be written."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from striate.hub.folders import write_whole
from striate.train.cli import main
from striate.train.loop import NonFiniteLossError, RunStoppedError, Trainer, train
from striate.train.state import RunFolder
from train_helpers import arguments, first_difference, read_jsonl, record_of, small_config, stop_after, write_small_npz

FUSED = {"optim__options": {"fused": True}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_npz(tmp_path_factory.mktemp("images") / "small.npz")


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float = math.nan) -> None:
    """Multiply the loss of some steps (numbered from 0) by `factor`."""
    loss_of = Trainer._loss

    def spoiled(trainer: Trainer, batch: Any, step: int, forward_pass: int) -> Tensor:
        loss = loss_of(trainer, batch, step, forward_pass)
        return loss * factor if step in steps else loss

    monkeypatch.setattr(Trainer, "_loss", spoiled)


def skipped_in(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(folder / "log.jsonl") if line["type"] == "skipped"]


@pytest.mark.parametrize(("changes", "factor"), [({}, math.nan), (FUSED, math.inf)], ids=["waits", "does-not-wait"])
def test_a_bad_step_changes_nothing_and_is_logged(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, changes: dict[str, Any]
) -> None:
    """Weights, optimizer and batch norms are those of before; the images of the step can be looked up."""
    spoil(monkeypatch, {4}, factor)
    states = {}
    update = Trainer._update

    def update_and_look(trainer: Trainer) -> None:
        update(trainer)
        if trainer.step in (4, 5, 6):
            state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()["state"]}
            states[trainer.step] = json.loads(json.dumps(state, default=lambda tensor: tensor.tolist()))

    monkeypatch.setattr(Trainer, "_update", update_and_look)
    with Trainer(small_config(images, tmp_path / "run", schedule__epochs=2, **changes)) as trainer:
        assert trainer._waits == (changes == {})
        trainer.fit()
        keys = [key.image for batch in trainer._order(4, 5) for key in batch]
    assert states[4] == states[5]
    assert states[5] != states[6]
    assert skipped_in(tmp_path / "run") == [{"type": "skipped", "step": 5, "epoch": 1, "ranks": [0], "images": [keys]}]
    assert all(math.isfinite(line["loss"]) for line in read_jsonl(tmp_path / "run" / "log.jsonl") if "loss" in line)


def test_a_gradient_that_is_not_finite(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite gradient of a finite loss: no rank's loss is to blame."""
    backward = Tensor.backward
    calls = iter(range(100))

    def spoiled(loss: Tensor) -> None:
        backward(loss)
        if next(calls) == 3:
            next(p for p in trainer.model.parameters() if p.grad is not None).grad.flatten()[0] = math.inf

    monkeypatch.setattr(Tensor, "backward", spoiled)
    with Trainer(small_config(images, tmp_path / "run", schedule__epochs=2)) as trainer:
        trainer.fit()
        assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert [(line["step"], line["ranks"]) for line in skipped_in(tmp_path / "run")] == [(4, [])]


@pytest.mark.parametrize("changes", [{}, FUSED], ids=["waits", "does-not-wait"])
def test_too_many_in_a_row_end_the_run_with_a_dump_that_repeats_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Two may be bad, three may not; four apart do no harm. The dump fails in the same step with the same words."""
    folder = tmp_path / "run"
    config = small_config(images, folder, run__max_skipped=2, run__checkpoint_steps=3, **changes)
    with monkeypatch.context() as patched:
        spoil(patched, {2, 4, 5, 13, 14, 15})
        with pytest.raises(NonFiniteLossError, match=r"3 steps in a row .*step 16 \(epoch 2\), the loss of rank \[0\]"):
            train(config)
        assert [line["step"] for line in skipped_in(folder)] == [3, 5, 6, 14, 15, 16]
        assert not (folder / "summary.json").exists()
        dump = small_config(images, folder / "nonfinite", run__max_skipped=2, run__checkpoint_steps=3, **changes)
        with pytest.raises(NonFiniteLossError, match=r"step 16 \(epoch 2\)"):
            train(dump)
    assert main(["train", "--config", str(folder / "nonfinite" / "config.yaml"), "--run.output", str(folder)]) == 0
    assert [line["step"] for line in skipped_in(folder)][:3] == [3, 5, 6], "resumed from step 12 or 15, now all good"


def test_the_count_survives_a_stop(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(images, tmp_path / "run", run__max_skipped=2)
    spoil(monkeypatch, {5, 6, 7})
    with monkeypatch.context() as patched:
        stop_after(patched, 7)
        with pytest.raises(RunStoppedError):
            train(config)
    with pytest.raises(NonFiniteLossError, match="step 8 "):
        train(config)


def test_the_first_module_with_bad_numbers_is_named(images: Path, tmp_path: Path) -> None:
    with Trainer(small_config(images, tmp_path / "run", run__max_skipped=0)) as trainer:
        trainer.model.blocks[1][0].conv_exp.weight.data[0, 0] = math.nan
        with pytest.raises(NonFiniteLossError, match=r"first the output of blocks\.1\.0\.conv_exp"):
            trainer.fit()
    dumped = torch.load(tmp_path / "run" / "nonfinite" / "state.pt", weights_only=True)["model"]
    assert {name for name, value in dumped.items() if not value.isfinite().all()} == {"blocks.1.0.conv_exp.weight"}


def test_half_precision_scales_the_loss_and_resumes(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """An overflow halves the scale, which is part of the state."""
    changes = {"run__precision": "float16", "schedule__epochs": 2}
    spoil(monkeypatch, {3}, math.inf)
    train(small_config(images, tmp_path / "whole", **changes))
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        with pytest.raises(RunStoppedError):
            train(small_config(images, tmp_path / "run", **changes))
    train(small_config(images, tmp_path / "run", **changes))
    assert first_difference(record_of(tmp_path / "run"), record_of(tmp_path / "whole")) is None
    skipped = skipped_in(tmp_path / "run")
    assert [line["ranks"] for line in skipped if line["step"] == 4] == [[0]]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["scaler"]["scale"] == 2.0 ** (16 - len(skipped))


class TestFiles:
    def test_a_failed_write_leaves_the_file_of_before(self, tmp_path: Path) -> None:
        target = tmp_path / "state.pt"
        target.write_text("whole")

        def write_half(path: Path) -> None:
            path.write_text("ha")
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match=r"state.pt could not be written \(No space left.*MB free\); the one before"):
            write_whole(target, write_half)
        assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
        assert target.read_text() == "whole"

    def test_a_full_disk_ends_the_run_with_one_line(self, images: Path, tmp_path: Path) -> None:
        """A limit on the size of files stands for the full disk: the state is bigger, the log is not."""
        code = (
            "import resource, signal, sys\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            "from striate.train.cli import main\n"
            "sys.exit(main(['train', *sys.argv[1:]]))"
        )
        words = arguments(images, tmp_path / "run", schedule__epochs=2)
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert "safetensors could not be written (File too large" in done.stderr.splitlines()[-1]
        assert not [path.name for path in (tmp_path / "run").iterdir() if path.suffix in (".tmp", ".pt")]

    def test_killed_while_a_state_is_written(self, images: Path, tmp_path: Path) -> None:
        """Half of a new state is on the disk beside the old one: the run goes on from the old one."""
        train(small_config(images, tmp_path / "whole", schedule__epochs=2))
        folder = tmp_path / "run"
        code = (
            "import os, signal, sys, torch\n"
            "from striate.train.cli import main\n"
            "save = torch.save\n"
            "def save_half(state, path):\n"
            "    save(state, path)\n"
            "    if state['step'] == 9:\n"
            "        os.truncate(path, 1000)\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "torch.save = save_half\n"
            "main(['train', *sys.argv[1:]])"
        )
        words = arguments(images, folder, schedule__epochs=2, run__checkpoint_steps=3)
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run([sys.executable, "-c", code, *words], env=environment, timeout=300)
        assert done.returncode == -signal.SIGKILL
        assert (folder / "state.pt.tmp").stat().st_size == 1000
        assert RunFolder(folder).load_state()["step"] == 6
        train(small_config(images, folder, schedule__epochs=2))
        assert first_difference(record_of(folder), record_of(tmp_path / "whole")) is None


class TestFreezing:
    def test_prefixes_and_patterns(self, images: Path, tmp_path: Path) -> None:
        """Frozen weights stay, and so do the statistics of their norms, whoever calls train()."""
        frozen = ["conv_stem", "bn1", "blocks.0", "*.bn3.*"]
        with Trainer(small_config(images, tmp_path / "run", schedule__epochs=2, model__freeze=frozen)) as trainer:
            before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            trainer.fit()
            after = trainer.model.state_dict()
        kept = {name for name, value in before.items() if torch.equal(value, after[name])}
        wanted = {name for name in before if name.startswith(("conv_stem", "bn1", "blocks.0.")) or ".bn3." in name}
        assert wanted
        assert kept == wanted

    @pytest.mark.parametrize(
        ("freeze", "message"), [(["stages.9"], "'stages.9', which is no parameter"), (["*"], "no parameter to train")]
    )
    def test_wrong_entries(self, images: Path, tmp_path: Path, freeze: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train(small_config(images, tmp_path / "run", model__freeze=freeze))
        assert not (tmp_path / "run").exists()


def test_sizes_by_epoch(images: Path, tmp_path: Path) -> None:
    """The first epoch at data.image_size, then as schedule.image_sizes says; evaluation stays."""
    seen = []
    config = small_config(images, tmp_path / "run", schedule__image_sizes={"1": 48, "2": 40})
    with Trainer(config) as trainer:
        trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
        trainer.ema.module.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
        trainer.fit()
    steps = [(32, 32)] * 11 + [(32, 32)] * 3 + [(48, 48)] * 11 + [(32, 32)] * 3 + [(40, 40)] * 11 + [(32, 32)] * 3
    assert seen == steps


def test_switches_that_change_no_numbers_much(images: Path, tmp_path: Path) -> None:
    """Recomputing, compiling and channels last are the same training up to rounding."""
    plain = {"model__name": "test_vit", "model__options": {"img_size": 32}, "schedule__epochs": 2}
    plain |= {"model__drop_rate": 0.0, "model__drop_path_rate": 0.0}
    train(small_config(images, tmp_path / "plain", **plain))
    changes = {"model__grad_checkpointing": True, "run__compile": "aot_eager", "run__channels_last": True}
    with Trainer(small_config(images, tmp_path / "run", **plain, **changes)) as trainer:
        assert trainer.model.grad_checkpointing
        assert trainer.model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
        trainer.fit()
        assert trainer.model._compiled_call_impl is not None
    first, second = (record_of(tmp_path / name)["state"]["model"] for name in ("plain", "run"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def test_binary_cross_entropy(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path / "run", loss__name="binary_cross_entropy", schedule__epochs=2)
    with Trainer(config) as trainer:
        logits, labels = torch.randn(4, 10), torch.rand(4, 10)
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        assert torch.allclose(trainer.objective.labelled(logits, labels), wanted)
        trainer.fit()


def test_sync_batchnorm_needs_cuda(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.sync_batchnorm needs CUDA, but run.device is cpu"):
        train(small_config(images, tmp_path / "run", run__sync_batchnorm=True))
