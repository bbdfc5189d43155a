"""A folder of files published as one commit: asked about before, tried again if it may be, and compared afterwards."""

from __future__ import annotations

import re
import time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from .. import __version__
from ..backbones._hub_files import (
    WAITS,
    Access,
    AccessError,
    DamagedFileError,
    HubError,
    NotFoundError,
    checksum,
    explained,
    explaining,
    in_words,
    is_transient,
    patiently,
)
from .sources import FILES, Source


class Upload:
    """A push to a branch of a repository that may not exist yet. Making one asks, and changes nothing.

    Attributes:
        head: the commit that the push builds on; None if there is no such repository.

    Raises:
        ValueError: the target is a commit.
        HubError: there is no token, the hub refuses it, or there is no such branch.
    """

    def __init__(self, target: Source, access: Access) -> None:
        if target.revision and re.fullmatch("[0-9a-f]{40}", target.revision):
            raise ValueError(f"{target} is a commit, which cannot change; name a branch, or none for main")
        self.name, self.branch, self.access = target.location, target.revision or "main", access
        self.target = target
        self.api = HfApi(access.endpoint, access.token, "striate", __version__)
        if not access.has_token:
            raise AccessError(f"nobody is logged in, so nothing can be published as {target}; {access.how_to_log_in}")
        self.head = self._find_head()

    def publish(self, folder: Path, message: str, private: bool | None = None, tag: str | None = None) -> str:
        """Commit the files of `folder`, and remove those of `FILES` that it lacks, all at once; the commit.

        Where the repository holds just these files, nothing is committed again.

        Raises:
            ValueError: `tag` is taken by other files.
            HubError: the hub refuses or fails. The branch is then as it was, but for a failure that says otherwise.
        """
        wanted = {file: folder / file if (folder / file).is_file() else None for file in FILES}
        with explaining(self.name, self.access, self.branch):
            if self.head is None:
                self.head = self._create(private)
            elif tag and (tagged := self._tagged(tag)):
                if not self._holds(tagged, wanted):
                    raise ValueError(f"tag {tag} of {self.name} is at {tagged[:7]}, other files; choose a new tag")
                return tagged
            commit = self._commit(wanted, message)
            if not self._holds(commit, wanted):
                raise DamagedFileError(
                    f"{self.name} has other bytes at {commit} than were sent: their checksums differ; push again"
                )
            if tag:
                self._set_tag(tag, commit)
            return commit

    def _find_head(self) -> str | None:
        with explaining(self.name, self.access, self.branch):
            try:
                return self._head()
            except GatedRepoError:
                raise
            except RepositoryNotFoundError as error:
                if self.target.revision in (None, "main"):
                    return None
                raise NotFoundError(
                    f"there is no {self.name}, and a new repository has no branch {self.branch!r}; push to main first"
                ) from error

    def _head(self) -> str:
        sha = patiently(lambda: self.api.repo_info(self.name, revision=self.branch)).sha
        if sha is None:
            raise HubError(f"{self.access.url} does not say which commit {self.name} is at; it is no hub")
        return sha

    def _create(self, private: bool | None) -> str:
        try:
            patiently(lambda: self.api.create_repo(self.name, private=private))
        except HTTPError as error:
            response = getattr(error, "response", None)
            if response is None or response.status_code != 409:  # an earlier try made it, and its answer was lost
                raise
        return self._head()

    def _commit(self, wanted: dict[str, Path | None], message: str) -> str:
        for wait in (*WAITS, None):
            try:
                return self.api.create_commit(
                    self.name,
                    self._operations(wanted),
                    commit_message=message,
                    revision=self.branch,
                    parent_commit=self.head,
                ).oid
            except HTTPError as error:
                if arrived := self._moved(wanted, error):
                    return arrived
                if wait is None or not is_transient(error):
                    raise
                time.sleep(wait)
            except RuntimeError as error:  # of the upload of large files
                raise HubError(f"{error} ({in_words(error.__cause__ or error)}); nothing was published") from error
        raise AssertionError("the last try returns or raises")

    def _operations(self, wanted: dict[str, Path | None]) -> list[CommitOperationAdd | CommitOperationDelete]:
        old = [file for file, path in wanted.items() if path is None]
        stale = {item.path for item in self._listed(str(self.head), old)} if old else set()
        adds = [CommitOperationAdd(file, path) for file, path in wanted.items() if path is not None]
        return [*adds, *(CommitOperationDelete(file) for file in sorted(stale))]

    def _moved(self, wanted: dict[str, Path | None], error: HTTPError) -> str | None:
        """The head if it has these files although the commit failed, so that only the answer was lost."""
        head = self._head()
        if head == self.head:
            return None
        if self._holds(head, wanted):
            return head
        raise HubError(
            f"{self.name} was changed by somebody else meanwhile; nothing was published, push again"
        ) from error

    def _holds(self, commit: str, wanted: dict[str, Path | None]) -> bool:
        found = {
            item.path: item.lfs.sha256 if item.lfs else item.blob_id for item in self._listed(commit, list(wanted))
        }
        files = {file: path for file, path in wanted.items() if path is not None}
        return found.keys() == files.keys() and all(
            checksum(path, found[file]) == found[file] for file, path in files.items()
        )

    def _listed(self, commit: str, files: list[str]) -> list[RepoFile]:
        found = patiently(lambda: self.api.get_paths_info(self.name, files, revision=commit))
        return [item for item in found if isinstance(item, RepoFile)]

    def _tagged(self, tag: str) -> str | None:
        refs = patiently(lambda: self.api.list_repo_refs(self.name))
        return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)

    def _set_tag(self, tag: str, commit: str) -> None:
        try:
            patiently(lambda: self.api.create_tag(self.name, tag=tag, revision=commit, exist_ok=True))
        except HTTPError as error:
            reason = explained(error, self.name, self.access, commit)
            raise type(reason)(f"{self.name} is published at {commit}, but has no tag {tag}: {reason}") from error
