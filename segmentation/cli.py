"""`striate segment`, and `striate predict --task segment`."""

from __future__ import annotations

from collections.abc import Sequence

from ..detection import predict as _predict
from ..detection import runner


def main(argv: Sequence[str]) -> int:
    """`striate segment train CONFIG` or `test CONFIG CHECKPOINT`: see `detection.runner.main`."""
    return runner.main(runner.SEGMENT, argv)


def predict(argv: Sequence[str]) -> int:
    """`striate predict --task segment CONFIG CHECKPOINT IMAGE…`: see `detection.predict.main`."""
    return _predict.main(runner.SEGMENT, argv)
