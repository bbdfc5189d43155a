"""Files of the Hugging Face Hub: of one commit, compared with their checksums, and a plain word for each failure."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_token

logger = logging.getLogger("striate")

T = TypeVar("T")

_LOGIN = "`hf auth login`, HF_TOKEN, or token="
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
WAITS = (1, 2, 4)  # seconds between tries
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


class HubError(OSError):
    """Something between this machine and a hub failed; huggingface_hub's own error is its `__cause__`."""


class NotFoundError(HubError):
    """No such repository, branch, tag or commit, or a private one."""


class AccessError(HubError):
    """The hub knows who asks, or that nobody does, and refuses."""


class TokenError(AccessError):
    """A token that the hub does not know."""


class UnreachableError(HubError):
    """No network, no answer, or an answer that is not a hub's, and no copy in the cache."""


class DamagedFileError(HubError):
    """A file that is not what its checksum says, again after it was transferred once more."""


class StorageError(HubError):
    """The cache is full or cannot be written to."""


class MissingFileError(ValueError):
    """A source that is there, but lacks a file."""


@dataclasses.dataclass(frozen=True)
class Access:
    """How a hub is reached; what is None is as huggingface_hub has it: its login, HF_ENDPOINT, HF_HUB_CACHE."""

    token: str | bool | None = None
    endpoint: str | None = None
    cache_dir: str | Path | None = None

    @property
    def url(self) -> str:
        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir or constants.HF_HUB_CACHE)

    @property
    def how_to_log_in(self) -> str:
        return f"log in with {_LOGIN}"

    @property
    def has_token(self) -> bool:
        return isinstance(self.token, str) or (self.token is not False and get_token() is not None)


class HubFiles:
    """The files of a repository at a branch, tag or commit. All come from one commit: what the first one found there.

    Attributes:
        commit: its 40 hexadecimal digits, None before the first file.
    """

    def __init__(self, name: str, revision: str | None = None, access: Access | None = None) -> None:
        self.name, self.revision = name, revision
        self.access = access or Access()
        self.commit = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None

    def __str__(self) -> str:
        return f"hf-hub:{self.name}" + (f"@{self.revision}" if self.revision else "")

    def file(self, name: str) -> Path:
        """A copy of one file in the cache, downloaded if it is not there, and then compared with its checksum.

        An answer that says that there is no such file is told from no answer: nothing else is read in its place. Where
        a branch or tag cannot be asked for, the commit that it was last seen at is taken, and a warning of the logger
        `striate` says so, but for HF_HUB_OFFLINE.

        Raises:
            MissingFileError: the commit has no such file.
            HubError: one of its kinds for everything else.
        """
        if self.commit is None:
            self.commit = self._resolve(name)
        path = self._download(name)
        if self._is_damaged(path, name):
            logger.warning("%s of %s is damaged, so it is fetched once more", name, self)
            path = self._download(name, force=True)
            if self._is_damaged(path, name):
                path.resolve().unlink()
                raise DamagedFileError(
                    f"{name} of {self} arrives damaged: its checksum is not the one that the hub gives. Try again"
                    " later or from another network"
                )
        return path

    def _resolve(self, name: str) -> str:
        revision = self.revision or constants.DEFAULT_REVISION
        known = try_to_load_from_cache(self.name, name, self.access.cache, revision)
        waits = () if isinstance(known, str) else WAITS
        try:
            commit, _ = patiently(lambda: self._metadata(name, revision), waits)
        except RemoteEntryNotFoundError as error:
            raise MissingFileError(f"{self} has no {name}") from error
        except (OSError, HTTPError) as error:
            reason = explained(error, self.name, self.access, revision)
            if not isinstance(known, str) or isinstance(error, RevisionNotFoundError):
                raise reason from error
            if not isinstance(error, OfflineModeIsEnabled):
                logger.warning("%s; the copy in %s is taken", reason, self.access.cache)
            return Path(known).parent.name
        self._remember(commit)
        return commit

    def _metadata(self, name: str, revision: str) -> tuple[str, str]:
        """Commit and checksum, as the headers of a file give them."""
        url = hf_hub_url(self.name, name, revision=revision, endpoint=self.access.endpoint)
        found = get_hf_file_metadata(
            url,
            token=self.access.token,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            library_name="striate",
            endpoint=self.access.endpoint,
        )
        if not found.commit_hash or not found.etag:
            raise FileMetadataError("its answer lacks the header X-Repo-Commit or ETag")
        return found.commit_hash, found.etag

    def _remember(self, commit: str) -> None:
        """Note where a branch or tag points, as huggingface_hub's cache does, for when nobody can be asked."""
        folder = self.access.cache / repo_folder_name(repo_id=self.name, repo_type="model")
        ref = folder / "refs" / (self.revision or constants.DEFAULT_REVISION)
        with contextlib.suppress(OSError):  # a cache that is only read serves all the same
            if not ref.is_file() or ref.read_text() != commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit)

    def _download(self, name: str, force: bool = False) -> Path:
        def fetch() -> str:
            return hf_hub_download(
                self.name,
                name,
                revision=self.commit,
                cache_dir=self.access.cache_dir,
                token=self.access.token,
                endpoint=self.access.endpoint,
                library_name="striate",
                force_download=force,
            )

        try:
            with warnings.catch_warnings():  # if the disk is really full, an error follows
                warnings.filterwarnings("ignore", "Not enough free disk space")
                return Path(patiently(fetch))
        except RemoteEntryNotFoundError as error:
            raise MissingFileError(f"{self} has no {name}") from error
        except (OSError, HTTPError, ValueError) as error:
            if isinstance(error, ValueError) and error.__cause__ is None:
                raise
            known = try_to_load_from_cache(self.name, name, self.access.cache, self.commit)
            if known is not None and not isinstance(known, str):  # it is known to be absent
                raise MissingFileError(f"{self} has no {name}") from error
            raise explained(error, self.name, self.access, self.commit) from error

    def _is_damaged(self, path: Path, name: str) -> bool:
        """Whether a file differs from what the hub has, which huggingface_hub itself does not check.

        Its cache links a file to one named by its checksum; where links cannot be made, the hub is asked.
        """
        if path.is_symlink():
            wanted = Path(os.readlink(path)).name  # one step: a blob that repositories share is behind another link
        else:
            try:
                wanted = self._metadata(name, str(self.commit))[1]
            except OfflineModeIsEnabled:
                return False
            except (OSError, HTTPError) as error:
                reason = explained(error, self.name, self.access, self.commit)
                logger.warning("the checksum of %s is not known, so it is not checked: %s", path, reason)
                return False
        return checksum(path, wanted) != wanted


def hub_file(
    repo_id: str,
    name: str,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Path:
    """One file of a repository `org/name`; see `HubFiles.file`."""
    return HubFiles(repo_id, revision, Access(token, endpoint, cache_dir)).file(name)


def checksum(path: Path, like: str) -> str:
    """The checksum of a file by the method that gave `like`: sha256, or git's sha1, which hubs use for small files."""
    if len(like) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return sha256(path)


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def patiently(call: Callable[[], T], waits: Sequence[float] = WAITS) -> T:
    """`call()`, and again after some seconds if the connection broke or the hub is busy.

    It must not matter how often `call` runs.
    """
    for wait in waits:
        try:
            return call()
        except HTTPError as error:
            if not is_transient(error):
                raise
            response = getattr(error, "response", None)
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            time.sleep(min(int(asked), 60) if asked.isdigit() else wait)
    return call()


def is_transient(error: HTTPError) -> bool:
    """Whether it may go better in a moment: the connection broke, or the hub is busy or restarting."""
    response = getattr(error, "response", None)
    return response is None or response.status_code in _TRANSIENT


@contextlib.contextmanager
def explaining(name: str, access: Access, revision: str | None = None) -> Iterator[None]:
    """Raise huggingface_hub's errors of the block as `HubError`."""
    try:
        yield
    except HubError:
        raise
    except (OSError, HTTPError) as error:
        raise explained(error, name, access, revision) from error


def explained(error: BaseException, name: str, access: Access, revision: str | None = None) -> HubError:
    """What an error of huggingface_hub means, and what to do about it."""
    if isinstance(error, (LocalEntryNotFoundError, ValueError)) and error.__cause__ is not None:
        return explained(error.__cause__, name, access, revision)  # they say that something failed, not what
    where = f"{access.url}/{name}"
    if isinstance(error, OfflineModeIsEnabled):
        return UnreachableError(
            f"HF_HUB_OFFLINE is set, and {name} is not in {access.cache}, or not whole; fetch it once with the network"
        )
    if isinstance(error, GatedRepoError):
        return AccessError(f"{where} is gated; ask for access on that page, and log in ({_LOGIN})")
    if isinstance(error, RevisionNotFoundError):
        return NotFoundError(f"{name} has no branch, tag or commit {revision!r}; {where}/tree/main shows what it has")
    if isinstance(error, HfHubHTTPError):
        return _explained_answer(error, where, access)
    if isinstance(error, FileMetadataError):
        return UnreachableError(f"{access.url} does not answer as a hub ({error}); check HF_ENDPOINT, and the proxy")
    number = getattr(error, "errno", None)
    if number in _FULL:
        return StorageError(f"no room in {access.cache} ({error}); free some, or name another place with cache_dir=")
    if number in _UNWRITABLE:
        return StorageError(f"{access.cache} cannot be written to ({error}); name another place with cache_dir=")
    return UnreachableError(f"no answer from {access.url} ({in_words(error)}); check the network, and HF_ENDPOINT")


def _explained_answer(error: HfHubHTTPError, where: str, access: Access) -> HubError:
    status = error.response.status_code
    said = in_words(error)
    if status == 401 and "Invalid credentials" in said:
        return TokenError(f"{access.url} does not know the token; log in again ({_LOGIN})")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        seen = "may not be seen with this token" if access.has_token else f"wants a login ({_LOGIN})"
        return NotFoundError(f"there is no {where}, or it is private and {seen}; check the name")
    if status == 403:
        return AccessError(f"{where} refuses: {said}; the token needs the right to do that ({_LOGIN})")
    return UnreachableError(f"{access.url} answers {status} ({said}); try again later")


def in_words(error: BaseException) -> str:
    """What an error says, in one line."""
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())
