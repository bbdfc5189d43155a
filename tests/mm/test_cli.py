"""`striate detect`, `striate segment` and `striate predict --task …`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from PIL import Image, ImageChops

from mm import jobs
from striate.detection import cli as detect
from striate.detection import runner
from striate.segmentation import cli as segment

RUNS = {
    "detect": (detect, "detection/biformer/retinanet_small_1x"),
    "segment": (segment, "segmentation/swin/upernet_tiny_160k"),
}


@pytest.mark.parametrize("task", list(RUNS))
def test_train_resume_test_predict(task, drawn, tmp_path, capsys) -> None:
    command, name = RUNS[task]
    config = jobs.shrink(name, drawn, tmp_path / "unused", batch=2)
    config.pop("work_dir")
    jobs.change(config.model.get("test_cfg", {}), {"score_thr": lambda old: 0.0})
    (tmp_path / "small.py").write_text(jobs.last_for(config, 1, 4).pretty_text)
    small, work = str(tmp_path / "small.py"), str(tmp_path / "run")
    options = ["--work-dir", work, "--cfg-options", "log_level=WARNING"]
    assert command.main(["train", small, *options, f"experiment_name={task}_a"]) == 0
    assert sorted(p.name for p in Path(work).glob("*.pth")) == ["iter_1.pth"]
    more = [f"experiment_name={task}_b", "train_cfg.max_iters=2", "default_hooks.checkpoint.interval=2"]
    assert command.main(["train", small, "--resume", *options, *more, "train_cfg.val_interval=2"]) == 0
    state = torch.load(Path(work) / "iter_2.pth", weights_only=False)
    assert max(int(s["step"]) for s in state["optimizer"]["state"].values()) == 2  # it went on, not anew
    checkpoint = str(Path(work) / "iter_2.pth")
    assert command.main(["test", small, checkpoint, *options, f"experiment_name={task}_c"]) == 0

    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        Image.open(drawn / f"val/images/000{number}.png").save(images / f"{number}.png")
    output = tmp_path / "drawn"
    words = [small, checkpoint, str(images), "--output", str(output), "--device", "cpu"]
    assert command.predict([*words, *(["--score", "0.0"] if task == "detect" else [])]) == 0
    assert "2 images drawn" in capsys.readouterr().out
    for number in range(2):
        (painted,) = (output / "vis").glob(f"{number}.*")
        with Image.open(painted) as image, Image.open(images / f"{number}.png") as before:
            assert image.size == before.size
            assert ImageChops.difference(image.convert("RGB"), before.convert("RGB")).getbbox()
    if task == "detect":
        found = json.loads((output / "preds/0.json").read_text())
        assert len(found["bboxes"]) == len(found["scores"]) > 0
    else:
        with Image.open(next((output / "preds").glob("0*"))) as labels:
            assert labels.size == (128, 128)


def test_two_processes(drawn, tmp_path) -> None:
    config = jobs.shrink("segmentation/swin/upernet_tiny_160k", drawn, tmp_path / "run", batch=2)
    (tmp_path / "small.py").write_text(jobs.last_for(config, 1).pretty_text)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "striate.train.cli", "segment", "train", str(tmp_path / "small.py")]
    command += ["--cfg-options", "log_level=INFO"]
    places = os.pathsep.join(str(Path(__file__).parents[level]) for level in (1, 2))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"Distributed training: True\s+GPU number: 2", done.stdout + done.stderr)
    assert (tmp_path / "run/iter_1.pth").is_file()


def test_own_configs_have_short_names() -> None:
    assert runner.config_path(runner.DETECT, "swin/mask_rcnn_tiny_1x").name == "mask_rcnn_tiny_1x.py"
    assert runner.config_path(runner.SEGMENT, "swin/upernet_tiny_160k").is_file()
    with pytest.raises(ValueError, match="swin/mask_rcnn_tiny_1x"):
        runner.config_path(runner.DETECT, "swin/mask_rcnn_huge_1x")


def test_amp_and_launcher(monkeypatch, tmp_path) -> None:
    seen = []

    class Silent:
        @classmethod
        def from_cfg(cls, config):
            seen.append(config)
            return cls()

        def train(self) -> None:
            pass

    monkeypatch.setattr("mmengine.runner.Runner", Silent)
    monkeypatch.setattr("mmengine.device.get_device", lambda: "cuda")
    monkeypatch.setattr(runner, "_join_without_gpu", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of torchrun
    assert segment.main(["train", "swin/upernet_tiny_160k", "--amp", "--resume"]) == 0
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "last.pth").touch()
    assert segment.main(["train", "swin/upernet_tiny_160k", "--resume", str(tmp_path / "last.pth")]) == 0
    several, one = seen
    assert (several.launcher, several.optim_wrapper.type, several.optim_wrapper.loss_scale) == (
        "pytorch",
        "AmpOptimWrapper",
        "dynamic",
    )
    assert several.resume
    assert several.load_from is None
    assert several.work_dir == "work_dirs/upernet_tiny_160k"
    assert (one.launcher, one.optim_wrapper.type, one.load_from) == ("none", "OptimWrapper", str(tmp_path / "last.pth"))


@pytest.mark.parametrize("name", [name for _, name in RUNS.values()])
def test_losses_in_mixed_precision(name, drawn, tmp_path) -> None:
    """What `--amp` does to the model, which mmengine itself refuses to do on a CPU."""
    config = jobs.shrink(name, drawn, tmp_path, batch=2)
    jobs.use_scope(config)
    torch.manual_seed(0)
    model = MODELS.build(config.model).train()
    data = model.data_preprocessor(next(iter(Runner.build_dataloader(config.train_dataloader, seed=0))), training=True)
    totals = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = model.parse_losses(model(**data, mode="loss"))
        totals.append(float(loss.detach()))
    loss.backward()
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)
    gradients = [p.grad for p in model.backbone.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["train", "nothing.py"], "no config nothing.py"),
        (["train", "swin/upernet_tiny_160k", "--resume", "none.pth"], "no checkpoint none.pth"),
        (["test", "swin/upernet_tiny_160k", "none.pth"], "no checkpoint none.pth"),
        (["train", "swin/upernet_tiny_160k", "--cfg-options", "model"], "key=value"),
        (["train", "swin/upernet_tiny_160k", "--amp"], "--amp.*accelerators"),
    ],
)
def test_wrong_requests(words, match) -> None:
    with pytest.raises(ValueError, match=match):
        segment.main(words)


def test_wrong_predictions(tmp_path) -> None:
    config = "swin/upernet_tiny_160k"
    with pytest.raises(ValueError, match="no image and no folder"):
        segment.predict([config, "none.pth", str(tmp_path), "--output", "o"])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no checkpoint none\.pth"):
        segment.predict([config, "none.pth", str(tmp_path), "--output", "o"])
