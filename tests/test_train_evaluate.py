"""Exact counts, and `striate validate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import striate
from striate.train.cli import main
from striate.train.config import DataConfig, load_config
from striate.train.evaluate import evaluate, validate
from striate.train.loop import train
from striate.train.model import load_trained
from train_helpers import small_config, write_small_npz

CPU = torch.device("cpu")


class Lookup(nn.Module):
    """Gives the row of a table that the first pixel names."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.num_classes = table.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.table[images[:, 0, 0, 0].long()]


def batches(labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.arange(len(labels), dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    images = write_small_npz(folder / "small.npz")
    train(small_config(images, folder / "run", schedule__epochs=2))
    return folder / "run"


@pytest.mark.parametrize(("classes", "size"), [(12, 7), (3, 100), (2, 1)])
def test_counts(classes: int, size: int) -> None:
    table = torch.randn(53, classes)
    labels = torch.randint(classes, (53,))
    model = Lookup(table).train()
    result = evaluate(model, batches(labels, size), CPU)
    assert result is not None
    ranks = [(row > row[label]).sum().item() for row, label in zip(table, labels, strict=True)]
    assert result.correct == sum(rank < 1 for rank in ranks)
    assert result.correct5 == sum(rank < 5 for rank in ranks)
    assert result.total == 53
    assert result.top1 == 100 * result.correct / 53
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(table, labels)), rel=1e-6)
    assert torch.equal(result.predictions, table.argmax(1))
    assert model.training, "the mode is as it was"


def test_it_can_be_stopped_and_has_no_empty_result() -> None:
    labels = torch.zeros(30, dtype=torch.int64)
    asked = iter([False, False, True])
    assert evaluate(Lookup(torch.randn(30, 4)), batches(labels, 10), CPU, should_stop=lambda: next(asked)) is None
    with pytest.raises(ValueError, match="no images"):
        evaluate(Lookup(torch.randn(30, 4)), [], CPU)


def test_more_classes_than_outputs() -> None:
    with pytest.raises(
        ValueError, match=r"split 'validation' has 10 classes, the model 4; give --model.num_classes 10"
    ):
        validate(Lookup(torch.randn(3, 4)), DataConfig(name="fashion-mnist-subset"), CPU)


def test_command_on_a_run_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert main(["validate", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {key: said[key] for key in ("correct", "total", "top1")} == {
        key: summary["best"][key] for key in ("correct", "total", "top1")
    }
    assert main(["validate", str(run), "--weights", "last", "--data.workers", "0", "--data.batch_size", "3"]) == 0
    final = summary["final"]
    assert f"top-1 {final['top1']:.2f} % ({final['correct']}/20), top-5" in capsys.readouterr().out


def test_options_take_the_place_of_those_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, data = load_trained(run), load_config(run / "config.yaml").data
    weights = run / "best.safetensors"
    other = striate.create_model("test_efficientnet", checkpoint_path=weights, num_classes=10, act_layer="hard_swish")
    other.pretrained_cfg = saved.pretrained_cfg
    want = validate(other, data, CPU)
    assert want.loss != pytest.approx(validate(saved, data, CPU).loss, rel=1e-4)
    assert main(["validate", str(run), "--model.options", "{act_layer: hard_swish}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(want.loss, rel=1e-6)


def test_command_on_a_published_model_and_on_a_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published model brings its input size, mean and classes along; a checkpoint needs the name of its model."""
    address = striate.push(load_trained(run), f"local-dir:{tmp_path / 'hub'}")
    data = ["--data.name", "npz", "--data.root", str(run.parent / "small.npz"), "--data.workers", "0", "--json"]
    assert main(["validate", address, *data]) == 0
    published = json.loads(capsys.readouterr().out)
    weights = ["--model.checkpoint_path", str(run / "best.safetensors"), "--model.num_classes", "10"]
    assert main(["validate", "test_efficientnet", *weights, "--data.image_size", "32", *data]) == 0
    loaded = json.loads(capsys.readouterr().out)
    best = json.loads((run / "summary.json").read_text())["best"]
    for said in (published, loaded):
        assert (said["correct"], said["total"]) == (best["correct"], best["total"])
        assert said["loss"] == pytest.approx(best["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.name", "npz"], "give the run folder or the model first"),
        (["no_such_model", "--data.name", "fashion-mnist-subset"], "no model 'no_such_model'"),
        (["test_efficientnet"], "data.name"),
        (["test_efficientnet", "--data.nam", "npz"], "did you mean data.name"),
        (["RUN", "--weights", "worst"], "worst.safetensors does not exist"),
        (["RUN", "--model.options", "{num_classes: 3}"], "model.options may not hold num_classes"),
        (["RUN", "--model.options", "{tallness: 3}"], "unexpected keyword argument 'tallness'"),
    ],
)
def test_wrong_requests(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *[str(run) if word == "RUN" else word for word in words]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("striate validate: error: ")
    assert message in said
    assert said.count("\n") == 1
