"""Exact counts, and `striate validate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import striate
from striate.train.cli import main
from striate.train.config import DataConfig, load_config
from striate.train.data import ArrayImages, open_source
from striate.train.evaluate import (
    FlipAverage,
    confusion_matrix,
    count_real,
    evaluate,
    order_real_labels,
    read_real_labels,
    validate,
)
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


def test_command_on_a_weight_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the file lies in a run folder, the data set is that of the run; elsewhere it has to be named."""
    final = json.loads((run / "summary.json").read_text())["final"]
    assert main(["validate", str(run / "last.safetensors"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["loss"] == pytest.approx(final["loss"], rel=1e-6)
    copy = tmp_path / "weights.v2.safetensors"
    copy.write_bytes((run / "last.safetensors").read_bytes())
    assert main(["validate", str(copy), "--data.name", "npz", "--data.root", str(run.parent / "small.npz")]) == 0
    assert f"({final['correct']}/20)" in capsys.readouterr().out
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(copy), plain)
    for file in (plain, run / "state.pt"):
        assert main(["validate", str(file), "--data.name", "fashion-mnist-subset"]) == 2
        assert f"{file} fits no registered model; give the model's name, and the file as" in capsys.readouterr().err


def test_what_the_answers_are_written_to(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    confusion, predictions = tmp_path / "confusion.csv", tmp_path / "predictions.csv"
    files = ["--confusion", str(confusion), "--predictions", str(predictions)]
    assert main(["validate", str(run), *files, "--json"]) == 0
    correct = json.loads(capsys.readouterr().out)["correct"]
    with np.load(run.parent / "small.npz") as arrays:
        names, labels = arrays["classes"].tolist(), arrays["test_labels"].tolist()
    rows = list(csv.reader(confusion.open(newline="")))
    assert rows[0] == ["true", *names]
    assert [row[0] for row in rows[1:]] == names
    counts = np.array([[int(cell) for cell in row[1:]] for row in rows[1:]])
    assert counts.sum(1).tolist() == np.bincount(labels, minlength=10).tolist()
    assert counts.trace() == correct
    answers = list(csv.DictReader(predictions.open(newline="")))
    assert [row["true"] for row in answers] == [names[label] for label in labels]
    for true, row in zip(names, counts, strict=True):
        for predicted, count in zip(names, row, strict=True):
            assert sum(a["true"] == true and a["predicted"] == predicted for a in answers) == count


def test_rows_of_the_confusion_matrix_are_true_classes() -> None:
    matrix = confusion_matrix(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 0, 0, 2]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [2, 0, 1]]


def test_flip_average(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, images = load_trained(run), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mirrored = torch.stack([model(images), model(torch.flip(images, (3,)))]).mean(0)
        assert torch.allclose(FlipAverage(model)(images), mirrored, atol=1e-6)
        assert not torch.allclose(mirrored, model(images), atol=1e-3)
    losses = []
    for words in ([], ["--tta"]):
        assert main(["validate", str(run), "--json", *words]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    data = load_config(run / "config.yaml").data
    doubled = FlipAverage(model)
    doubled.pretrained_cfg, doubled.num_classes = model.pretrained_cfg, 10
    assert losses[1] == pytest.approx(validate(doubled, data, CPU).loss, rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_real_labels(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = tmp_path / "predictions.csv"
    assert main(["validate", str(run), "--predictions", str(predictions)]) == 0
    names = json.loads((run / "summary.json").read_text())["classes"]
    guesses = [names.index(row["predicted"]) for row in csv.DictReader(predictions.open(newline=""))]
    rows: list[list[int]] = [[guess, (guess + 1) % 10] for guess in guesses]
    rows[0], rows[5], rows[6] = [], [], [(guesses[6] + 1) % 10, (guesses[6] + 2) % 10]
    file = tmp_path / "real.json"
    file.write_text(json.dumps(rows))
    capsys.readouterr()
    assert main(["validate", str(run), "--real_labels", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["real"] == {"top1": 100 * 17 / 18, "correct": 17, "total": 18}
    assert main(["validate", str(run), "--real_labels", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "ReaL top-1 94.44 % (17/18)"
    file.write_text(json.dumps(rows[1:]))
    assert main(["validate", str(run), "--real_labels", str(file)]) == 2
    assert "has labels of 19 images, the split has 20" in capsys.readouterr().err


def test_real_labels_follow_the_names_of_files(tmp_path: Path) -> None:
    """The class folders are read one after the other, the labels go by the numbers of the files."""
    for name in ("b/ILSVRC2012_val_00000001.png", "a/ILSVRC2012_val_00000002.png", "b/ILSVRC2012_val_00000003.png"):
        path = tmp_path / "validation" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    source = open_source(DataConfig(name="folder", root=str(tmp_path)), "validation", 3)
    assert [source.images[index][1] for index in range(3)] == [0, 1, 1]
    assert order_real_labels([[1], [2], [3]], source.images, Path("real.json")) == [[2], [1], [3]]
    assert count_real(torch.tensor([2, 0, 5]), [[2], [1], []]) == {"top1": 50.0, "correct": 1, "total": 2}


@pytest.mark.parametrize("text", ["[[1], 2]", '{"a": []}', "[[1.5]]", "[[true]]", "nonsense"])
def test_what_holds_no_real_labels(tmp_path: Path, text: str) -> None:
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(ValueError, match="real.json"):
        read_real_labels(tmp_path / "real.json")


def test_an_image_that_cannot_be_read_is_no_wrong_request(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = ArrayImages.__getitem__

    def fail_at_7(images: ArrayImages, index: int) -> tuple[Image.Image, int]:
        if index == 7:
            raise OSError("image file is truncated")
        return read(images, index)

    monkeypatch.setattr(ArrayImages, "__getitem__", fail_at_7)
    assert main(["validate", str(run), "--data.workers", "0"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("striate validate: evaluating failed: ")
    assert said.err.endswith("image file is truncated\n")


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
        (["RUN", "--model.checkpoint_path", "x.pth"], "--model.checkpoint_path does not go with"),
        (["RUN", "--confusion", "/nowhere/x.csv"], "--confusion /nowhere/x.csv cannot be written"),
        (["RUN", "--real_labels", "/nowhere/real.json"], "No such file"),
    ],
)
def test_wrong_requests(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *[str(run) if word == "RUN" else word for word in words]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("striate validate: error: ")
    assert message in said
    assert said.count("\n") == 1
