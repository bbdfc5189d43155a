"""WebDataset shards as a data set with an index."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")


class ShardReader:
    """Images and class numbers in WebDataset shards: tar files in which `key.jpg` and `key.cls` are one sample.

    The shards are files, so every image can be found by its place in them, and a run can be resumed to the step, which
    a stream of them does not allow. All headers are read when the shards are opened, and no file is held open.

    Args:
        root, split: the shards are `root/split-*.tar`, or `root/split` for a split with a * in it.
        input_key: extensions of images.
        target_key: key of the class number in `key.json`; None = the number is the content of `key.cls`.

    Raises:
        FileNotFoundError: there are no such shards.
        ValueError: a shard is no tar file, or a sample lacks its image or its class number.
    """

    def __init__(
        self, root: Path, split: str, input_key: str = "jpg;jpeg;png;webp", target_key: str | None = None
    ) -> None:
        pattern = split if "*" in split else f"{split}-*.tar"
        self.shards = sorted(root.glob(pattern))
        if not self.shards:
            raise FileNotFoundError(f"data.root {root} has no shards {pattern}; a split is a name, or a pattern with *")
        self.extensions, self.target_key = set(input_key.lower().split(";")), target_key
        self.names: list[str] = []
        places, labels = [], []
        for number, shard in enumerate(self.shards):
            for name, offset, size, label in self._samples(shard):
                self.names.append(name)
                places.append((number, offset, size))
                labels.append(label)
        self.places, self.labels = np.array(places, np.int64).reshape(-1, 3), np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        shard, offset, size = self.places[index].tolist()
        with self.shards[shard].open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), int(self.labels[index])

    def filename(self, index: int, absolute: bool = False) -> str:
        """The shard and the name in it."""
        shard = self.shards[self.places[index][0]]
        return f"{shard if absolute else shard.name}/{self.names[index]}"

    def _samples(self, shard: Path) -> Iterator[tuple[str, int, int, int]]:
        """Name, place, size and class number of the images of a shard."""
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        target = "json" if self.target_key else "cls"
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    match = _MEMBER.fullmatch(member.name)
                    if match is None or not member.isfile():
                        continue
                    key, extension = match[1], match[2].lower()
                    if extension in self.extensions:
                        images[key] = member
                    elif extension == target:
                        labels[key] = self._label(tar.extractfile(member).read())  # type: ignore[union-attr]
        except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{shard} is not a shard with class numbers in .{target}: {error!r}") from error
        if alone := sorted(images.keys() ^ labels.keys()):
            kind = "class number" if alone[0] in images else "image"
            wanted = f".{target}" if kind == "class number" else " or ".join(f".{e}" for e in sorted(self.extensions))
            raise ValueError(f"{shard}: sample {alone[0]} has no {kind} ({wanted}); see input_key and target_key")
        for key, member in images.items():
            yield member.name, member.offset_data, member.size, labels[key]

    def _label(self, content: bytes) -> int:
        return int(json.loads(content)[self.target_key] if self.target_key else content)
