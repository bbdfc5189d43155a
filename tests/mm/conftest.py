"""Tests with an environment of their own, see install.sh: the maintained fork, or in one folder the originals."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import synthetic


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


collect_ignore_glob = [] if _installed("onedl-mmengine") else ["test_*.py"]
collect_ignore = [] if _installed("mmcv-lite") else ["originals"]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sets `train` and `val` of drawn images."""
    folder = tmp_path_factory.mktemp("drawn")
    synthetic.write_set(folder / "train", 96, seed=0)
    synthetic.write_set(folder / "val", 24, seed=1)
    return folder
