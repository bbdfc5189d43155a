"""Settings and fixtures that the tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from hub_helpers import USERS, log_in
from hub_server import Hub
from striate.backbones import _hub_files
from striate.hub import upload

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))  # for child processes
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill freshly allocated tensors with NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the filling is a side effect of it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the logger `striate` has said since the last call."""
    caplog.set_level(logging.INFO, logger="striate")

    def take() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.name.startswith("striate")]
        caplog.clear()
        return said

    return take


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What huggingface_hub and timm take for the Hub, with an empty cache and the token of a writer to `org`."""
    with Hub(USERS) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = dict(
            ENDPOINT=server.url,
            HUGGINGFACE_CO_URL_TEMPLATE=template,
            HF_HUB_CACHE=str(tmp_path / "cache"),
            HF_TOKEN_PATH=str(tmp_path / "token"),
            HF_STORED_TOKENS_PATH=str(tmp_path / "tokens"),
            AGENT_HARNESSES_PATH=str(tmp_path / "agents.json"),
            HF_HUB_DISABLE_XET=True,
            HF_HUB_DISABLE_TELEMETRY=True,
            HF_HUB_OFFLINE=False,
        )
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value, raising=False)  # versions differ in what they have
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # of the functions without a class
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()  # one made earlier keeps the proxies of then
        log_in(monkeypatch, "hf_writer")
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long huggingface_hub would have waited before it tried again."""
    waited: list[float] = []
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download, _hub_files, upload):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waited.append))
    return waited
