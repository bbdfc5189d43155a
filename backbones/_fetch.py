"""Fetching published weights: from mirrors of the user's, the authors' link, or a copy on a hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import WeakFileLock, get_session
from tqdm import tqdm

from ._hub_files import WAITS, DamagedFileError, MissingFileError, UnreachableError, hub_file, patiently, sha256
from ._published import UNPUBLISHED, Weights, hub_place, published
from ._reading import CheckpointError, read_file

logger = logging.getLogger("striate")

MIRRORS = "STRIATE_MIRRORS"
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin", "model.bin", "model.pth")  # as timm looks for them
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def read_pretrained(cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> Mapping[str, Any]:
    """Weights named by a config of timm's form: tensors, a file or folder, a hub repository, a link, or our weight tag.

    Raises:
        ValueError: (as `CheckpointError`) if the config names none, none can be downloaded, or they are damaged.
        HubError: (an OSError) if the network does not let them through.
    """
    if cfg.get("state_dict"):
        return cfg["state_dict"]
    if file := cfg.get("file"):
        return _read_folder(Path(file)) if Path(file).is_dir() else read_file(Path(file))
    if hub := cfg.get("hf_hub_id"):
        repository, _, revision = hub.partition("@")
        return read_file(_hub_weights(repository, revision or None, cfg.get("hf_hub_filename"), cache_dir))
    if url := cfg.get("url"):
        return read_file(download(url, _cache(cache_dir) / _file_name(url)))
    name = cfg.get("architecture", "this model")
    for weights in published(name):
        if weights.tag == cfg.get("tag"):
            return read_file(fetch(weights, cache_dir))
    raise CheckpointError(
        f"pretrained=True, but no working download of {name} is known; pass checkpoint_path=FILE with the authors'"
        f" file, or pretrained=False{f' ({why})' if (why := UNPUBLISHED.get(name)) else ''}"
    )


def fetch(weights: Weights, cache_dir: str | Path | None = None) -> Path:
    """A local copy of published weights, downloaded where there is none.

    Looked for in turn: the cache (`cache_dir`, else `checkpoints` of torch.hub's folder), the places of the environment
    variable STRIATE_MIRRORS, the authors' link, copies on a hub. HF_HUB_OFFLINE leaves out what needs the network.

    Raises:
        ValueError: (as `CheckpointError`) if there is no place to fetch them from.
        HubError: (an OSError) if none of the places gives them.
    """
    target = _cache(cache_dir) / weights.file
    if target.is_file():
        if _is_whole(target, weights.sha256):
            return target
        logger.warning("%s is not the published file, so it is fetched again", target)
    failures = []
    for source in _sources(weights):
        try:
            return _from_source(source, target, weights.sha256, cache_dir)
        except (OSError, MissingFileError) as error:
            failures.append(f"{re.sub('//[^/]*@', '//', source)}: {error or type(error).__name__}")
    if not failures:
        raise CheckpointError(_by_hand(weights))
    raise UnreachableError(f"{weights.name} could not be fetched. {'; '.join(failures)}. {_advice(weights)}")


def _sources(weights: Weights) -> Iterator[str]:
    """Addresses, folders and `hf:` names, in the order in which they are tried."""
    for base in filter(None, map(str.strip, os.environ.get(MIRRORS, "").split(","))):
        if urlsplit(base).scheme in ("http", "https", "file"):
            yield f"{base.rstrip('/')}/{quote(weights.file)}"
        else:
            yield str(Path(base).expanduser() / weights.file)
    if weights.working_link:
        yield weights.working_link
    yield from weights.mirrors


def _from_source(source: str, target: Path, checksum: str | None, cache_dir: str | Path | None) -> Path:
    if source.startswith("hf:"):
        repository, file = hub_place(source)
        return _hub_weights(repository, None, file, cache_dir)
    if source.startswith(("http://", "https://")):
        return download(source, target, checksum)
    path = Path(url2pathname(urlsplit(source).path) if source.startswith("file:") else source)
    if not path.is_file():
        raise MissingFileError("no such file")
    if not _is_whole(path, checksum):
        raise DamagedFileError("its sha256 is not that of the published file")
    return path


def download(url: str, target: Path, checksum: str | None = None) -> Path:
    """Fetch the file at `url` to `target`, which appears whole or not at all; what is there already stays.

    A download that breaks off leaves `target.part` and goes on from there the next time, if the server says that the
    file is still the same. Of several processes one downloads, and the others wait for it.

    Raises:
        HubError: (an OSError) if its sha256 is not `checksum`, the server does not give it, or HF_HUB_OFFLINE is set.
        OSError: if it cannot be written.
    """
    if constants.HF_HUB_OFFLINE:
        raise UnreachableError("HF_HUB_OFFLINE is set")
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.with_name(f"{target.name}.lock")):
        if target.is_file() and _is_whole(target, checksum):
            return target
        part = target.with_name(f"{target.name}.part")
        try:
            patiently(lambda: _transfer(url, part), WAITS)
        except HTTPError as error:
            response = getattr(error, "response", None)
            said = str(error) if response is None else f"the answer is {response.status_code}"
            raise UnreachableError(said or type(error).__name__) from error
        _note(part).unlink()
        if not _is_whole(part, checksum):
            part.unlink()
            raise DamagedFileError("its sha256 is not that of the published file")
        part.replace(target)
    return target


def _transfer(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file at `url`, or start anew if that may be another file by now."""
    note = _note(part)  # where the part is from, and what its server calls that version of the file
    origin, _, version = note.read_text().partition("\n") if note.is_file() else ("", "", "")
    done = part.stat().st_size if part.is_file() and origin == url and version else 0
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": version}
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    ) as answer:
        resumes = answer.status_code == 206
        begins = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if done and (answer.status_code == 416 or (resumes and (begins is None or int(begins[1]) != done))):
            note.unlink()
            return _transfer(url, part)
        answer.raise_for_status()
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise OSError("the answer is a web page, not a file")
        tag = answer.headers.get("ETag", "")
        note.write_text(f"{url}\n{answer.headers.get('Last-Modified', '') if not tag or tag.startswith('W/') else tag}")
        done = done if resumes else 0
        total = done + int(length) if (length := answer.headers.get("Content-Length")) else None
        with (
            part.open("ab" if resumes else "wb") as file,
            tqdm(
                total=total, initial=done, desc=part.stem, unit="B", unit_scale=True, disable=None, leave=False
            ) as progress,
        ):
            for chunk in answer.iter_raw():
                file.write(chunk)
                progress.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{part.stat().st_size} bytes came, not {total}")


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _is_whole(path: Path, checksum: str | None) -> bool:
    return checksum is None or sha256(path) == checksum


def _cache(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir) if cache_dir else Path(torch.hub.get_dir(), "checkpoints")


def _file_name(url: str) -> str:
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    if not name:
        raise CheckpointError(f"url={url!r} names no file")
    return name


def _hub_weights(repository: str, revision: str | None, name: str | None, cache_dir: str | Path | None) -> Path:
    """The weights of a repository: safetensors, or a pickle where the hub says that there are none."""
    if name is not None:
        return hub_file(repository, name, revision, cache_dir=cache_dir)
    try:
        return hub_file(repository, WEIGHTS_NAMES[0], revision, cache_dir=cache_dir)
    except MissingFileError:
        path = hub_file(repository, WEIGHTS_NAMES[1], revision, cache_dir=cache_dir)
        logger.warning("%s has no %s; %s is read instead", repository, *WEIGHTS_NAMES[:2])
        return path


def _read_folder(folder: Path) -> Mapping[str, Any]:
    others = sorted(p for suffix in WEIGHTS_SUFFIXES for p in folder.glob(f"*{suffix}"))
    found = [path for name in WEIGHTS_NAMES if (path := folder / name).is_file()] or others
    if not found:
        raise CheckpointError(f"no weights in {folder}; {', '.join(WEIGHTS_NAMES)} are looked for")
    if found is others and len(others) > 1:
        raise CheckpointError(f"{folder} holds {', '.join(p.name for p in others)}; name one of them")
    try:
        return read_file(found[0])
    except CheckpointError as error:
        raise CheckpointError(f"the weights in {folder} cannot be read safely: {error}") from error


def _by_hand(weights: Weights) -> str:
    reason = f"their link is dead: {weights.dead}" if weights.dead else "the authors' page needs a browser"
    return f"pretrained=True, but no working download of {weights.name} is known: {reason}. {_advice(weights)}"


def _advice(weights: Weights) -> str:
    note = f" ({weights.note})" if weights.note else ""
    return (
        f"The authors' page is {weights.page}{note}. Pass checkpoint_path=FILE with their file, or put it as"
        f" {weights.file} into a folder that {MIRRORS} names"
    )
