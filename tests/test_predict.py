"""`striate predict`: the right classes in the right order, of every image that can be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

import striate
from striate.train.cli import EXIT_USAGE, main
from striate.train.predict import find_images, predict, read_batches

NAMES = ["cat", "a dog, or a wolf", "<b>cow</b>", "hen"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = striate.create_model("test_efficientnet", num_classes=4)
    return striate.push(model, f"local-dir:{tmp_path_factory.mktemp('hub')}/model", label_names=NAMES)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("b/2.png", "b/10.PNG", "a/x.jpg", "z.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    (folder / "b" / "notes.txt").write_text("no image")
    return folder


def expected(address: str, path: Path, k: int) -> list[tuple[int, float]]:
    """timm's way: its transform of the saved description, one image at a time."""
    model = striate.create_model(address).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        best = model(transform(Image.open(path).convert("RGB"))[None])[0].softmax(0).topk(k)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def test_every_image_of_a_folder_as_json(address, images, capsys) -> None:
    assert main(["predict", address, str(images), "--topk", "3", "--json", "--data.batch_size", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    paths = [str(images / name) for name in ("a/x.jpg", "b/10.PNG", "b/2.png", "z.png")]
    assert [entry["image"] for entry in said["images"]] == paths
    assert said["failures"] == []
    for path, entry in zip(paths, said["images"], strict=True):
        want = expected(address, Path(path), 3)
        assert [one["class"] for one in entry["predictions"]] == [number for number, _ in want]
        assert [one["name"] for one in entry["predictions"]] == [NAMES[number] for number, _ in want]
        assert [one["rank"] for one in entry["predictions"]] == [1, 2, 3]
        got = [one["probability"] for one in entry["predictions"]]
        assert got == pytest.approx([value for _, value in want], rel=1e-5)


def test_table_and_files(address, images, tmp_path, capsys) -> None:
    image = str(images / "z.png")
    names = tmp_path / "names.txt"
    names.write_text("zero\none\ntwo\nthree\n")
    words = ["predict", address, image, "--topk", "9", "--classes", str(names)]
    assert main([*words, "--output", str(tmp_path / "all.csv")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5, "a line of headings and the four classes there are"
    want = expected(address, Path(image), 4)
    rows = list(csv.reader((tmp_path / "all.csv").open(newline="")))
    assert rows[0] == ["image", "rank", "class", "name", "probability"]
    assert [(row[0], int(row[1]), int(row[2])) for row in rows[1:]] == [
        (image, i, n) for i, (n, _) in enumerate(want, 1)
    ]
    assert [row[3] for row in rows[1:]] == [["zero", "one", "two", "three"][number] for number, _ in want]
    assert table[1].split()[0] == image
    assert table[1].split()[2] == rows[1][3]
    assert main([*words, "--output", str(tmp_path / "all.json"), "--json"]) == 0
    assert json.loads((tmp_path / "all.json").read_text()) == json.loads(capsys.readouterr().out)


def test_an_unreadable_image_is_told_and_the_others_are_classified(address, images, tmp_path, capsys) -> None:
    whole = (images / "z.png").read_bytes()
    (tmp_path / "a_cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b_text.jpg").write_text("no image")
    (tmp_path / "c.png").write_bytes(whole)
    assert main(["predict", address, str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert [entry["image"] for entry in said["images"]] == [str(tmp_path / "c.png")]
    assert len(said["failures"]) == 2
    for name, failure, line in zip(("a_cut", "b_text"), said["failures"], captured.err.splitlines(), strict=True):
        assert name in failure
        assert line == f"striate predict: {failure}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["IMAGES/z.png", "--output", "x.txt"], "--output x.txt must end in .csv or .json"),
        (["IMAGES/none.png"], "no image or folder"),
        (["EMPTY"], "holds no images"),
        (["IMAGES", "--topk", "0"], "--topk 0 must be at least 1"),
        (["IMAGES", "--classes", "IMAGES/b/notes.txt"], "has 1 lines, the model 4 classes"),
        (["IMAGES", "--output", "/nowhere/x.csv"], "cannot be written"),
    ],
)
def test_wrong_requests(address, images, tmp_path, words, message, capsys) -> None:
    words = [word.replace("IMAGES", str(images)).replace("EMPTY", str(tmp_path)) for word in words]
    assert main(["predict", address, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("striate predict: error: ")
    assert message in said


def test_without_names_classes_are_numbers() -> None:
    logits = torch.nn.Linear(2, 3)
    with torch.no_grad():
        logits.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
        logits.bias.zero_()
    model = torch.nn.Sequential(torch.nn.Flatten(), logits)
    (first, second) = predict(model, [Path("a"), Path("b")], torch.tensor([[[2.0, 1]], [[0, 5]]]), list("xyz"), 2)
    assert (first.classes, first.names) == ([0, 1], ["x", "y"])
    assert second.classes[0] == 1
    assert sum(first.probabilities) < 1


def test_files_come_as_they_are_given_and_batches_hold_only_readable_ones(images, tmp_path) -> None:
    (tmp_path / "bad.png").write_text("no")
    paths = find_images([images / "z.png", tmp_path, images / "a"])
    assert [path.name for path in paths] == ["z.png", "bad.png", "x.jpg"]
    failures: list[str] = []
    found = list(read_batches(paths, lambda image: torch.zeros(1, *image.size), "RGB", 2, failures))
    assert [[path.name for path in names] for names, _ in found] == [["z.png", "x.jpg"]]
    assert found[0][1].shape == (2, 1, 50, 40)
    assert len(failures) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task", "draw"], "--task draw: give classify, detect or segment"),
        (["a.png", "--task"], "expected one argument"),
        (["--task", "segment", "config.py", "w.pth", "a.png", "--output", "o"], "mmengine is not installed"),
    ],
)
def test_other_tasks(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """This environment has no OpenMMLab; what is drawn is seen in the tests that have one."""
    assert main(["predict", *words]) == EXIT_USAGE
    assert told in capsys.readouterr().err
