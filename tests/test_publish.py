"""`striate push` and `striate pull`, against the loopback Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

import striate
from hub_helpers import FILES, assert_equal, log_in, tiny
from hub_server import Hub
from striate.train import cli
from striate.train.model import load_trained
from striate.train.state import RunFolder

METRICS = {"top1": 87.5, "top5": 99.0, "correct": 7, "total": 8, "loss": 0.5}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a run leaves: weights that know their configuration and metrics, beside config.yaml."""
    return write_run(tmp_path / "run", "fashion-mnist-subset")


def write_run(path: Path, dataset: str) -> Path:
    run = RunFolder(path)
    run.path.mkdir()
    run.config.write_text(f"model: {{name: biformer_nano, in_chans: 1}}\ndata: {{name: {dataset}}}\n")
    model = tiny(10)
    description: dict[str, Any] = striate.hub.config.describe(model)
    for which, metrics in (("best", METRICS), ("last", None)):
        metadata = {"config": description, "weights": "model", "step": 3, "metrics": metrics}
        run.save_weights(which, model.state_dict(), metadata)
    return path


def test_a_run_is_published_with_its_story(hub: Hub, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["push", str(run_folder), "org/nano", "--private", "--tag", "v1", "--message", "First", "--json"]
    assert cli.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    repo = hub.repos["org/nano"]
    assert said["address"] == f"hf-hub:org/nano@{repo.head.oid}"
    assert (repo.private, repo.head.title, repo.tags) == (True, "First", {"v1": repo.head.oid})
    assert sorted(repo.head.files) == sorted([".gitattributes", *FILES, "metrics.json", "recipe.yaml"])
    files = {name: blob.data for name, blob in repo.head.files.items()}
    assert files["recipe.yaml"] == (run_folder / "config.yaml").read_bytes()
    metrics = {"dataset": "zalando-datasets/fashion_mnist", "metrics": {"top1": 87.5, "top5": 99.0}}
    assert json.loads(files["metrics.json"]) == metrics
    card = files["README.md"].decode()
    for part in ("87.5", "name: biformer_nano", "zalando-datasets/fashion_mnist", "model-index"):
        assert part in card
    assert_equal(striate.create_model(said["address"]), load_trained(run_folder))
    assert cli.main(words) == 0  # nothing is new
    assert len(list(repo.history(repo.head.oid))) == 2


def test_a_card_is_understood_by_the_hub(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    """Its front matter as huggingface_hub reads it, and its code as a reader would run it."""
    assert cli.main(["push", str(run_folder), "org/nano"]) == 0
    from huggingface_hub import ModelCard

    card = ModelCard.load("org/nano")
    (result,) = {(r.metric_name, r.metric_value, r.dataset_name) for r in card.data.eval_results} - {
        ("Top-5 accuracy (%)", 99.0, "zalando-datasets/fashion_mnist")
    }
    assert result == ("Top-1 accuracy (%)", 87.5, "zalando-datasets/fashion_mnist")
    assert card.data.library_name == "striate"
    assert card.data.license == "mit"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{run}", "org/nano", "--tag"], "expected one argument"),
        (["{run}", "nano"], "'nano' is no address"),
        (["{run}", "local-dir:{run}/hub", "--tag", "v1"], "a folder has no tags"),
        (["{run}/none.safetensors", "org/nano"], "looks like a repository or a folder"),
        (["{folder}", "org/nano"], "--dataset imagenet-1k"),
    ],
)
def test_a_wrong_request_publishes_nothing(
    words: list[str], told: str, hub: Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "folder", "folder")
    code = cli.main(["push", *(word.format(run=run_folder, folder=folder) for word in words)])
    assert code == cli.EXIT_USAGE
    assert told in capsys.readouterr().err
    assert not hub.repos


def test_weights_without_a_story(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    """The last weights were not evaluated; a state dict was never a run's."""
    assert cli.main(["push", str(run_folder), "org/last", "--weights", "last"]) == 0
    model = striate.create_model("biformer_tiny", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    options = ["--model.checkpoint_path", str(tmp_path / "w.pth"), "--model.num_classes", "3"]
    assert cli.main(["push", "biformer_tiny", "org/own", *options, "--description", "Mine.", "--licence", "mit"]) == 0
    assert cli.main(["push", str(tmp_path / "w.pth"), "org/recognised"]) == 0
    for name in ("org/last", "org/own", "org/recognised"):
        assert sorted(hub.repos[name].head.files) == [".gitattributes", *FILES]
    assert_equal(striate.create_model("hf-hub:org/recognised"), model)
    assert_equal(striate.create_model("hf-hub:org/own"), model)
    assert b"Mine." in hub.repos["org/own"].head.files["README.md"].data


def test_refusals_are_told_in_one_line(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_in(monkeypatch, None)
    assert cli.main(["push", str(run_folder), "org/nano"]) == cli.EXIT_FAILED
    said = capsys.readouterr().err
    assert said.startswith("striate push: publishing failed: nobody is logged in")
    assert said.count("\n") == 1
    assert cli.main(["pull", "org/none"]) == cli.EXIT_USAGE
    assert "striate pull: error: there is no " in capsys.readouterr().err


def test_pull(hub: Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(run_folder), "org/nano", "--tag", "v1"]) == 0
    HfApi().delete_file("recipe.yaml", "org/nano")
    capsys.readouterr()
    for source, extra in (("org/nano@v1", ["recipe.yaml"]), ("org/nano", [])):
        copy = tmp_path / f"copy{len(extra)}"
        assert cli.main(["pull", source, str(copy)]) == 0
        assert capsys.readouterr().out == f"{copy}\n"
        assert sorted(path.name for path in copy.iterdir()) == sorted([*FILES, "metrics.json", *extra])
        assert_equal(striate.create_model(f"local-dir:{copy}"), load_trained(run_folder))
