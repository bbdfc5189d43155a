"""The `striate` command: dispatch, exit codes, lazy imports."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import striate
from striate.train.cli import COMMANDS, main
from striate.train.loop import RunStoppedError
from train_helpers import arguments, stop_after, write_small_npz

REPOSITORY = Path(__file__).resolve().parent.parent


def test_help_lists_every_command_quickly_and_without_torch() -> None:
    """Time decides nothing here: what takes the time is importing torch, and that is what is looked for."""
    code = (
        "import sys\nfrom striate.train.cli import main\nassert main(['--help']) == 0\n"
        "assert not {'torch', 'timm', 'numpy', 'jsonargparse'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert command.help in done.stdout


def test_help_of_train_without_torch() -> None:
    code = (
        "import sys\nfrom striate.train.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit as e: pass\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--optim.lr" in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_exist(name: str) -> None:
    module, _, function = COMMANDS[name].target.partition(":")
    found = importlib.util.find_spec(module, "striate.train")
    assert found is not None
    assert callable(getattr(importlib.import_module(module, "striate.train"), function))


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: striate COMMAND" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "striate: error: unknown command 'trian'; did you mean train?\n"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == striate.__version__ + "\n"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "biformer_*"]) == 0
    assert capsys.readouterr().out.split() == striate.list_models("biformer_*")
    assert main(["list", "--family", "swin"]) == 0
    assert "swin_tiny" in capsys.readouterr().out.split()
    assert main(["list", "biformer_*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == striate.list_models("biformer_*")
    assert main(["list", "nothing*"]) == 2
    assert "no model matches 'nothing*'" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "biformer_tiny"]) == 0
    said = capsys.readouterr().out
    for word in ("biformer_tiny", "3 x 224 x 224", "13.1 M", "81.4 %", "https://arxiv.org/abs/2303.08810", "MIT"):
        assert word in said
    assert main(["info", "biformer_tiny", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert (known["name"], known["input_size"], known["params"]) == ("biformer_tiny", [3, 224, 224], 13.1)
    assert (known["family"]["title"], known["family"]["licence"]) == ("BiFormer", "MIT")
    assert "entry" not in known
    assert main(["info", "biformer_tinny"]) == 2
    assert "biformer_tiny" in capsys.readouterr().err


def test_other_commands_take_wrong_keys_for_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("validate", "predict", "visualize", "export"):
        assert main([name, "test_vit", "--model.naem", "x", "--output", "x"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"striate {name}: error: ")
        assert said.count("\n") == 1


def test_train_refuses_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.name", "test_vit", "--data.name", "fashion-mnist-subset", "--run.output", str(tmp_path / "run")]
    for wrong in (["--optim.lrr", "1"], ["--optim.lr", "-1"], ["--model.options.img_sise", "32"]):
        assert main(["train", *words, *wrong]) == 2
        said = capsys.readouterr().err
        assert said.startswith("striate train: error: ")
        assert said.count("\n") == 1
    assert main(["train", *words[:4]]) == 2
    assert "run.output is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_train_resume_and_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", *arguments(write_small_npz(tmp_path / "small.npz"), tmp_path / "run", schedule__epochs=2)]
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        with monkeypatch.context() as patched:
            stop_after(patched, 5, number)
            assert main(words) == code
        said = capsys.readouterr().err
        assert f"stopped by {number.name} after step" in said
        assert "the same command goes on" in said
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "resuming after step 10 of 22" in captured.err
    assert "best top-1" in captured.out
    assert main(words) == 0
    assert "run is finished: best top-1" in capsys.readouterr().out


def test_train_with_a_loss_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_small_npz(tmp_path / "small.npz")
    assert main(["train", *arguments(root, tmp_path / "run", optim__lr=1e30, optim__clip_grad=None)]) == 1
    said = capsys.readouterr().err
    assert "striate train: stopped after step" in said
    assert "steps in a row were not finite" in said


def test_an_accident_in_the_middle_is_not_taken_for_a_wrong_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from striate.train.state import RunFolder

    errors: list[Exception] = [OSError("No space left on device"), ValueError("a bug")]

    def fail(*_: object) -> None:
        raise errors[0]

    monkeypatch.setattr(RunFolder, "save_state", fail)
    words = arguments(write_small_npz(tmp_path / "small.npz"), tmp_path / "run", schedule__epochs=2)
    assert main(["train", *words]) == 1
    assert "striate train: stopped after step 11: No space left on device\n" in capsys.readouterr().err
    del errors[0]
    with pytest.raises(RuntimeError, match="training failed after step 11") as caught:
        main(["train", *words])
    assert isinstance(caught.value.__cause__, ValueError)
    assert not isinstance(caught.value, RunStoppedError)


def test_an_error_in_a_loader_process_ends_the_command(tmp_path: Path) -> None:
    """The loader processes ignore foreign SIGTERMs; they must still be gone when the command ends."""
    root = write_small_npz(tmp_path / "small.npz")
    words = arguments(root, tmp_path / "run", data__workers=2)
    code = (
        "import sys, striate.train.data as data\n"
        "def fail(*a): raise KeyError('broken image')\n"
        "data.TrainImages.__getitem__ = fail\n"
        "from striate.train.cli import main\nsys.exit(main())"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "broken image" in done.stderr
    assert time.monotonic() - began < 240


def test_module_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "striate.train", "--optim.lrr", "1"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("striate train: error: ")
