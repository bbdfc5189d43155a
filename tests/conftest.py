"""Settings and fixtures that the tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import pytest
import torch

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
