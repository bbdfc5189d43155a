"""What the loopback Hub of `hub_server` keeps: users, repositories, commits, and files, some of them in a xet store.

The store is a folder. The hub hands out `local://FOLDER` as its address, and the client writes to it and reads from it
by itself; what the hub learns is in the folder's shards, from the sha256 of a file to its hash in the store. A shard
(`*.mdb`) lists from byte 48, per file, a record of 48 bytes (hash, flags u32, count u32), then `count` segments of 48
bytes, as many again if bit 31 of the flags is set, and one record that begins with the sha256 if bit 30 is; the list
ends with a hash of ones. Two processes cannot use one folder at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

_RECORD = 48
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


@dataclasses.dataclass(frozen=True)
class XetFile:
    """A file that only the store has."""

    sha256: str
    size: int
    hash: str


@dataclasses.dataclass(frozen=True)
class User:
    """Whom a token belongs to; `can_write` is the role of the token in the namespaces of `name` and `orgs`."""

    name: str
    orgs: tuple[str, ...] = ()
    can_write: bool = True


@dataclasses.dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool
    xet: XetFile | None = None  # then the data are in the store alone

    @property
    def sha256(self) -> str:
        return self.xet.sha256 if self.xet else hashlib.sha256(self.data).hexdigest()

    @property
    def size(self) -> int:
        return self.xet.size if self.xet else len(self.data)

    @property
    def git_oid(self) -> str:
        data = self.sha256.encode() if self.xet else self.data  # git has a pointer
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclasses.dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclasses.dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)  # uploaded by LFS, committed or not

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        listing = sorted((path, blob.oid) for path, blob in files.items())
        oid = hashlib.sha1(repr((self.name, len(self.commits), parent, title, listing)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, dict(files))
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, oid: str | None) -> Iterator[Commit]:
        while oid is not None:
            yield self.commits[oid]
            oid = self.commits[oid].parent


def find_in_store(folder: Path, sha256: str, size: int) -> XetFile | None:
    """The file in the store with this sha256."""
    for shard in sorted(folder.rglob("*.mdb")):
        if hash_ := _table(shard.read_bytes()).get(sha256):
            return XetFile(sha256, size, hash_)
    return None


def _table(shard: bytes) -> dict[str, str]:
    table, at = {}, _RECORD
    while (hash_ := shard[at : at + 32]) != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += _RECORD * (1 + count * (2 if flags & _HAS_VERIFICATION else 1))
        if flags & _HAS_SHA256:
            table[_hex(shard[at : at + 32])] = _hex(hash_)
            at += _RECORD
    return table


def _hex(hash_: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash_))
