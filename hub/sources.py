"""Where models live besides the registry: folders of this machine and repositories of a hub."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger("striate")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
FILES = (CONFIG, WEIGHTS, CARD)

LOCAL, HUB = "local-dir", "hf-hub"
_PREFIX = re.compile(r"([a-zA-Z][\w+.-]+):(.*)", re.DOTALL)  # two letters or more: C:\ is a drive


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder (`kind` local-dir) or a repository `org/name` at a branch, tag or commit (`kind` hf-hub)."""

    kind: str
    location: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.location}" + (f"@{self.revision}" if self.revision else "")


def parse_source(name: str) -> Source | None:
    """Split `local-dir:PATH` or `hf-hub:org/name[@revision]`; None for a plain model name.

    Raises:
        ValueError: for another prefix, nothing after it, a malformed repository name, or a path without a prefix.
    """
    match = _PREFIX.fullmatch(name)
    if match is None:
        if any(character in name for character in "/\\:"):
            raise ValueError(
                f"model name {name!r} looks like a repository or a folder; write 'hf-hub:{name}' for a repository of"
                f" the Hugging Face Hub or 'local-dir:{name}' for a folder"
            )
        return None
    kind, location = match[1].lower(), match[2]
    if kind not in (LOCAL, HUB):
        raise ValueError(f"unknown prefix {kind!r} in {name!r}; use local-dir:PATH or hf-hub:org/name[@revision]")
    if kind == LOCAL:
        if not location:
            raise ValueError(f"no folder after {name!r}; write local-dir:PATH")
        return Source(LOCAL, str(Path(location).expanduser()))
    repository, _, revision = location.partition("@")
    if not repository or ("@" in location and not revision):
        raise ValueError(f"{name!r} is incomplete; write hf-hub:org/name or hf-hub:org/name@revision")
    validate_repo_id(repository)
    return Source(HUB, repository, revision or None)


def parse_address(address: str) -> Source:
    """The same for `push` and `pull`, where a plain `org/name[@revision]` is a repository.

    Raises:
        ValueError: as `parse_source`, and for anything else without a prefix.
    """
    if not _PREFIX.fullmatch(address) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@.+)?", address):
        address = f"{HUB}:{address}"
    source = parse_source(address)
    if source is None:
        raise ValueError(
            f"{address!r} is no address; write local-dir:{address} for a folder or org/{address} for a hub"
        )
    return source


class MissingFileError(ValueError):
    """A source that is there, but lacks a file."""


class Repository:
    """The files of a source. Everything fetched from a hub comes from one commit: that of the first file."""

    def __init__(self, source: Source, cache_dir: str | Path | None = None) -> None:
        self.source, self.cache_dir = source, cache_dir
        self.revision = source.revision

    def file(self, name: str) -> Path:
        """A local copy of one file.

        Raises:
            ValueError: if the source has no such file (as `MissingFileError`), or it arrives damaged twice. Failures
                of the network and of access rights pass through as huggingface_hub raises them: an absent answer is
                never taken for an absent file.
        """
        if self.source.kind == LOCAL:
            return self._local(name)
        path = self._download(name)
        self.revision = path.parent.name  # …/snapshots/COMMIT/name
        if is_damaged(path):
            logger.warning("%s of %s is damaged, so it is fetched once more", name, self.source)
            path = self._download(name, force=True)
            if is_damaged(path):
                path.resolve().unlink()
                raise ValueError(
                    f"{name} of {self.source} arrives damaged: its checksum is not the one that the hub gives. Try"
                    " again later or from another network"
                )
        return path

    def _download(self, name: str, force: bool = False) -> Path:
        try:
            found = hf_hub_download(
                self.source.location,
                name,
                revision=self.revision,
                cache_dir=self.cache_dir,
                library_name="striate",
                force_download=force,
            )
        except RemoteEntryNotFoundError as error:
            raise MissingFileError(f"{self.source} has no {name}; {_why_needed(name)}") from error
        return Path(found)

    def optional_file(self, name: str) -> Path | None:
        """The same, or None if the source has no such file."""
        try:
            return self.file(name)
        except MissingFileError:
            return None

    def _local(self, name: str) -> Path:
        folder = Path(self.source.location)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; {self.source} needs one with {CONFIG} and {WEIGHTS}")
        path = folder / name
        if not path.is_file():
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".safetensors"))
            found = f" (it has {', '.join(others)})" if name == WEIGHTS and others else ""
            raise MissingFileError(f"{folder} has no {name}{found}; {_why_needed(name)}")
        return path


def is_damaged(path: Path) -> bool:
    """Whether a file in huggingface_hub's cache differs from what the hub has, which the client itself does not check.

    The cache links a file to one named by its checksum: sha256 of large files, git's sha1 of small ones. Where it
    cannot make links, nothing is known, and nothing found.
    """
    if not path.is_symlink():
        return False
    wanted = Path(os.readlink(path)).name  # one step: a blob that repositories share is behind another link
    if re.fullmatch("[0-9a-f]{64}", wanted):
        return sha256(path) != wanted
    if re.fullmatch("[0-9a-f]{40}", wanted):
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() != wanted
    return False


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _why_needed(name: str) -> str:
    if name == WEIGHTS:
        return "other weight files are not read unasked; pass checkpoint_path=FILE, or pretrained=False for none"
    return "was it written by striate.push or timm?"
