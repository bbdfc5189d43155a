"""Folders that are replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .sources import CONFIG, FILES


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to write a model into; it takes the place of `folder` when the block ends without an error.

    Files of `folder` that are not of the hub format (`.git`, notes) are carried over. Whatever happens, `folder` holds
    either the old or the new model; only if the machine stops between two renames, both are left whole in a folder
    `.striate-*` beside it.

    Raises:
        ValueError: if `folder` is a file, or holds files but no model.
    """
    check_replaceable(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".striate-", dir=folder.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        if folder.exists():
            _carry_over(folder, new)
        _flush(new)
        _swap(folder, new, old)
    finally:
        shutil.rmtree(work)


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that is not a model's.

    Raises:
        ValueError: if `folder` is a file, or holds files but no model.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds other files and no {CONFIG}; name a new folder, or one of a saved model")


def _carry_over(folder: Path, new: Path) -> None:
    top = str(folder)
    shutil.copytree(
        folder,
        new,
        symlinks=True,
        dirs_exist_ok=True,
        copy_function=_link,
        ignore=lambda inside, names: [name for name in names if inside == top and name in FILES],
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _swap(folder: Path, new: Path, old: Path) -> None:
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def _flush(folder: Path) -> None:
    """Get the files onto the disk before a rename makes them visible."""
    for name in FILES:
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
