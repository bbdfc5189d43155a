"""What a run does and leaves behind."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from striate.hub.folders import write_whole
from striate.train.config import load_config
from striate.train.data import train_loader
from striate.train.evaluate import validate
from striate.train.log import read_log
from striate.train.loop import Trainer, train
from striate.train.model import load_trained, read_metadata
from striate.train.optim import build_mixup, build_optimizer, build_scheduler, lr_scale
from striate.train.state import RunFolder
from train_helpers import read_jsonl, small_config, write_small_npz

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {
    "model__drop_rate": 0.0,
    "model__drop_path_rate": 0.0,
    "augment__auto_augment": None,
    "augment__erasing": 0.0,
    "augment__mixup": 0.0,
    "augment__cutmix": 0.0,
    "augment__label_smoothing": 0.0,
    "augment__hflip": 0.0,
    "augment__scale": [1.0, 1.0],
    "optim__clip_grad": None,
    "optim__ema_decay": None,
    "optim__ema_warmup": False,
}
VIT = {"model__name": "test_vit", "model__options": {"img_size": 32}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_npz(tmp_path_factory.mktemp("images") / "small.npz")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 epochs with evaluations after 2 and 3."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(small_config(images, folder, run__eval_epochs=2, model__in_chans=1))
    return folder


class TestFolder:
    def test_files(self, run: Path) -> None:
        names = {path.name for path in run.iterdir()}
        wanted = {"config.yaml", "log.jsonl", "state.pt", "last.safetensors", "best.safetensors", "summary.json"}
        assert names == {*wanted, "run.lock"}
        assert all((run / name).stat().st_mode & 0o044 == 0o044 for name in wanted), "readable for others as umask says"

    def test_log(self, run: Path) -> None:
        lines = read_jsonl(run / "log.jsonl")
        steps = [line for line in lines if line["type"] == "train"]
        assert [line["step"] for line in steps] == [4, 8, 12, 16, 20, 24, 28, 32, 33]
        assert [line["epoch"] for line in steps] == [1, 1, 2, 2, 2, 3, 3, 3, 3]
        assert all(line.keys() == {"type", "step", "epoch", "loss", "lr", "images_per_second"} for line in steps)
        evaluations = [line for line in lines if line["type"] == "eval"]
        assert [(line["step"], line["epoch"]) for line in evaluations] == [(22, 2), (33, 3)]
        for line in evaluations:
            assert line["total"] == 20
            assert line["top1"] == 100 * line["correct"] / 20
            assert line["weights"] == "ema"

    def test_learning_rate_in_the_log(self, run: Path) -> None:
        """Linear from 1e-6 over the first of three epochs, then the cosine over all of them; step n used lr(n - 1)."""
        for line in read_jsonl(run / "log.jsonl"):
            if line["type"] == "train":
                t = line["step"] - 1
                warm = 1e-6 + t * (1e-3 - 1e-6) / 11
                assert line["lr"] == pytest.approx(warm if t < 11 else 0.5e-3 * (1 + math.cos(math.pi * t / 33)))

    def test_summary(self, run: Path) -> None:
        summary = json.loads((run / "summary.json").read_text())
        evaluations = [line for line in read_jsonl(run / "log.jsonl") if line["type"] == "eval"]
        assert summary["final"]["correct"] == evaluations[-1]["correct"]
        assert summary["best"]["correct"] == max(line["correct"] for line in evaluations)
        assert (summary["epochs"], summary["steps"]) == (3, 33)
        assert summary["model"] == "test_efficientnet"
        assert summary["model_args"]["num_classes"] == 10
        assert summary["seconds"] > 0
        assert summary["parameters"] == sum(p.numel() for p in load_trained(run).parameters())

    def test_config_is_complete_and_readable(self, run: Path, images: Path) -> None:
        assert load_config(run / "config.yaml") == small_config(images, run, run__eval_epochs=2, model__in_chans=1)

    @pytest.mark.parametrize("which", ["best", "last"])
    def test_exported_weights_give_the_recorded_result(self, run: Path, which: str) -> None:
        summary = json.loads((run / "summary.json").read_text())
        model = load_trained(run, which)
        result = validate(model, load_config(run / "config.yaml").data, CPU)
        wanted = summary["best" if which == "best" else "final"]
        assert (result.correct, result.total) == (wanted["correct"], wanted["total"])
        assert result.loss == pytest.approx(wanted["loss"], rel=1e-6)
        assert model.pretrained_cfg["input_size"] == (1, 32, 32)
        assert model.pretrained_cfg["label_names"][9] == "Ankle boot"
        with safetensors.safe_open(run / f"{which}.safetensors", "pt") as file:
            assert file.metadata()["format"] == "pt"
        assert read_metadata(run / f"{which}.safetensors")["metrics"]["correct"] == wanted["correct"]

    def test_weights_are_the_moving_average_or_the_model(self, run: Path, images: Path, tmp_path: Path) -> None:
        state = torch.load(run / "state.pt", weights_only=True)
        last = load_file(run / "last.safetensors")
        assert all(torch.equal(last[key], value) for key, value in state["ema"].items())
        assert any(not torch.equal(last[key], value) for key, value in state["model"].items())
        train(small_config(images, tmp_path / "plain", schedule__epochs=2, **PLAIN))
        state = torch.load(tmp_path / "plain" / "state.pt", weights_only=True)
        assert state["ema"] is None
        last = load_file(tmp_path / "plain" / "last.safetensors")
        assert all(torch.equal(last[key], value) for key, value in state["model"].items())

    def test_best_is_not_overwritten_by_a_worse_one(self, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
        from striate.train import loop
        from striate.train.evaluate import EvalResult

        correct = iter([7, 9, 9, 3])
        monkeypatch.setattr(loop, "evaluate", lambda *_: EvalResult(next(correct), 15, 20, 1.0, torch.zeros(20)))
        summary = train(small_config(images, tmp_path / "run", schedule__epochs=4, **PLAIN))
        assert (summary["best"]["correct"], summary["best"]["epoch"]) == (9, 2)
        assert (summary["final"]["correct"], summary["final"]["epoch"]) == (3, 4)
        assert read_metadata(tmp_path / "run" / "best.safetensors")["step"] == 22

    def test_no_weights_yet(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"best\.safetensors does not exist"):
            load_trained(tmp_path)

    def test_foreign_folder_is_refused_and_left_alone(self, images: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(ValueError, match=r"holds thesis\.tex but no config\.yaml"):
            train(small_config(images, tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
        with pytest.raises(ValueError, match="is a file"):
            train(small_config(images, tmp_path / "thesis.tex"))

    def test_a_second_process_is_refused(self, images: Path, tmp_path: Path) -> None:
        code = (
            "import sys; from striate.train.state import RunFolder\n"
            f"RunFolder({str(tmp_path / 'run')!r}).claim(); print('claimed', flush=True); sys.stdin.read()"
        )
        root = Path(__file__).resolve().parent.parent
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "claimed\n"
            with pytest.raises(ValueError, match="in use by another process"):
                train(small_config(images, tmp_path / "run"))
            other.communicate()
        train(small_config(images, tmp_path / "run", schedule__epochs=2, **PLAIN))

    def test_a_file_is_replaced_whole_or_not_at_all(self, tmp_path: Path) -> None:
        target = tmp_path / "file"
        write_whole(target, lambda path: path.write_text("old"))

        def fail(path: Path) -> None:
            path.write_text("ne")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write_whole(target, fail)
        assert target.read_text() == "old"
        write_whole(target, lambda path: path.write_text("new"))
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert target.read_text() == "new"

    def test_damaged_state_is_named(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.state.write_bytes(b"PK\x03\x04 half of a file")
        with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
            folder.load_state()
        torch.save({"format": 99}, folder.state)
        with pytest.raises(ValueError, match="format 2"):
            folder.load_state()

    def test_log_reader_leaves_out_a_torn_line(self, tmp_path: Path) -> None:
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
        assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


class TestSteps:
    def test_it_learns(self, images: Path, tmp_path: Path) -> None:
        summary = train(small_config(images, tmp_path / "run", schedule__epochs=12, **PLAIN, **VIT))
        losses = [line["loss"] for line in read_jsonl(tmp_path / "run" / "log.jsonl") if line["type"] == "train"]
        assert losses[0] > 1.8
        assert losses[-1] < 0.75 * losses[0]
        assert summary["best"]["top1"] >= 40, "chance is 10"

    def test_accumulation_is_one_larger_batch(self, images: Path, tmp_path: Path) -> None:
        changes = {**PLAIN, **VIT, "schedule__epochs": 2, "optim__name": "sgd", "optim__lr": 0.05}
        for name, batch, passes in (("whole", 8, 1), ("parts", 2, 4)):
            changes |= {"data__batch_size": batch, "optim__accumulation": passes}
            train(small_config(images, tmp_path / name, **changes))
        whole, parts = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
        for key, value in whole.items():
            assert torch.allclose(value, parts[key], rtol=1e-3, atol=1e-5), key
        logs = [read_jsonl(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
        for one, other in zip(*logs, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)

    def test_bfloat16_is_autocast(self, images: Path, tmp_path: Path) -> None:
        seen = set()
        with Trainer(small_config(images, tmp_path / "run", run__precision="bfloat16", schedule__epochs=2)) as trainer:
            head = trainer.model.get_classifier()
            head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
            trainer.fit()
            assert seen == {torch.bfloat16}
            assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}

    @pytest.mark.parametrize(("mode", "limit"), [("norm", 1e-3), ("value", 1e-5)])
    def test_clipping(self, images: Path, tmp_path: Path, mode: str, limit: float) -> None:
        """One step of plain SGD with lr 1 moves the weights by the clipped gradient."""
        changes = {**PLAIN, "optim__name": "sgd", "optim__options": {"momentum": 0.0, "nesterov": False}}
        changes |= {
            "optim__lr": 1.0,
            "optim__weight_decay": 0.0,
            "schedule__name": "step",
            "schedule__options": {"decay_rate": 1.0},
        }
        changes |= {"schedule__warmup_epochs": 0, "optim__clip_grad": limit, "optim__clip_mode": mode}
        with Trainer(small_config(images, tmp_path / "run", **changes)) as trainer:
            before = [p.detach().clone() for p in trainer.model.parameters()]
            trainer._train_step(train_loader(trainer.train_images, trainer._order(0, 1), 0, CPU))
            moved = torch.cat([(p - q).flatten() for p, q in zip(trainer.model.parameters(), before, strict=True)])
        size = moved.norm() if mode == "norm" else moved.abs().max()
        assert size.item() == pytest.approx(limit, rel=1e-2)

    def test_mixing_stops_after_its_epochs(self, images: Path, tmp_path: Path) -> None:
        config = small_config(images, tmp_path / "run", augment__mix_off_epoch=2, augment__mix_options={"prob": 1.0})
        mixed = []
        with Trainer(config) as trainer:
            trainer.objective.labelled.register_forward_hook(
                lambda module, inputs, output: mixed.append(bool((inputs[1].sort(1).values[:, -2] > 0.02).any()))
            )
            trainer.fit()
        assert sum(mixed[:22]) > 11, "now and then the share of the other image is next to nothing"
        assert not any(mixed[22:])

    def test_periodic_checkpoints(self, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
        saved = []
        save = RunFolder.save_state
        monkeypatch.setattr(
            RunFolder, "save_state", lambda self, state: (saved.append(state["step"]), save(self, state))
        )
        train(small_config(images, tmp_path / "run", run__checkpoint_steps=10, schedule__epochs=2))
        assert saved == [10, 11, 20, 22]

    def test_tensorboard(self, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        changes = {"schedule__epochs": 2, "run__tensorboard": True}
        train(small_config(images, tmp_path / "run", **changes))
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
        lines = read_jsonl(tmp_path / "run" / "log.jsonl")
        losses = [(line["step"], pytest.approx(line["loss"])) for line in lines if line["type"] == "train"]
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == losses
        assert len(events.Scalars("eval/top1")) == 2
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
        with pytest.raises(ValueError, match=r"run\.tensorboard needs the package"):
            train(small_config(images, tmp_path / "other", **changes))


class TestPreparation:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model__name": "swin_tinny"}, "no model 'swin_tinny'; did you mean swin_tiny"),
            ({"model__options": {"windows": 3}}, "windows"),
            ({"model__options": {"in_chans": 1}}, "model.options repeats 'in_chans'"),
            ({"model__num_classes": 5}, "split 'train' has 10 classes, the model 5"),
            ({"model__checkpoint_path": "/no/such.pth"}, "/no/such.pth does not exist"),
            ({"data__root": "/no/such.npz"}, "/no/such.npz"),
            ({"data__batch_size": 92}, "90 training images are fewer than one step"),
            ({"optim__name": "adamm"}, "optim.name adamm"),
            ({"optim__options": {"betta": 1}}, "betta"),
            ({"schedule__options": {"decay": 1}}, "schedule.options has the unknown key 'decay'"),
            ({"augment__mix_options": {"probability": 1}}, "augment.mix_options has the unknown key 'probability'"),
            ({"augment__mix_options": {"mode": "half"}}, "must be batch, pair or elem"),
            ({"run__device": "tpu9"}, "run.device 'tpu9' is no device"),
            ({"run__device": "cuda:99"}, "run.device cuda:99: this machine has"),
            ({"run__output": ""}, "run.output is missing"),
        ],
    )
    def test_wrong_requests_leave_nothing_behind(
        self, images: Path, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            train(small_config(images, tmp_path / "run", **changes))
        assert not list(tmp_path.iterdir())

    def test_unknown_number_of_classes(self, tmp_path: Path) -> None:
        import numpy as np

        arrays = {f"{split}_images": np.zeros((8, 9, 9), np.uint8) for split in ("train", "test")}
        arrays |= {f"{split}_labels": np.arange(8) % 3 for split in ("train", "test")}
        np.savez(tmp_path / "plain.npz", **arrays)
        config = small_config(tmp_path / "plain.npz", tmp_path / "run", schedule__epochs=2)
        with pytest.raises(ValueError, match=r"does not tell its classes; give --model\.num_classes"):
            train(config)
        config.model.num_classes = 3
        assert train(config)["model_args"]["num_classes"] == 3


class TestOptimization:
    def test_weight_decay_and_layer_decay_follow_the_model(self) -> None:
        import striate

        model = striate.create_model("swin_tiny", num_classes=3, depths=(1, 1, 1, 1))
        config = load_config("swin/tiny_in1k", {"optim.layer_decay": 0.5}).optim
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = build_optimizer(config, model).param_groups
        decayed = {names[p] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
        assert all(name.endswith("weight") for name in decayed)
        assert not any("norm" in name or "relative_position_bias" in name for name in decayed)
        assert sum(len(group["params"]) for group in groups) == len(names)
        scale = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
        assert scale["head.fc.weight"] == 1.0
        assert scale["patch_embed.proj.weight"] == min(scale.values()) < 0.25

    def test_learning_rates_are_scaled_to_the_batch(self) -> None:
        config = load_config("swin/tiny_in1k")
        assert lr_scale(config.optim, 64, world_size=2) == 64 * 8 * 2 / 512
        config.optim.reference_batch = None
        assert lr_scale(config.optim, 64) == 1.0

    def test_schedule_with_layer_decay_and_cooldown(self) -> None:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([{"params": [weight], "lr_scale": 0.1}], lr=1.0)
        config = load_config("swin/tiny_in1k", {"schedule.epochs": 10, "schedule.warmup_epochs": 0}).schedule
        config.options = {"cooldown_epochs": 2}
        scheduler, epochs = build_scheduler(config, optimizer, steps_per_epoch=5)
        assert epochs == 12
        scheduler.step_update(0)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
        scheduler.step_update(25)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05, rel=1e-4)

    def test_mixup_only_where_it_is_on(self) -> None:
        config = load_config("swin/tiny_in1k").augment
        mixup = build_mixup(config, 7)
        assert mixup is not None
        assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing, mixup.num_classes) == (0.8, 1.0, 0.1, 7)
        config.mixup = config.cutmix = 0.0
        assert build_mixup(config, 7) is None
        config.mix_options = {"cutmix_minmax": [0.2, 0.8]}
        assert build_mixup(config, 7) is not None
