"""What the tests of the hub share; the server itself is in `hub_server`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import striate
from hub_repos import User

FILES = ["README.md", "config.json", "model.safetensors"]
USERS = {
    "hf_writer": User("ada", ("org",)),
    "hf_reader": User("ada", ("org",), can_write=False),
    "hf_stranger": User("eve"),
}


def log_in(monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


def tiny(num_classes: int = 10) -> nn.Module:
    args = dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), in_chans=1)
    return striate.create_model("biformer_nano", num_classes=num_classes, **args).eval()


def saved_files(folder: Path, num_classes: int) -> dict[str, bytes]:
    """What a push of `tiny` writes."""
    striate.push(tiny(num_classes), f"local-dir:{folder}")
    return {name: (folder / name).read_bytes() for name in FILES}


def assert_equal(found: nn.Module, wanted: nn.Module) -> None:
    state = wanted.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    x = torch.randn(2, *wanted.pretrained_cfg["input_size"])  # type: ignore[index, misc]
    assert torch.equal(found.eval()(x), wanted.eval()(x))
