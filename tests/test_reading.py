"""Files of weights: those of training scripts are read, those that hold anything else run nothing and cost little."""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import copy
import gzip
import io
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from striate.backbones import CheckpointError, _pickles, _reading
from striate.backbones._reading import read_file

FORMATS = ("zip", "legacy")
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def save(content: Any, path: Path, kind: str) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def edit(path: Path, change: Callable[[bytes], bytes], entry: str = "data.pkl", method: int = 0) -> None:
    """Rewrite the entry of a zip file of torch."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, value in content.items():
            new.writestr(name, change(value) if name.endswith(f"/{entry}") else value)


def refused(path: Path, words: str, **options: Any) -> str:
    """The text of the error that reading raises."""
    with pytest.raises(CheckpointError, match=words) as caught:
        read_file(path, **options)
    assert isinstance(caught.value, ValueError)
    assert str(path) in str(caught.value)
    return str(caught.value)


def assert_weights(content: Any) -> None:
    state = content.get("model", content)
    assert all(torch.equal(state[key], value) for key, value in WEIGHTS.items())


class Call:
    """Pickled as a call of `function`, and a state for what it returns."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def foreign(monkeypatch) -> Callable[..., type]:
    """Makes a class of a package that is not installed."""

    def make(name: str, base: type = object) -> type:
        module, _, short = name.rpartition(".")
        made = type(short, (base,), {"__module__": module})
        parts = module.split(".")
        for parent in (".".join(parts[: i + 1]) for i in range(len(parts))):
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, types.ModuleType(parent)))
        monkeypatch.setattr(sys.modules[module], short, made, raising=False)
        return made

    return make


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "extra",
    [
        argparse.Namespace(lr=1e-3, opt="adamw", nested=argparse.Namespace(x=[1])),
        types.SimpleNamespace(lr=1e-3),
        pathlib.PurePosixPath("/data/imagenet"),
        pathlib.Path("/data/imagenet"),
        collections.OrderedDict(a=1),
        collections.Counter("abc"),
        torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict(),
        torch.Size((2, 3)),
        torch.float16,
        torch.device("cpu"),
        {1, 2},
        b"bytes",
        bytearray(b"bytes"),
        1j,
        (None, True, 2**70, -1.5, "text"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_training_scripts_save_beside_weights(extra, kind, tmp_path) -> None:
    content = read_file(save({"model": WEIGHTS, "args": extra}, tmp_path / "weights.pth", kind))
    assert_weights(content)
    wanted = pathlib.PurePath(extra) if isinstance(extra, pathlib.Path) else extra
    assert content["args"] == wanted
    assert type(content["args"]) is type(wanted)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        np.float64(71.25), np.float32(3), np.int64(-7), np.bool_(True), np.str_("text"), np.float16(2),
        np.complex64(1j), np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3), np.float32)),
        np.array(["a", "bc"]), np.arange(3, dtype=">i4"), np.array(["a", None, 3], dtype=object), np.zeros((0, 4)),
        np.array(5, np.uint8),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.dtype}",
)  # fmt: skip
def test_numbers_and_arrays_of_numpy(extra, old, kind, tmp_path) -> None:
    path = save({"model": WEIGHTS, "best": extra}, tmp_path / "weights.pth", kind)
    if old and kind == "zip":
        edit(path, lambda content: content.replace(b"numpy._core", b"numpy.core"))
    elif old:
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    content = read_file(path)
    assert_weights(content)
    found = content["best"]
    assert isinstance(found, np.ndarray if isinstance(extra, np.ndarray) else type(extra))
    assert found.dtype == extra.dtype.newbyteorder("=")  # as NumPy itself reads them
    assert np.array_equal(found, extra)


@pytest.mark.parametrize("kind", FORMATS)
def test_dictionaries_of_other_packages(kind, foreign, tmp_path) -> None:
    """Without those packages: as plain dictionaries."""
    node = foreign("yacs.config.CfgNode", dict)
    config = node(MODEL=node(NAME="swin"), LR=1e-3)
    config.__dict__["__immutable__"] = True
    sums = collections.defaultdict(list, {"top1": [1.0, 2.0]})
    content = read_file(save({"model": WEIGHTS, "config": config, "sums": sums}, tmp_path / "weights.pth", kind))
    assert_weights(content)
    assert content["config"] == {"MODEL": {"NAME": "swin"}, "LR": 1e-3}
    assert content["sums"] == {"top1": [1.0, 2.0]}
    assert {type(value) for value in (content["config"], content["sums"])} == {collections.OrderedDict}


@pytest.mark.parametrize("kind", FORMATS)
def test_other_classes_are_named_and_left_out_on_request(kind, foreign, tmp_path) -> None:
    buffer = foreign("mmengine.logging.history_buffer.HistoryBuffer")()
    buffer.history = np.arange(3)
    config = foreign("mmengine.config.ConfigDict", dict)(a=1)
    items = foreign("fvcore.Items", list)([1, 2])
    whole = [nn.Linear(2, 2)] if kind == "zip" else []  # torch's older format saves modules by their source text
    extra = {"hub": [buffer, *whole], "config": config, "items": items, "eval": Call(eval, "1 / 0")}
    path = save({"model": WEIGHTS, "meta": extra}, tmp_path / "weights.pth", kind)
    text = refused(path, "holds more than tensors")
    for name in ("mmengine.config.ConfigDict", "mmengine.logging.history_buffer.HistoryBuffer", "builtins.eval",
                 "fvcore.Items", *(["torch.nn.modules.linear.Linear"] if whole else [])):  # fmt: skip
        assert name in text
    assert "numpy" not in text
    assert "striate convert FILE --inert" in text
    content = read_file(path, inert=True)
    assert_weights(content)
    assert isinstance(content["meta"]["hub"][0], _pickles.Inert)
    assert vars(content["meta"]["hub"][0]) == {}
    assert content["meta"]["config"] == {"a": 1}
    assert content["meta"]["items"] == [1, 2]
    refused(path, "holds more than tensors")  # and only on request


ATTACKS = {
    "os.mkdir": lambda trace: Call(os.mkdir, trace),
    "exec": lambda trace: Call(exec, f"import os; os.mkdir({trace!r})"),
    "subprocess": lambda trace: Call(subprocess.check_call, ["mkdir", trace]),
    "torch": lambda trace: Call(torch.storage._load_from_bytes, _saved(Call(os.mkdir, trace))),
}
PLACES = {
    "weight": lambda evil: {**WEIGHTS, "evil.weight": evil},
    "args": lambda evil: {"model": WEIGHTS, "args": argparse.Namespace(evil=evil)},
    "nested": lambda evil: {"state_dict": {"model": {**WEIGHTS, "x": [({"y": evil},)]}}},
    "array": lambda evil: {"model": WEIGHTS, "best": np.array([evil, None], dtype=object)},
    "defaultdict": lambda evil: {"model": WEIGHTS, "sums": collections.defaultdict(list, a=evil)},
    "tensor": lambda evil: {"model": {**WEIGHTS, "b": Call(torch._utils._rebuild_tensor_v2, evil)}},
}  # fmt: skip


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("kind", [*FORMATS, "pickle", "protocol 4"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_a_file_does_not_run(attack, kind, forced, tmp_path, monkeypatch) -> None:
    for place, wrap in PLACES.items():
        for suffix in (".pth", ".bin", ".safetensors"):
            trace = tmp_path / f"{place} ran"
            path = tmp_path / f"weights{suffix}"
            content = wrap(ATTACKS[attack](str(trace)))
            if kind in FORMATS:
                save(content, path, kind)
            else:
                path.write_bytes(pickle.dumps(content, 2 if kind == "pickle" else 4))
            if forced:
                monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
            text = refused(path, "damaged" if suffix == ".safetensors" else "refused and no code in it ran")
            assert kind not in FORMATS or suffix == ".safetensors" or re.search("mkdir|exec|check_call|from_byt", text)
            if suffix == ".pth":
                with contextlib.suppress(CheckpointError):
                    read_file(path, inert=True)
            assert not trace.exists()
            monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    with contextlib.suppress(Exception):  # the code is live: without protection it runs
        torch.load(path.with_suffix(".pth"), weights_only=False) if kind in FORMATS else pickle.loads(path.read_bytes())
    assert trace.exists()


def test_modules_that_torch_blocks_are_refused_in_any_case(tmp_path) -> None:
    path = save({"model": WEIGHTS, "x": Call(os.mkdir, "x"), "y": Call(eval, "1")}, tmp_path / "w.pth", "zip")
    text = refused(path, r"holds more than tensors \((posix|nt)\.mkdir\).*do not use this file", inert=True)
    assert "--inert" not in text


def test_names_that_look_like_torch_are_left_to_torch(tmp_path) -> None:
    path = save({"model": WEIGHTS}, tmp_path / "w.pth", "zip")
    for name in (b"torch\nload", b"torch.jit\nScriptStorage", b"torch._utils\n_rebuild_everything"):
        edit(path, lambda _, name=name: b"\x80\x02}X\x01\x00\x00\x00ac" + name + b"\nX\x01\x00\x00\x00b\x85Rs.")
        for inert in (False, True):
            refused(path, "refused.*no code in it ran", inert=inert)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_array_that_would_take_bytes_for_pointers(kind, tmp_path) -> None:
    """With NumPy's own classes allowed, its element is an object at any address that the file likes."""
    objects = Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))
    numbers = Call(np.dtype, "i8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
    for dtype, shape, content in (
        (objects, (1,), b"A" * 8),
        (objects, (8,), b"A" * 8),
        (numbers, (1,), [1] * 8),
        (numbers, (2,), b"A" * 8),
        (objects, (2,), [1]),
        (Call(np.dtype, "V8", False, True), (1,), b"A" * 8),
    ):
        array = Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))
        refused(save({"model": WEIGHTS, "x": array}, tmp_path / "w.pth", kind), "NumPy.*no code in it ran")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"weights\.pth is empty; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", r"is a git-lfs pointer.*run `git lfs pull`"),
        (b"<!DOCTYPE html><html>Not found</html>", r"is a web page, not the weights; the download link"),
        (b"\n  <html>", r"is a web page"),
        (b"garbage, not a file of torch", r"weights\.pth is damaged or no file of weights"),
        (pickle.dumps([1, 2]), r"is damaged or a plain pickle \(as detectron2 publishes\).*with torch\.save"),
        (pickle.dumps({"model": {"a": np.ones(3)}}, 2), r"is damaged or a plain pickle"),
        (
            gzip.compress(b"weights", mtime=0),
            r"is compressed \(gzip\); extract it \(`gunzip`.*pass the file of weights",
        ),
        (b"BZh91AY", r"is compressed \(bzip2\); extract it"),
        (b"\xfd7zXZ\x00", r"is compressed \(xz\); extract it"),
        (_saved([1, 2]), r"weights\.pth holds a list, not a state dict"),
        (_saved(torch.ones(2)), r"weights\.pth holds a Tensor, not a state dict"),
    ],
)
def test_files_that_are_no_checkpoints(content, message, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refused(path, message)


def test_archives_are_not_extracted(tmp_path) -> None:
    """No authors publish one; their `.pth.tar` are plain files of torch."""
    weights = save({"model": WEIGHTS}, tmp_path / "model.pth.tar", "zip")
    assert_weights(read_file(weights))
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(weights, "../escaped.pth")
    refused(archive, r"is a zip archive and no file of torch\.save; extract it .*it holds \.\./escaped\.pth")
    for suffix, mode, words in ((".tar", "w", "is a tar archive; extract it"), (".tar.gz", "w:gz", r"`tar -xzf`")):
        with tarfile.open(tmp_path / f"archive{suffix}", mode) as file:  # type: ignore[call-overload]
            file.add(weights, "../escaped.pth")
        refused(tmp_path / f"archive{suffix}", words)
    assert not list(tmp_path.parent.glob("escaped*"))


def test_programs_are_told_from_weights(tmp_path) -> None:
    path = save({"model": WEIGHTS}, tmp_path / "model.pt", "zip")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("model/constants.pkl", b"")
    refused(path, r"is a TorchScript program, not weights; save the state_dict\(\)")


@pytest.mark.parametrize("kind", [*FORMATS, "safetensors"])
@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_truncated_files(kind, share, tmp_path) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(WEIGHTS, path)
    else:
        save({"model": WEIGHTS}, path, kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, r"damaged")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_never_raise_anything_else(kind, tmp_path) -> None:
    """Errors of unpicklers are of nearly any type."""
    random = torch.Generator().manual_seed(0)
    path = save({"model": {"a": torch.zeros(3)}, "best": np.float32(3)}, tmp_path / "weights.pth", kind)
    content = path.read_bytes()
    for _ in range(150):
        broken = bytearray(content)
        for at in torch.randint(len(content), (8,), generator=random).tolist():
            broken[at] = int(torch.randint(256, (), generator=random))
        path.write_bytes(broken)
        with contextlib.suppress(CheckpointError):
            read_file(path)


def test_files_that_do_not_exist(tmp_path) -> None:
    refused(tmp_path / "nothing.pth", r"no checkpoint file .*nothing\.pth")
    refused(tmp_path, r"no checkpoint file")


def header(path: Path, text: str, body: bytes = b"\0" * 8, length: int | None = None) -> Path:
    content = text.encode()
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + body)
    return path


def entry(name: str = "a", shape: Any = (2,), offsets: Any = (0, 8), dtype: str = "F32") -> str:
    return f"{json.dumps(name)}: " + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


@pytest.mark.parametrize(
    ("text", "length", "words"),
    [
        ("{" + entry() + "," + entry() + "}", None, "its header has a twice"),
        ('{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}', None, "header has shape twice"),
        ("{" + entry() + "}", 2**40, "its header claims 1099511627776 bytes"),
        ("{" + entry() + "}", 0, "damaged"),
        ("{" + entry(shape=(3,)) + "}", None, "damaged"),
        ("{" + entry(shape=(2**62, 2**62)) + "}", None, "damaged"),
        ("{" + entry(shape=(-2,)) + "}", None, "damaged"),
        ("{" + entry(offsets=(0, 2**40), shape=(2**38,)) + "}", None, "damaged"),
        ("{" + entry(offsets=(4, 8), shape=(1,)) + "}", None, "damaged"),
        ("{" + entry() + "," + entry("b") + "}", None, "damaged"),
        ("{" + entry(dtype="OBJECT") + "}", None, "damaged"),
        ("{" + '"a":{' * 100_000, None, "damaged"),
        ("{not JSON", None, "damaged"),
    ],
)
def test_headers_of_safetensors(text, length, words, tmp_path) -> None:
    path = header(tmp_path / "weights.safetensors", text, length=length)
    refused(path, words)
    assert torch.equal(read_file(header(path, "{" + entry() + "}"))["a"], torch.zeros(2))
    if length is None:
        refused(header(tmp_path / "weights.bin", text), words)  # told by its content


def with_pickle(content: bytes) -> Callable[[Path], None]:
    """Writes a file of torch whose pickle is `content`."""

    def write(path: Path) -> None:
        save({"model": WEIGHTS}, path, "zip")
        edit(path, lambda _: b"\x80\x02" + content)

    return write


def with_value(make: Callable[[], Any], kind: str = "zip") -> Callable[[Path], None]:
    return lambda path: save({"model": WEIGHTS, "x": make()}, path, kind) and None


def inflated(path: Path) -> None:
    save({"model": WEIGHTS}, path, "zip")
    edit(path, lambda _: bytes(90 << 20), "data/0", zipfile.ZIP_DEFLATED)


def overlapping(path: Path) -> None:
    """A thousand entries that share their bytes."""
    save({"model": {"a": torch.zeros(1 << 18)}}, path, "zip")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("note", b"")  # so that the directory is written again
        shared = next(entry for entry in file.filelist if entry.filename.endswith("data/0"))
        for i in range(1000):
            again = copy.copy(shared)
            again.filename = shared.filename[:-1] + str(i + 1)
            file.filelist.append(again)


def two_directories(path: Path) -> None:
    """A harmless directory where `zipfile` looks for it, and one of a bomb at the offset that torch follows."""
    inflated(path)
    bomb = path.read_bytes()
    save({"model": WEIGHTS}, path, "zip")
    edit(path, lambda content: content)
    end = struct.unpack("<4s4H2LH", bomb[-22:])
    directory = bomb[end[6] : -22]
    harmless = path.read_bytes()
    there = struct.unpack("<4s4H2LH", harmless[-22:])[6]
    moved = bytearray(harmless[there:-22])
    assert len(moved) == len(directory)
    at = 0
    while at < len(moved):  # entries are found relative to where the directory is thought to be
        name, extra, comment, offset = struct.unpack_from("<3H8xL", moved, at + 28)
        struct.pack_into("<L", moved, at + 42, (offset + end[6] - len(directory)) % 2**32)
        at += 46 + name + extra + comment
    body = bomb[: end[6]] + harmless[:there]
    struct.pack_into("<L", tail := bytearray(bomb[-22:]), 16, len(body))
    body_directory = bytearray(directory)
    path.write_bytes(body + body_directory + moved + tail)


def hidden(path: Path) -> None:
    save({"model": {"a": torch.zeros(1).expand(10**12), "b": torch.zeros(1).expand(10**6, 10**6)}}, path, "zip")


def nested(make: Callable[[Any], Any], depth: int) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = make(value)
    return value


def holding_itself() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["model"] = found
    return found


def dictionaries_upside_down(path: Path) -> None:
    """Each is met before the one that holds it, so that none of them is deep where it is met."""
    chain: list[dict[str, Any]] = [{"a": WEIGHTS}]
    for _ in range(150):
        chain.append({"model": chain[-1]})
    save({str(i): value for i, value in enumerate(chain)} | {"model": chain[-1]}, path, "zip")


TEXT = "x" * 1_000_000
BOMBS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "inflated": (inflated, "inflate to far more"),
    "overlapping": (overlapping, "inflate to far more"),
    "two directories": (two_directories, "zip directory is not at its end"),
    "expanded": (hidden, "its tensors claim 8000000000000 bytes"),
    "bytearray": (with_value(lambda: Call(bytearray, 10**12)), "asks for a bytearray of a given length"),
    "tensor": (with_value(lambda: Call(torch.FloatTensor, 10**11)), r"asks for a torch\.FloatTensor of a given size"),
    "storage": (with_value(lambda: Call(torch.UntypedStorage, 10**12), "legacy"), "of a given size"),
    "by way of a type": (
        with_value(lambda: Call(torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (10**12,), {})),
        "makes a tensor by builtins.bytearray",
    ),
    "arguments in a list": (with_pickle(b"c__builtin__\nbytearray\n](J\xff\xff\xff\x7feR."), "that are no tuple"),
    "codec": (with_value(lambda: nested(lambda v: Call(codecs.encode, v or b"x", "hex"), 40)), "encodes text"),
    "copies of bytes": (with_value(lambda: [Call(codecs.encode, TEXT, "latin1") for _ in range(2000)]), "repeats"),
    "copies of lists": (
        with_value(lambda: (lambda items: [Call(set, items) for _ in range(2000)])(list(range(20_000)))),
        "repeats itself into more than",
    ),
    "laughs": (with_pickle(b"})q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s."), "nests tuples .* written out"),
    "deep tuples": (with_value(lambda: nested(lambda v: (v,), 150)), "nests tuples 101 deep"),
    "deep lists": (with_pickle(b"}X\x01\x00\x00\x00x" + b"]" * 20_000 + b"a" * 19_999 + b"s."), "more than 100 deep"),
    "itself": (with_value(holding_itself), "nested more than 100 deep"),
    "upside down": (dictionaries_upside_down, "nested more than 100 deep"),
}  # fmt: skip
MEASURE = """
import json, resource, sys
from pathlib import Path
from striate.backbones._reading import read_file
folder = Path(sys.argv[1])
read_file(folder / "plain.pth")
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)
for path in sorted(folder.glob("*.bomb")):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_file(path)
        said = "it was read"
    except ValueError as error:
        said = str(error)
    print(json.dumps([path.stem, said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and measures memory as Linux does")
def test_bombs_are_refused_within_little_memory(tmp_path) -> None:
    save({"model": WEIGHTS}, tmp_path / "plain.pth", "zip")
    for name, (write, _) in BOMBS.items():
        write(tmp_path / f"{name}.bomb")
    environment = {**os.environ, "PYTHONPATH": str(Path(_reading.__file__).parent.parent)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    results = {name: (said, growth) for name, said, growth in map(json.loads, done.stdout.splitlines())}
    assert results.keys() == BOMBS.keys(), done.stderr
    for name, (_, words) in BOMBS.items():
        said, growth = results[name]
        assert re.search(words, said), (name, said)
        assert growth < 150 << 10, (name, growth)  # KiB


def test_a_header_that_is_too_long_to_be_read(tmp_path, monkeypatch) -> None:
    path = header(tmp_path / "weights.safetensors", "{" + entry() + "}" + " " * 1000)
    read_file(path)
    monkeypatch.setattr(_reading, "MAX_HEADER", 1000)
    refused(path, "its header claims")


def test_too_many_instructions(tmp_path, monkeypatch) -> None:
    path = save({"model": WEIGHTS}, tmp_path / "w.pth", "zip")
    monkeypatch.setattr(_pickles, "MAX_OPCODES", 20)
    refused(path, "more than 20 instructions")


def test_a_name_in_capitals_is_scanned_too(tmp_path) -> None:
    """torch finds entries whatever their case, so which of the two it takes is not ours to say."""
    path = save({"model": WEIGHTS}, tmp_path / "w.pth", "zip")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("w/DATA.pkl", pickle.dumps({"model": Call(eval, "1")}, 2))
    refused(path, r"builtins\.eval")


def test_threads_do_not_see_each_others_classes(foreign, tmp_path, monkeypatch) -> None:
    foreign_class = foreign("somewhere.Thing")
    strange = save({"model": WEIGHTS, "x": foreign_class()}, tmp_path / "strange.pth", "zip")
    plain = save({"model": WEIGHTS}, tmp_path / "plain.pth", "zip")
    inside, seen, load = [], [], torch.load

    def slow_load(path: Path, **options: Any) -> Any:
        inside.append(path)
        allowed = torch.serialization.get_safe_globals()
        names = {entry[1] if isinstance(entry, tuple) else entry.__name__ for entry in allowed}
        threading.Event().wait(0.02)
        seen.append((path, len(inside), "somewhere.Thing" in names, "ndarray" in names))
        content = load(path, **options)
        inside.remove(path)
        return content

    monkeypatch.setattr(torch, "load", slow_load)
    torch.serialization.add_safe_globals([np.ndarray, (foreign_class, "somebody.Else")])
    before = set(torch.serialization.get_safe_globals())
    try:
        jobs = [threading.Thread(target=read_file, args=(strange,), kwargs={"inert": True}) for _ in range(3)]
        jobs += [threading.Thread(target=read_file, args=(plain,)) for _ in range(3)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert sorted(seen) == sorted([(strange, 1, True, False), (plain, 1, False, False)] * 3)
        assert set(torch.serialization.get_safe_globals()) == before
        assert isinstance(read_file(save({"x": np.ones(2)}, plain, "zip"))["x"], _pickles.Array)  # not the allowed one
    finally:
        torch.serialization.clear_safe_globals()


def test_what_others_allow_in_the_meantime_stays(tmp_path, monkeypatch) -> None:
    path, load = save({"model": WEIGHTS}, tmp_path / "w.pth", "zip"), torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (torch.serialization.add_safe_globals([Call]), load(*a, **k))[1])
    try:
        read_file(path)
        assert torch.serialization.get_safe_globals() == [Call]
    finally:
        torch.serialization.clear_safe_globals()
