"""One import name from a wheel, an editable install and a bare checkout, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ["ops", "backbones", "hub", "detection", "segmentation", "train", "configs"]
SHIPPED = ["LICENSE", "README.md", "pyproject.toml", "striate", *FOLDERS]

USE = """
import sys, striate
assert not {"torch", "timm", "jsonargparse", "huggingface_hub"} & sys.modules.keys(), "import striate is not lazy"
import importlib.resources, importlib.util, torch
model = striate.create_model("biformer_nano", num_classes=3).eval()
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
assert importlib.resources.files("striate").joinpath("py.typed").is_file()
assert importlib.resources.files("striate.configs").joinpath("biformer/nano_fashion.yaml").is_file()
assert importlib.resources.files("striate.train.datasets").joinpath("fashion_mnist_subset.npz").is_file()
print("FOUND", striate.__file__, striate.__version__)
"""
STRAY = f"""
import importlib.util
found = [n for n in {[*FOLDERS, "tests"]} if importlib.util.find_spec(n)]
assert not found, found
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Output of a command that knows nothing of this checkout; fails with what it said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "COV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is shipped, in a folder of another name: building leaves files behind."""
    target = tmp_path_factory.mktemp("packaging") / "some-checkout"
    target.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    (target / "conftest.py").write_text("raise ImportError")  # a stray file of the root must not be packaged
    return target


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    folder = source.parent / "dist"
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, source, cwd=source.parent)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Python of an environment that has the dependencies of this one, but no striate."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    ours = Path(run(sys.executable, "-c", "import torch; print(torch.__path__[0])", cwd=tmp_path).strip()).parent
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for entry in ours.iterdir():  # links, since the site-packages of this environment may hold an installed striate
        if "striate" not in entry.name:
            (borrowed / entry.name).symlink_to(entry)
    (Path(site) / "borrowed.pth").write_text(f"{borrowed}\n")
    return python


def install(python: Path, what: Path | str, cwd: Path, *options: str) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--no-build-isolation", *options, what, cwd=cwd)


def test_packages_are_those_of_the_tree() -> None:
    table = PROJECT["tool"]["setuptools"]
    folders = {"striate": "striate"}
    for top in FOLDERS:
        for file in sorted((ROOT / top).rglob("__init__.py")):
            folder = file.parent.relative_to(ROOT)
            folders["striate." + ".".join(folder.parts)] = str(folder)
    assert sorted(table["packages"]) == sorted(folders)
    assert table["package-dir"] == folders
    for top in {folder.split("/")[0] for folder in folders.values()} - {"configs"}:  # whose files are data
        loose = [p for p in (ROOT / top).rglob("*.py") if not (p.parent / "__init__.py").is_file()]
        assert loose == []


def test_wheel_holds_the_package_and_nothing_else(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"striate", wheel.name.split("-py3")[0] + ".dist-info"}
    expected = {f"striate/{p.relative_to(ROOT)}" for top in SHIPPED[4:] for p in (ROOT / top).rglob("*.py")}
    data = {f"striate/{p.relative_to(ROOT)}" for suffix in ("*.yaml",) for p in (ROOT / "configs").rglob(suffix)}
    data |= {"striate/__init__.py", "striate/py.typed", "striate/train/datasets/fashion_mnist_subset.npz"}
    data |= {"striate/train/datasets/FASHION_MNIST_LICENSE.txt"}
    modules = {name for name in names if name.startswith("striate/") and name.endswith(".py")}
    assert modules == expected | {"striate/__init__.py"}
    assert data <= names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_wheel_in_a_fresh_environment(wheel, fresh, tmp_path) -> None:
    install(fresh, wheel, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = run(fresh, "-c", STRAY + USE, cwd=elsewhere)
    assert str(tmp_path / "venv") in found
    assert "train" in run(fresh.parent / "striate", "--help", cwd=elsewhere)
    assert run(fresh, "-m", "striate.train", "--help", cwd=elsewhere)
    # beside a checkout the installed copy is not mixed with it: the folder python starts in wins as a whole
    assert str(ROOT / "striate") in run(fresh, "-c", USE, cwd=ROOT)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install(mode, source, fresh, tmp_path) -> None:
    options = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    install(fresh, source, tmp_path, *options, "--editable")
    found = run(fresh, "-c", STRAY + USE, cwd=tmp_path)
    assert str(tmp_path / "venv") not in found


def test_bare_checkout(source, fresh) -> None:
    assert str(source) in run(fresh, "-c", USE, cwd=source)
    assert "train" in run(fresh, "-m", "striate.train.cli", "--help", cwd=source)


def test_help_and_import_load_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["striate", "--help"]
from striate.train.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
heavy = {"torch", "torchvision", "timm", "numpy", "huggingface_hub", "safetensors"} & sys.modules.keys()
assert not heavy, heavy
"""
    assert "usage: striate" in run(sys.executable, "-c", code, cwd=ROOT)


def test_importing_works_without_triton() -> None:
    code = 'import sys; sys.modules["triton"] = None\n' + USE
    assert "FOUND" in run(sys.executable, "-c", code, cwd=ROOT)


def test_public_names() -> None:
    code = """
import striate
assert set(striate.__all__) <= set(dir(striate))
for name in striate.__all__:
    assert getattr(striate, name) is not None
try:
    striate.creat_model
except AttributeError as error:
    assert "create_model" in str(error)
else:
    raise AssertionError
"""
    run(sys.executable, "-c", code, cwd=ROOT)


def test_versions_and_bounds() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    bounds = dict(d.split(">=") for d in PROJECT["project"]["dependencies"])
    assert bounds.keys() >= {"torch", "torchvision", "timm", "huggingface_hub", "safetensors", "jsonargparse", "pyyaml"}
    assert "triton" not in bounds
