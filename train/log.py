"""What a run reports: log.jsonl is the record; the console and TensorBoard show the same numbers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ..hub.folders import write_whole


class RunLog:
    """Writes one JSON line per logged step or evaluation and shows it on the console.

    On a terminal there is a progress bar, elsewhere there are plain lines. Lines of `log.jsonl` after `start_step`
    are removed first: they belong to work that the resumed run does again. Without a path nothing is reported, in
    processes other than the first.
    """

    def __init__(self, path: Path | None, start_step: int, total_steps: int, tensorboard: bool = False) -> None:
        if path is not None:
            _cut_after(path, start_step)
        self._writer = _tensorboard_writer(path.parent, start_step) if tensorboard and path is not None else None
        self._file = None if path is None else path.open("a")
        self._total_steps = total_steps
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=None if path is not None else True,
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._bar.update()

    def train(self, record: dict[str, Any]) -> None:
        """Report the mean loss, learning rate and speed of the steps since the last report."""
        self._write({"type": "train", **record})
        if self._file is None:
            return
        speed = f"{record['images_per_second']:.0f} img/s"
        if self._bar.disable:
            print(
                f"epoch {record['epoch']} step {record['step']}/{self._total_steps} loss {record['loss']:.4f} "
                f"lr {record['lr']:.2e} {speed}",
                file=sys.stderr,
            )
        else:
            self._bar.set_postfix_str(f"epoch {record['epoch']} loss {record['loss']:.3f} {speed}", refresh=False)

    def skipped(self, record: dict[str, Any]) -> None:
        """Report a step that changed no weight, with the ranks and images that it was made of."""
        self._write({"type": "skipped", **record})
        who = f"the loss of rank {record['ranks']}" if record["ranks"] else "the gradient"
        self.message(f"epoch {record['epoch']} step {record['step']}: skipped, {who} is not finite")

    def evaluation(self, record: dict[str, Any], is_best: bool) -> None:
        """Report an evaluation."""
        self._write({"type": "eval", **record})
        best = " (best)" if is_best else ""
        self.message(
            f"epoch {record['epoch']}: top-1 {record['top1']:.2f} % ({record['correct']}/{record['total']}), "
            f"top-5 {record['top5']:.2f} %, loss {record['loss']:.4f}{best}"
        )

    def message(self, text: str) -> None:
        """Say something on the console only."""
        if self._file is not None:
            tqdm.write(text, file=sys.stderr)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in record.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{record['type']}/{key}", value, record["step"])


class Clock:
    """Measures the speed from `step` on."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._began = time.monotonic()

    def elapsed(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that was cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _cut_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = [record for record in read_log(path) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_whole(path, lambda temporary: temporary.write_text(text))


def _tensorboard_writer(folder: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
