"""What a pickle would make, found out without making it; and stand-ins for the classes of metadata.

`torch.load(weights_only=True)` runs no foreign code, but a hostile file can still make it run out of memory, and the
classes of NumPy, once allowed, corrupt it: a state that calls an array of objects one of bytes is taken for pointers.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import pathlib
import pickletools
import re
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import IO, Any

import numpy as np

MAX_OPCODES = 5_000_000  # a file of 100 000 tensors has 4 million
MAX_DEPTH = 100
MAX_LEAVES = 1_000_000  # of one tuple, written out
CALL_BYTES = 64 << 20  # what calls may make beyond 16 times the pickle


class UnsafePickleError(ValueError):
    """A pickle that would take memory or time out of proportion to its size, or corrupt memory."""


class Inert:
    """Stands for any class: takes every argument and state, keeps none."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class DictStandIn:
    """Stands for a class of dictionaries: makes an OrderedDict, the only one that torch fills."""

    def __new__(cls, *_: object) -> Any:
        return collections.OrderedDict()


class ListStandIn:
    """Stands for a class of lists."""

    def __new__(cls, *_: object) -> Any:
        return []


class DType:
    """`numpy.dtype` of plain numbers, text or objects; its state can give a byte order and nothing else."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"[biufcSUO]\d{1,9}", code):
            raise UnsafePickleError(f"it holds NumPy's type {code!r}, which is read from no file")
        self.value = np.dtype("O" if code[0] == "O" else code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class Array(np.ndarray):
    """`numpy.ndarray`, made empty and then filled from bytes or, of objects, from a list."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        kind, length = (list, 1) if dtype.value.hasobject else (bytes, dtype.value.itemsize)
        if not isinstance(content, kind) or math.prod(shape) * length != len(content):
            raise UnsafePickleError("it holds a NumPy array whose type, shape and content contradict each other")
        super().__setstate__((1, shape, dtype.value, bool(fortran), content))  # type: ignore[arg-type]


def _reconstruct(*_: object) -> Array:
    return Array.__new__(Array, (0,), "b")


def _empty_bytes(*_: object) -> bytes:  # others are saved as encoded text
    return b""


def _scalar(dtype: DType, content: Any = b"") -> Any:
    return content if dtype.value.hasobject else np.frombuffer(content, dtype.value, count=1)[0]


# Metadata of training runs: name -> what is made in its place.
STAND_INS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "collections.defaultdict": DictStandIn,
    "yacs.config.CfgNode": DictStandIn,
    **{f"builtins.{name}": Inert for name in ("list", "dict", "int", "float", "range")},  # factories of a defaultdict
    "builtins.bytes": _empty_bytes,
    **{f"pathlib{part}.PosixPath": pathlib.PurePosixPath for part in ("", "._local")},
    **{f"pathlib{part}.WindowsPath": pathlib.PureWindowsPath for part in ("", "._local")},
    "pathlib.PurePosixPath": pathlib.PurePosixPath,
    "pathlib.PureWindowsPath": pathlib.PureWindowsPath,
    "numpy.dtype": DType,
    "numpy.ndarray": Array,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}
_TORCH = re.compile(
    r"torch\.(\w+|(\w+\.)*\w+(Tensor|Storage)|_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2"
    r"|nn\.parameter\.Parameter|serialization\._get_layout)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|set|complex)"
)
BLOCKED = ("sys", "os", "posix", "nt")  # modules of which torch makes nothing, whatever is allowed


@dataclasses.dataclass
class Scan:
    """The classes and functions that a pickle names, and which of them make dictionaries or lists."""

    names: set[str] = dataclasses.field(default_factory=set)
    roles: dict[str, Any] = dataclasses.field(default_factory=dict)
    first: Any = None

    def foreign(self) -> list[str]:
        """Names that are neither torch's nor known metadata."""
        return sorted(name for name in self.names if name not in STAND_INS and not _TORCH.fullmatch(name))


@dataclasses.dataclass(slots=True)
class _Value:
    """What is known of an object: its bytes, without those of its items; if a tuple, what is in it."""

    size: int = 8
    name: str = ""  # if a class or function; else of what made it
    items: tuple[_Value, ...] | None = None
    text: str = ""
    leaves: int = 1
    depth: int = 0


_ATOM = _Value()
_ATOMS = {"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FILLS = {"APPEND": 1, "SETITEM": 2, "APPENDS": None, "SETITEMS": None}


def scan(stream: IO[bytes], into: Scan | None = None) -> Scan:
    """Follow the pickle at the position of `stream` to its end, as torch's unpickler would, without making anything.

    Raises:
        UnsafePickleError: if it would take memory or time out of proportion to its size.
        Exception: of nearly any type, if it is no pickle of protocol 2 or is cut.
    """
    return _Machine(into or Scan()).run(stream)


class _Machine:
    def __init__(self, found: Scan) -> None:
        self.found = found
        self.stack: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}
        self.made = 0

    def run(self, stream: IO[bytes]) -> Scan:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            if count == 0:
                start = position or 0
            if count >= MAX_OPCODES:
                raise UnsafePickleError(f"its pickle has more than {MAX_OPCODES} instructions")
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
            if self.made > CALL_BYTES + 16 * ((position or 0) - start):
                raise UnsafePickleError(f"its pickle repeats itself into more than {self.made >> 20} MiB")
        return self.found

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _ATOMS:
            stack.append(_ATOM)
            self.found.first = argument if self.found.first is None else self.found.first
        elif name in ("BINUNICODE", "SHORT_BINSTRING"):
            stack.append(_Value(len(argument), text=argument if len(argument) < 16 else ""))
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "GLOBAL":
            stack.append(self._global(argument))
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _TUPLES or name == "TUPLE":
            stack.append(_tuple(self._pop(_TUPLES.get(name))))
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append(_Value(64))
        elif name in _FILLS:
            items = self._pop(_FILLS[name])
            stack[-1].size += 16 * len(items)
            if stack[-1].name:
                self.found.roles[stack[-1].name] = ListStandIn if name.startswith("APPEND") else DictStandIn
        elif name == "BUILD":
            state = stack.pop()
            if stack[-1] is not _ATOM:
                stack[-1].size += state.size + sum(item.size for item in state.items or ())
        elif name == "BINPERSID":
            stack[-1] = _ATOM
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function.name, arguments.items))
        elif name != "PROTO":
            raise ValueError(f"the instruction {name} is none of protocol 2, the one of torch.save")

    def _pop(self, count: int | None) -> tuple[_Value, ...]:
        at = self.marks.pop() if count is None else len(self.stack) - count
        if at < 0:
            raise IndexError("the stack is empty")
        items = tuple(self.stack[at:])
        del self.stack[at:]
        return items

    def _global(self, argument: str) -> _Value:
        module, _, name = argument.partition(" ")
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        else:
            module = IMPORT_MAPPING.get(module, module)
        self.found.names.add(f"{module}.{name}")
        return _Value(name=f"{module}.{name}")

    def _call(self, name: str, arguments: tuple[_Value, ...] | None) -> _Value:
        """The result of a call, whose memory is counted: a large object given to many calls is copied by each."""
        if arguments is None:
            raise UnsafePickleError(f"its pickle calls {name or 'an object'} with arguments that are no tuple")
        size = sum(value.size for value in arguments)
        if name == "_codecs.encode":  # other codecs make text longer, and text again that can be encoded again
            if len(arguments) != 2 or arguments[1].text not in ("latin1", "latin-1"):
                raise UnsafePickleError("its pickle encodes text otherwise than as bytes are saved")
        elif name == "builtins.bytearray":
            if any(value.name != "_codecs.encode" and not value.text for value in arguments):
                raise UnsafePickleError("its pickle asks for a bytearray of a given length")
        elif name.startswith("torch.") and name.endswith(("Tensor", "Storage")):
            if arguments:
                raise UnsafePickleError(f"its pickle asks for a {name} of a given size")
        elif name == "torch._tensor._rebuild_from_type_v2":
            if not arguments or not arguments[0].name.startswith("torch._utils._rebuild_"):
                raise UnsafePickleError(f"its pickle makes a tensor by {arguments and arguments[0].name}")
            size = 64
        elif name.startswith(("torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter")):
            size = 64  # a view of a storage
        else:
            size = 4 * size
        self.made += size
        return _Value(max(size, 64), name)


def _tuple(items: tuple[_Value, ...]) -> _Value:
    """Tuples of tuples take time to compare and to hash as if written out, and a stack as deep as they are."""
    value = _Value(
        16 * len(items),
        items=items,
        leaves=1 + sum(item.leaves for item in items),
        depth=1 + max((item.depth for item in items), default=0),
    )
    if value.leaves > MAX_LEAVES or value.depth > MAX_DEPTH:
        raise UnsafePickleError(f"its pickle nests tuples {value.depth} deep, {value.leaves} values written out")
    return value
