"""Reading files of weights without running, or making, anything that somebody hid in them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import _pickles

MAX_HEADER = 32 << 20  # bytes of a safetensors header: 300 000 tensors
MAX_GROWTH = 4  # what a file may grow to in memory, plus SLACK
SLACK = 64 << 20
MAX_DEPTH = 100  # of dictionaries in dictionaries

_LOCK = threading.RLock()  # torch has one list of allowed classes for the process


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model."""


def read_file(path: Path, *, inert: bool = False) -> Mapping[str, Any]:
    """Read a `.safetensors` or PyTorch file without running any code in it.

    Memory stays within a few times the size of the file. Beside tensors, a file of torch may hold what training
    scripts put there: their arguments (argparse, yacs), paths, numbers and arrays of NumPy.

    Args:
        path: the file; `torch.save` has written it in its present or in its older format, or safetensors.
        inert: of a file of torch, put an object that holds nothing in place of every other class or function that it
            names, so that tensors beside them can be read. Nothing of theirs runs either way.

    Raises:
        ValueError: (as `CheckpointError`) if there is no such file or it cannot be read safely.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    with path.open("rb") as file:
        head = file.read(512)
    _check_head(path, head)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    try:
        content = _read_torch(path, head, inert)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
        _check_content(path, content)
    except CheckpointError:
        raise
    except _pickles.UnsafePickleError as error:
        raise CheckpointError(f"{path} was refused: {error}; no code in it ran, do not use it") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} was refused or is damaged, and no code in it ran: {_reason(error)}") from error
    except Exception as error:  # damaged bytes raise nearly anything: IndexError, struct.error, AssertionError, …
        raise CheckpointError(f"{path} is damaged or no PyTorch file ({error}); download it again") from error
    return content


def _check_head(path: Path, head: bytes) -> None:
    """Refuse what is recognised as another kind of file by its first bytes."""
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not the weights; the download link is probably dead")
    for magic, name, command in _COMPRESSED:
        if head.startswith(magic):
            raise CheckpointError(f"{path} is compressed ({name}); {command} and pass the file of weights in it")
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is a tar archive; extract it (`tar -xf`) and pass the file of weights in it. If it is one of torch"
            " before 0.1.10, load it with the code that wrote it and save its state dict"
        )


_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "extract it (`gunzip`, or `tar -xzf` if it is an archive)"),
    (b"BZh", "bzip2", "extract it (`bunzip2`, or `tar -xjf` if it is an archive)"),
    (b"\xfd7zXZ\x00", "xz", "extract it (`unxz`, or `tar -xJf` if it is an archive)"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "extract it (`unzstd`)"),
    (b"7z\xbc\xaf\x27\x1c", "7-zip", "extract it (`7z x`)"),
    (b"Rar!", "rar", "extract it (`unrar x`)"),
)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The library checks types, shapes and offsets; it takes the last of two tensors of one name, which may differ."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(os.path.getsize(path) - 8, MAX_HEADER):
                raise CheckpointError(f"{path} is damaged: its header claims {length} bytes; download it again")
            json.loads(file.read(length), object_pairs_hook=_unique)
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is a damaged safetensors file ({error}); download it again") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header has {next(name for name in names if names.count(name) > 1)} twice")
    return found


def _read_torch(path: Path, head: bytes, inert: bool) -> Any:
    found = _scan_zip(path) if head.startswith(b"PK\3\4") else _scan_legacy(path, head)
    foreign = found.foreign()
    blocked = [name for name in foreign if name.partition(".")[0] in _pickles.BLOCKED]
    if blocked or (foreign and not inert):
        raise CheckpointError(
            f"{path} holds more than tensors ({', '.join(blocked or foreign)}); it was refused and no code in it ran. "
            + ("Weights do not need that: do not use this file" if blocked else _INERT_HINT)
        )
    stand_ins = {**dict.fromkeys(foreign, _pickles.Inert), **_pickles.STAND_INS}
    stand_ins |= {name: role for name, role in found.roles.items() if name in foreign}
    with _allowed(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


_INERT_HINT = (
    "`striate convert FILE --inert` takes its tensors and leaves the rest; or save its state dict alone where you"
    " trust it"
)


@contextlib.contextmanager
def _allowed(stand_ins: dict[str, Any]) -> Iterator[None]:
    """Let torch make `stand_ins`, and only them; what others have allowed for the process comes back afterwards."""
    ours = [(function, name) for name, function in stand_ins.items()]
    with _LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(ours)  # type: ignore[arg-type]
        try:
            yield
        finally:
            added = [entry for entry in torch.serialization.get_safe_globals() if entry not in ours]
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([*others, *added])


def _scan_zip(path: Path) -> _pickles.Scan:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _check_directory(path, archive.start_dir)
        names = [entry.filename for entry in entries]
        if any(_base(entry) == "constants.pkl" for entry in entries):
            raise CheckpointError(
                f"{path} is a TorchScript program, not weights; save the state_dict() of what torch.jit.load gives,"
                " where you trust it"
            )
        pickles = [entry for entry in entries if _base(entry) == "data.pkl"]
        if not pickles:
            raise CheckpointError(
                f"{path} is a zip archive and no file of torch.save; extract it (`unzip`) and pass the file of weights"
                f" in it: it holds {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            )
        size = os.path.getsize(path)
        if sum(entry.file_size for entry in entries) > MAX_GROWTH * size + SLACK:
            raise CheckpointError(f"{path} was refused: its {size} bytes inflate to far more; no code in it ran")
        found = _pickles.Scan()
        for entry in pickles:
            _pickles.scan(io.BytesIO(archive.read(entry)), found)
    return found


def _base(entry: zipfile.ZipInfo) -> str:
    return entry.filename.rpartition("/")[2].lower()  # torch finds an entry whatever its case


def _check_directory(path: Path, start: int) -> None:
    """Refuse a zip file with two directories, of which torch might read the one that was not checked."""
    with path.open("rb") as file:
        file.seek(-min(98, os.path.getsize(path)), os.SEEK_END)
        tail = file.read()
    end = struct.unpack("<4s4H2LH", tail[-22:])
    offset, is_last = end[6], end[0] == b"PK\5\6" and end[7] == 0
    if is_last and tail[-42:-38] == b"PK\6\7":
        is_last = int.from_bytes(tail[-34:-26], "little") == os.path.getsize(path) - 98
        offset = int.from_bytes(tail[-50:-42], "little")
    if not is_last or offset != start:
        raise CheckpointError(f"{path} is damaged: its zip directory is not at its end; download it again")


def _scan_legacy(path: Path, head: bytes) -> _pickles.Scan:
    with path.open("rb") as stream:
        try:
            magic = _pickles.scan(stream).first
        except Exception:  # a pickle of another protocol, or anything
            magic = None
        if magic != torch.serialization.MAGIC_NUMBER:
            kind = "a plain pickle (as detectron2 publishes)" if head[:1] == b"\x80" else "no file of weights"
            raise CheckpointError(
                f"{path} is damaged or {kind}, not a file of torch.save or safetensors; it was refused and no code in"
                " it ran. Download it again, or save its state dict with torch.save where you trust it"
            )
        found = _pickles.Scan()
        for _ in range(4):  # version, system, content, names of the storages
            _pickles.scan(stream, found)
    return found


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return told[1] if told else lines[0] if lines else type(error).__name__


def _check_content(path: Path, content: Mapping[Any, Any]) -> None:
    """Refuse tensors that are large only in their shape, and dictionaries that hold themselves."""
    size, total = os.path.getsize(path), 0
    heights: dict[int, int] = {}

    def height(value: Any, depth: int) -> int:
        nonlocal total
        if isinstance(value, Tensor):
            if id(value) not in heights:
                total += value.numel() * value.element_size()
            heights[id(value)] = 0
            return 0
        if not isinstance(value, (Mapping, list, tuple)):
            return 0
        if id(value) not in heights and depth <= MAX_DEPTH:
            inside = value.values() if isinstance(value, Mapping) else value
            heights[id(value)] = 1 + max((height(item, depth + 1) for item in inside), default=0)
        if depth > MAX_DEPTH or heights[id(value)] > MAX_DEPTH:
            raise CheckpointError(f"{path} was refused: what it holds is nested more than {MAX_DEPTH} deep")
        return heights[id(value)]

    height(content, 0)
    if total > MAX_GROWTH * size + SLACK:
        raise CheckpointError(
            f"{path} was refused: its tensors claim {total} bytes, the file has {size}; clone expanded tensors before"
            " saving them"
        )
