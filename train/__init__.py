"""Training, evaluation and the `striate` command line.

    from striate.train import load_config, train
    summary = train(load_config("biformer/nano_fashion", {"run.output": "runs/nano", "schedule.epochs": 2}))

Importing this package loads neither torch nor timm; the first use of a name that needs them does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .config import load_config as load_config
    from .evaluate import evaluate as evaluate
    from .evaluate import load_trained as load_trained
    from .loop import train as train

_HOME = {"TrainConfig": "config", "load_config": "config", "evaluate": "evaluate", "load_trained": "evaluate"}
__all__ = [*_HOME, "train"]


def __getattr__(name: str) -> Any:
    home = "loop" if name == "train" else _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{home}", __name__), name)
