"""The order of the house: torch, timm <- ops <- backbones <- hub <- {train, detection <- segmentation}."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "ops": set(),
    "backbones": {"ops"},
    "hub": {"ops", "backbones"},
    "train": {"ops", "backbones", "hub", "configs"},
    "detection": {"ops", "backbones", "hub"},
    "segmentation": {"ops", "backbones", "hub", "detection"},  # one adapter serves both
    "configs": set(),
}
# of other people's packages; elsewhere pyproject.toml decides
MAY_USE = {"ops": {"torch", "triton", "numba", "llvmlite", "numpy"}}
SPLITTING = re.compile(
    r"(window|grid|block|group|patch)s?_?(partition|unpartition|reverse|split|merge|shift)|cyclic|roll"
)
LINES = 600


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, text: str | None = None) -> Iterator[str]:
    """Absolute dotted names that a file imports, at the top or inside functions: `striate.ops.partition`, `torch`."""
    here = ("striate", *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def strays(path: Path, text: str | None = None) -> list[str]:
    """What a file imports from folders to its right, or by a name that only a checkout knows."""
    folder = path.relative_to(ROOT).parts[0]
    forbidden = MAY_IMPORT.keys() - {folder} - MAY_IMPORT[folder]
    known = {"striate", *sys.stdlib_module_names, *MAY_USE.get(folder, ())}
    found = []
    for name in imports(path, text):
        first, _, rest = name.partition(".")
        to_the_right = first == "striate" and rest.split(".")[0] in forbidden
        if to_the_right or first in MAY_IMPORT or (folder in MAY_USE and first not in known):
            found.append(name)
    return found


@pytest.mark.parametrize("folder", [f for f in MAY_IMPORT if (ROOT / f).is_dir()])
def test_imports_point_left(folder) -> None:
    assert {str(p.relative_to(ROOT)): found for p in sources(folder) if (found := strays(p))} == {}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("ops/partition.py", "from ..backbones import swin"),
        ("ops/window_attention/cpu.py", "from ...backbones._base import Backbone"),
        ("ops/position.py", "import timm.layers"),
        ("backbones/swin.py", "def f():\n    from striate.train import loop"),
        ("backbones/swin.py", "from .. import hub"),
        ("backbones/swin.py", "import ops.partition"),
        ("hub/factory.py", "from ..train.config import load_config"),
    ],
)
def test_an_import_to_the_right_is_seen(path, line) -> None:
    assert strays(ROOT / path, line)


def families() -> list[Path]:
    return [path for path in sources("backbones") if not path.name.startswith("_")]


def own_splitting(text: str) -> list[str]:
    """Definitions and calls by which a family would split or roll maps itself, instead of `ops.partition`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and SPLITTING.search(node.name.lower()):
            found.append(node.name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("roll", "unfold"):
            found.append(node.func.attr)
    return found


@pytest.mark.parametrize("path", families(), ids=lambda p: p.stem)
def test_families_split_maps_through_the_one_copy(path) -> None:
    assert own_splitting(path.read_text()) == []


@pytest.mark.parametrize(
    "text", ["def window_partition(x): ...", "class WindowReverse: ...", "y = torch.roll(x, 1)", "y = x.roll(1, 2)"]
)
def test_another_copy_is_seen(text) -> None:
    assert own_splitting(text)


def test_files_are_short() -> None:
    folders = [*MAY_IMPORT, "striate", "tests"]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for f in folders for p in sources(f)}
    assert {name: n for name, n in lengths.items() if n > LINES} == {}
    references = {name: n for name, n in lengths.items() if name.endswith("reference.py")}
    assert references
    assert max(references.values()) <= 80


def test_the_root_holds_no_modules() -> None:
    assert list(ROOT.glob("*.py")) == []
    assert sorted(p.name for p in (ROOT / "striate").iterdir() if p.name != "__pycache__") == [
        "__init__.py",
        "py.typed",
    ]


def test_every_operator_has_its_definition() -> None:
    folders = [p for p in (ROOT / "ops").iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert folders
    for folder in folders:
        assert (folder / "reference.py").is_file(), folder.name
        assert f"from .{folder.name} import" in (ROOT / "ops/__init__.py").read_text()
