"""Where models live besides the registry: folders of this machine and repositories of a hub."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id

from ..backbones._hub_files import Access, HubFiles, MissingFileError, UnreachableError

logger = logging.getLogger("striate")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
RECIPE = "recipe.yaml"
COMMAND = "recipe.txt"
METRICS = "metrics.json"
FILES = (CONFIG, WEIGHTS, CARD, RECIPE, COMMAND, METRICS)

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


class Repository:
    """The files of a source. Everything fetched from a hub comes from one commit: that of the first file."""

    def __init__(self, source: Source, access: Access | None = None) -> None:
        self.source = source
        self.hub = HubFiles(source.location, source.revision, access) if source.kind == HUB else None

    def file(self, name: str) -> Path:
        """A local copy of one file.

        Raises:
            MissingFileError: (a ValueError) the source has no such file.
            ValueError: the source is no folder.
            HubError: the hub, the network, the rights or the disk do not let it through; see `HubFiles.file`.
        """
        try:
            return self._local(name) if self.hub is None else self.hub.file(name)
        except MissingFileError as error:
            raise MissingFileError(f"{error}; {_why_needed(name)}") from error

    def optional_file(self, name: str) -> Path | None:
        """The same, or None if the source has no such file, or none in the cache while HF_HUB_OFFLINE is set."""
        try:
            return self.file(name)
        except MissingFileError:
            return None
        except UnreachableError as error:
            if not constants.HF_HUB_OFFLINE:
                raise
            logger.warning("%s is left out: %s", name, error)
            return None

    def _local(self, name: str) -> Path:
        folder = Path(self.source.location)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; {self.source} needs one with {CONFIG} and {WEIGHTS}")
        path = folder / name
        if not path.is_file():
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".safetensors"))
            found = f" (it has {', '.join(others)})" if name == WEIGHTS and others else ""
            raise MissingFileError(f"{folder} has no {name}{found}")
        return path


def _why_needed(name: str) -> str:
    if name == WEIGHTS:
        return "other weight files are not read unasked; pass checkpoint_path=FILE, or pretrained=False for none"
    return "was it written by striate.push or timm?"
