"""`striate average`: the mean of weights, which loads again, and refusals of what is not one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import striate
from striate.hub.config import describe
from striate.train.average import average_checkpoints
from striate.train.cli import main
from striate.train.model import read_metadata


def write(path: Path, state: dict[str, Tensor], **metadata: object) -> Path:
    save_file(state, path, {"format": "pt"} | {key: json.dumps(value) for key, value in metadata.items()})
    return path


def states() -> list[dict[str, Tensor]]:
    """Three states of which float32 sums would lose the small part."""
    values = [torch.tensor([1e8, 0.5, -3.0]), torch.tensor([1.0, 0.25, 0.0]), torch.tensor([-1e8, 0.0, 0.0])]
    return [
        {"weight": value, "half": value[1:].bfloat16(), "steps": torch.tensor(number), "index": torch.arange(4)}
        for number, value in enumerate(values)
    ]


def test_the_mean_is_taken_in_float64(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{number}.safetensors", state) for number, state in enumerate(states())]
    mean, differing = average_checkpoints(files)
    rows = torch.stack([state["weight"].double() for state in states()])
    assert torch.equal(mean["weight"], rows.mean(0).float())
    assert mean["weight"][0] == pytest.approx(1 / 3, rel=1e-6)
    assert mean["half"].dtype == torch.bfloat16
    assert torch.equal(mean["half"], rows[:, 1:].mean(0).bfloat16())
    assert mean["steps"] == 2
    assert torch.equal(mean["index"], torch.arange(4))
    assert differing == ["steps"]


def test_the_file_says_which_model_it_holds_and_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [striate.create_model("test_efficientnet", num_classes=10) for _ in range(2)]
    run = tmp_path / "run"
    run.mkdir()
    config = describe(models[0], [f"class {number}" for number in range(10)])
    write(run / "best.safetensors", models[0].state_dict(), config=config, weights="ema", step=3)
    other = write(tmp_path / "other.safetensors", models[1].state_dict(), config=config, weights="model", step=4)
    output = tmp_path / "mean.safetensors"
    assert main(["average", str(run), str(other), "--output", str(output), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["architecture"], said["tensors"]) == ("test_efficientnet", len(models[0].state_dict()))
    assert said["checkpoints"] == [str(run / "best.safetensors"), str(other)]
    metadata = read_metadata(output)
    assert metadata["config"] == json.loads(json.dumps(config))
    assert (metadata["weights"], metadata["averaged"]) == ("average", said["checkpoints"])
    mean = load_file(output)
    for key, value in models[0].named_parameters():
        assert torch.allclose(mean[key], (value + models[1].state_dict()[key]) / 2, atol=1e-7), key
    data = ["--data.name", "fashion-mnist-subset", "--data.image_size", "32", "--data.workers", "0", "--json"]
    assert main(["validate", str(output), *data]) == 0
    alone = json.loads(capsys.readouterr().out)
    named = ["--model.checkpoint_path", str(output), "--model.num_classes", "10"]
    assert main(["validate", "test_efficientnet", *named, *data]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_integers_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(write(tmp_path / f"{number}.safetensors", state)) for number, state in enumerate(states())]
    torch.save({"model": states()[0]}, tmp_path / "0.pth")
    assert main(["average", str(tmp_path / "0.pth"), *files[1:], "--output", str(tmp_path / "mean.safetensors")]) == 0
    assert f"taken from {files[2]}, since they differ and are integers: steps" in capsys.readouterr().err
    assert load_file(tmp_path / "mean.safetensors")["steps"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("half"), "1 tensors are in one alone, half"),
        (lambda state: state.update(extra=torch.zeros(1)), "(extra in"),
        (lambda state: state.update(weight=torch.zeros(4)), "weight is torch.float32 (3,) in"),
        (lambda state: state.update(half=torch.zeros(2)), "but torch.float32 (2,) in"),
        (lambda state: state.update(weight=torch.tensor([0, torch.inf, 0])), "weight is infinite or NaN"),
    ],
)
def test_what_is_not_the_same_model(tmp_path: Path, change, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = states()
    change(second)
    files = [str(write(tmp_path / "1.safetensors", first)), str(write(tmp_path / "2.safetensors", second))]
    assert main(["average", *files, "--output", str(tmp_path / "mean.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mean.safetensors").exists()


def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = str(write(tmp_path / "a.safetensors", {"w": torch.zeros(1)}, config={"architecture": "swin_tiny"}))
    b = str(write(tmp_path / "b.safetensors", {"w": torch.zeros(1)}, config={"architecture": "swin_small"}))
    output = ["--output", str(tmp_path / "mean.safetensors")]
    for words, message in (
        ([a, *output], "alone has no average"),
        ([a, a, "--output", str(tmp_path / "mean.pth")], "must end in .safetensors"),
        ([a, str(tmp_path / "c.safetensors"), *output], "no checkpoint file"),
        ([a, b, *output], "has architecture swin_tiny"),
    ):
        assert main(["average", *words]) == 2
        assert message in capsys.readouterr().err
