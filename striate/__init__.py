"""Vision backbones with windowed, routed, linear, spiking and binary attention.

    >>> import striate
    >>> model = striate.create_model("biformer_tiny", num_classes=10)

Importing `striate` loads neither torch nor timm; the first use of a public name does. Our models are registered with
timm as soon as both are imported, in whatever order.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

# In a checkout the sub-packages lie beside this folder (`ops/` is `striate.ops`); an installed copy has them inside it.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "backbones" / "_registry.py").is_file() and str(_ROOT) not in __path__:
    __path__.append(str(_ROOT))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from striate.backbones import list_models as list_models
    from striate.backbones import load_checkpoint as load_checkpoint
    from striate.backbones import model_info as model_info
    from striate.backbones import optimize_for_inference as optimize_for_inference
    from striate.hub import create_model as create_model
    from striate.hub import pull as pull
    from striate.hub import push as push

_HOME = {
    "create_model": "hub",
    "list_models": "backbones",
    "load_checkpoint": "backbones",
    "model_info": "backbones",
    "optimize_for_inference": "backbones",
    "pull": "hub",
    "push": "hub",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _RegisterWithTimm(importlib.abc.MetaPathFinder):
    """Registers our models right after `timm.models` is first imported, so that `import striate` need not import it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            importlib.import_module(f"{__name__}.backbones")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "timm.models" in sys.modules:
    importlib.import_module(f"{__name__}.backbones")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())
