"""The folder of a run: config.yaml, log.jsonl, state.pt, last and best weights, summary.json.

Every file but the log is written whole: to a temporary name, flushed to the disk, then renamed, so that whatever
happens the old one or the new one is there. The log only grows; lines after the last saved state are cut off when
the run is resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..hub.folders import write_whole
from .config import TrainConfig, config_changes, dump_config, read_config_file

STATE_FORMAT = 2


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.state = self.path / "state.pt"
        self.summary = self.path / "summary.json"
        self._lock_file: int | None = None

    def weights(self, which: str) -> Path:
        """The weight file "last" or "best"."""
        return self.path / f"{which}.safetensors"

    def check(self, config: TrainConfig) -> None:
        """Refuse a folder that holds something else, or a run of another configuration. Writes nothing.

        Raises:
            ValueError: names what is in the way, or the differing keys.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run.output {self.path} is a file; give a folder")
        if not self.config.is_file():
            found = sorted(entry.name for entry in self.path.glob("*") if entry.suffix not in (".tmp", ".lock"))
            if found:
                raise ValueError(f"run.output {self.path} holds {found[0]} but no config.yaml; give a new folder")
            return
        changes = config_changes(read_config_file(self.config), config)
        if changes and not config.run.allow_config_change:
            raise ValueError(
                f"run.output {self.path} was started with other values ({'; '.join(changes)}); give those again, "
                "another run.output, or --run.allow_config_change true"
            )

    def finished(self, config: TrainConfig) -> dict[str, Any] | None:
        """The summary of the run if it has been carried out with this configuration to its end, else None."""
        if not self.summary.is_file() or config_changes(read_config_file(self.config), config):
            return None
        summary = json.loads(self.summary.read_text())
        return summary if isinstance(summary, dict) else None

    def claim(self) -> None:
        """Make the folder and lock it for this process.

        Raises:
            ValueError: another process trains in this folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # lockf and not flock: forked loader processes must not keep the lock when this one is killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ValueError(f"run.output {self.path} is in use by another process; wait for it or stop it") from error
        self._lock_file = lock

    def release(self) -> None:
        """Give up the lock."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def begin(self, config: TrainConfig) -> None:
        """Write config.yaml, and remove the summary of an earlier schedule, which would make the run look finished."""
        self.summary.unlink(missing_ok=True)
        write_whole(self.config, lambda path: path.write_text(dump_config(config)))

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the training state."""
        write_whole(self.state, lambda path: torch.save({"format": STATE_FORMAT, **state}, path))

    def load_state(self) -> dict[str, Any] | None:
        """The training state on the CPU, or None if the run has not saved one yet.

        Raises:
            ValueError: the file is damaged or of another format.
        """
        if not self.state.is_file():
            return None
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.state} cannot be read ({reason}); delete it to start this run anew") from error
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise ValueError(f"{self.state} is not a training state of format {STATE_FORMAT}; delete it to start anew")
        return state

    def new_shards(self, step: int) -> Path:
        """The folder for the shards of a step; the state names it once they are all there."""
        return self.path / f"shards-{step}"

    def drop_shards(self, but: str) -> None:
        """Remove the shards of other states."""
        for path in self.path.glob("shards-*"):
            if path.name != but:
                shutil.rmtree(path, ignore_errors=True)

    def save_weights(self, which: str, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Replace "last" or "best" by these tensors, with `metadata` as JSON values."""
        tensors = {name: _own_storage(tensor) for name, tensor in state_dict.items()}
        header = {"format": "pt"} | {key: json.dumps(value) for key, value in metadata.items()}
        content = safetensors.torch.save(tensors, header)
        write_whole(self.weights(which), lambda path: path.write_bytes(content))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which marks the run as finished."""
        write_whole(self.summary, lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))


def _own_storage(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy: safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()
