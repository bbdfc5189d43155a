"""`striate detect`, and `striate predict --task detect`."""

from __future__ import annotations

from collections.abc import Sequence

from . import predict as _predict
from . import runner


def main(argv: Sequence[str]) -> int:
    """`striate detect train CONFIG` or `test CONFIG CHECKPOINT`: see `runner.main`."""
    return runner.main(runner.DETECT, argv)


def predict(argv: Sequence[str]) -> int:
    """`striate predict --task detect CONFIG CHECKPOINT IMAGE…`: see `predict.main`."""
    return _predict.main(runner.DETECT, argv)
