"""Files and folders that are written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from .sources import CONFIG, FILES


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, flush it to the disk and rename it to `path`.

    Raises:
        OSError: the disk is full, or the folder may not be written; `path` is what it was before.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        old = "the one before is still there" if path.exists() else "nothing is left of it"
        raise OSError(
            getattr(error, "errno", None), f"{path} could not be written ({reason}; {_free(path)}); {old}"
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free / 1e6:.0f} MB free"
    except OSError:
        return "its folder cannot be read"


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write safetensors that others may read as far as the process lets them, which safetensors itself does not."""
    safetensors.torch.save_file(dict(state), path, metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


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
