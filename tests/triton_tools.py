"""Triton kernels without a GPU: a corrected interpreter for compiled kernels, a memory meter, mutations, poison.

Triton's own interpreter wants `TRITON_INTERPRET=1` before the first import, which makes compilation impossible in the
process; truncates bfloat16 and treats it as an integer in arithmetic; and reads and writes wherever a pointer points.
Here ordinary `@triton.jit` functions run in it, bfloat16 is rounded and computed as on a GPU, and every access is
checked against the bounds of the tensor whose pointer it started from. Written against the internals of Triton 3.8.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import CodeType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorHandle
from triton.runtime.jit import JITFunction

from striate.ops import _triton

SLOT_BITS = 40  # a pointer in a kernel is (number of the argument) << 40 plus an offset
MANY = -2  # read by more than one program
NOBODY = -1
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "waves_per_eu", "matrix_instr_nonkdim", "kpack"}


class OutOfBoundsError(AssertionError):
    """A kernel accessed memory outside the tensor whose pointer it was given."""


class RaceError(AssertionError):
    """Two programs of one launch, or two lanes of one store, touch an element in an order nobody defines."""


@dataclass
class _Argument:
    """A tensor argument of the launch that is running."""

    name: str
    tensor: Tensor
    start: int  # where kernels see it
    size: int  # bytes from its first element to the end of its last

    @property
    def storage(self) -> int:
        return self.tensor.untyped_storage().data_ptr()


# ---------------------------------------------------------------------------------------------------------- bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    """bfloat16 as float32; anything else as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(data: np.ndarray) -> TensorHandle:
    """float32 to the nearest bfloat16, ties to even."""
    data = np.ascontiguousarray(data, dtype=np.float32)
    bits = data.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _boolean(mask: TensorHandle) -> TensorHandle:
    """`mask` as booleans: the interpreter's `tensor & scalar` of two of them is an integer, which it then misreads."""
    return TensorHandle(mask.data.astype(bool), tl.int1)


def _bfloat16(*handles: TensorHandle) -> bool:
    return "bf16" in [handle.dtype.scalar.name for handle in handles]


class _Builder(InterpreterBuilder):
    """Triton's interpreter with bfloat16 and memory as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.options = InterpreterOptions(sanitize_overflow=False)  # twice as fast; `metered` turns it on
        self.meter: Meter | None = None
        self.arguments: list[_Argument] = []
        self.kernel = ""

    def get_bf16(self, value: float) -> TensorHandle:
        return _round(np.array([value], dtype=np.float32))

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16 and not _bfloat16(src):
            return _round(src.data.astype(np.float32))
        return super().cast_impl(_widen(src), dst_type) if dst_type.scalar != src.dtype.scalar else src

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if _bfloat16(src) or dst_type.scalar == tl.bfloat16:
            if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
                raise NotImplementedError("bfloat16 rounded towards zero")
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not _bfloat16(lhs, rhs):
            return super().binary_op(lhs, rhs, op)
        out = op(_widen(lhs).data, _widen(rhs).data)
        return TensorHandle(out, tl.bfloat16) if out.dtype == bool else _round(out)

    def unary_op(self, arg: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        return _round(op(_widen(arg).data)) if _bfloat16(arg) else super().unary_op(arg, op)

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        if not _bfloat16(rhs, other):
            return super().ternary_op(lhs, rhs, other, op)
        return _round(op(_widen(lhs).data, _widen(rhs).data, _widen(other).data))

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _bfloat16(x, y, z):
            return super().create_fma(x, y, z)
        return _round(_widen(x).data * _widen(y).data + _widen(z).data)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *precision: Any) -> TensorHandle:
        if _bfloat16(d):
            raise NotImplementedError("tl.dot with a bfloat16 accumulator")
        return super().create_dot(_widen(a), _widen(b), d, *precision)

    # ------------------------------------------------------------------------------------------------------ memory

    def create_masked_load(self, ptrs: TensorHandle, mask: TensorHandle, other: Any, *hints: Any) -> TensorHandle:
        mask = _boolean(mask)
        return super().create_masked_load(self._access(ptrs, mask, "load"), mask, other, *hints)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *hints: Any) -> None:
        mask = _boolean(mask)
        real = self._access(ptrs, mask, "store")
        super().create_masked_store(real, value, mask, *hints)
        if self.meter is None or real.data.size == 1:
            return
        stored = super().create_masked_load(real, mask, None, None, None, False).data
        wanted = np.broadcast_to(value.data, stored.shape)
        same = (stored == wanted) | ((stored != stored) & (wanted != wanted))
        if not np.all(same | ~mask.data):
            raise RaceError(f"{self._where()}: lanes of one store write different values to the same element")

    def create_atomic_rmw(self, op: Any, ptr: TensorHandle, val: TensorHandle, mask: Any, *rest: Any) -> TensorHandle:
        if _bfloat16(val):
            raise NotImplementedError("atomics on bfloat16")
        return super().create_atomic_rmw(op, self._access(ptr, mask, "atomic"), val, mask, *rest)

    def create_atomic_cas(self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, *rest: Any) -> TensorHandle:
        everywhere = TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1)
        return super().create_atomic_cas(self._access(ptr, everywhere, "atomic"), cmp, val, *rest)

    def _access(self, ptrs: TensorHandle, mask: TensorHandle, kind: str) -> TensorHandle:
        """Real addresses of the active lanes, after the checks; of the others 0."""
        seen = ptrs.data.astype(np.int64)
        active = np.broadcast_to(mask.data, seen.shape)
        real = np.zeros(seen.shape, np.uint64)
        if not active.any():
            return TensorHandle(real, ptrs.dtype)
        numbers = seen[active] >> SLOT_BITS
        several = numbers.min() != numbers.max()
        for number in np.unique(numbers) if several else numbers[:1]:
            lanes = active & (seen >> SLOT_BITS == number) if several else active
            if not 1 <= number <= len(self.arguments):
                raise OutOfBoundsError(f"{self._where()}: {kind} far outside every argument")
            arg = self.arguments[number - 1]
            offset = seen[lanes] - arg.start
            width = arg.tensor.element_size()
            if offset.min() < 0 or offset.max() >= arg.size or np.any(offset % width):
                wrong = int(offset.min() if offset.min() < 0 else offset.max()) // width
                raise OutOfBoundsError(
                    f"{self._where()}: {kind} of element {wrong} of {arg.name}, which spans {arg.size // width}"
                )
            real[lanes] = (offset + arg.tensor.data_ptr()).astype(np.uint64)
            if self.meter is not None:
                self.meter._record(arg, offset, kind, self._program(), self._where)
        return TensorHandle(real, ptrs.dtype)

    def _program(self) -> int:
        (_, ny, nz), (x, y, z) = self.grid_dim, self.grid_idx
        return int((x * ny + y) * nz + z)

    def _where(self) -> str:
        return f"{self.kernel}, program {self.grid_idx}"


# ------------------------------------------------------------------------------------------------------------- meter


class _Traffic:
    """Counts per first byte of an element of one storage, and who touched it in the launch that is running."""

    def __init__(self, tensor: Tensor) -> None:
        self.owner = tensor  # keeps the address from being used again
        size = tensor.untyped_storage().nbytes()
        self.reads, self.writes = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.forget_programs()

    def forget_programs(self) -> None:
        self.reader = np.full(self.reads.size, NOBODY, np.int64)
        self.writer, self.adder = self.reader.copy(), self.reader.copy()


class Meter:
    """What the kernels of one `metered` block read and wrote.

    An element that several lanes of one instruction access counts once; by another instruction, or by the next
    iteration of a loop, it counts again. Atomics count as a read and a write.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        self._traffic: dict[int, _Traffic] = {}

    def read_counts(self, tensor: Tensor) -> Tensor:
        """How often each element was read, in the shape of `tensor`; a view or an alias will do."""
        return self._counts(tensor, "reads")

    def write_counts(self, tensor: Tensor) -> Tensor:
        """How often each element was written, in the shape of `tensor`."""
        return self._counts(tensor, "writes")

    def reads(self, tensor: Tensor) -> Fraction:
        """Mean of `read_counts`, exactly. A mean of 1 may hide a 0 and a 2: compare the counts to tell."""
        return Fraction(int(self.read_counts(tensor).sum()), tensor.numel())

    def writes(self, tensor: Tensor) -> Fraction:
        """Mean of `write_counts`, exactly."""
        return Fraction(int(self.write_counts(tensor).sum()), tensor.numel())

    def _counts(self, tensor: Tensor, what: str) -> Tensor:
        traffic = self._traffic.get(tensor.untyped_storage().data_ptr())
        if traffic is None:
            return torch.zeros(tensor.shape, dtype=torch.int64)
        elements = torch.from_numpy(getattr(traffic, what)[:: tensor.element_size()].copy())
        return elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _launch(self) -> None:
        for traffic in self._traffic.values():
            traffic.forget_programs()

    def _record(self, arg: _Argument, offset: np.ndarray, kind: str, program: int, where: Callable[[], str]) -> None:
        if arg.storage not in self._traffic:
            self._traffic[arg.storage] = _Traffic(arg.tensor)
        traffic = self._traffic[arg.storage]
        at = np.unique(offset) + (arg.tensor.data_ptr() - arg.storage)
        size = at.size * arg.tensor.element_size()

        def alone(owners: np.ndarray, what: str) -> None:
            others = owners[at][(owners[at] != NOBODY) & (owners[at] != program)]
            if others.size:
                raise RaceError(f"{where()}: {kind} of elements of {arg.name} that another program {what}")

        alone(traffic.writer, "writes")
        if kind != "atomic":
            alone(traffic.adder, "changes atomically")
        if kind != "load":
            alone(traffic.reader, "reads")
            (traffic.writer if kind == "store" else traffic.adder)[at] = program
            traffic.writes[at] += 1
            self.bytes_written += size
        if kind == "load":
            before = traffic.reader[at]
            traffic.reader[at] = np.where((before == NOBODY) | (before == program), program, MANY)
        if kind != "store":
            traffic.reads[at] += 1
            self.bytes_read += size


# ------------------------------------------------------------------------------------------------------------- speed
# Most of an interpreted operation is the work on types. Kernels use few, so that what follows from them is remembered.


class _Semantic(TritonSemantic):
    """Triton's rules for pairs of operands, applied once to each pair of types, or of a type and a number."""

    known: ClassVar[dict[tuple[Any, ...], tuple[Any, ...]]] = {}

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *rules: bool, **more: bool) -> tuple[Any, Any]:
        apply = super().binary_op_type_checking_impl
        return self._remembered(lhs, rhs, (*rules, *more.items()), lambda: apply(lhs, rhs, *rules, **more))

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        apply = super().broadcast_impl_value
        return self._remembered(lhs, rhs, "broadcast", lambda: apply(lhs, rhs))

    def _remembered(self, lhs: Any, rhs: Any, rules: Any, apply: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        key = _kind(lhs), _kind(rhs), rules
        if key not in self.known:
            left, right = apply()
            kept = getattr(lhs, "type", None), getattr(rhs, "type", None)  # so that nothing else gets their addresses
            self.known[key] = _change(lhs, left), _change(rhs, right), kept
            return left, right
        left, right, _ = self.known[key]
        return self._changed(lhs, left), self._changed(rhs, right)

    def _changed(self, operand: Any, change: tl.tensor | tl.dtype | None) -> Any:
        if change is None:
            return operand
        if isinstance(change, tl.tensor):
            return change
        if operand.dtype is not change.scalar:
            operand = self.cast(operand, change.scalar)
        if not change.is_block() or operand.kind == id(change.made):
            return operand
        data = np.empty(change.shape.values, operand.handle.data.dtype)
        data[...] = operand.handle.data
        return tl.tensor(TensorHandle(data, operand.handle.dtype), change)


def _kind(operand: Any) -> Any:
    """What Triton's rules look at."""
    if isinstance(operand, tl.tensor):
        return operand.kind
    return type(operand), repr(operand)  # of two zeros one may be negative


def _change(before: Any, after: tl.tensor) -> tl.tensor | tl.dtype | None:
    """None for an operand that stays as it is, the tensor of a number, or else the type that it gets."""
    if after is before:
        return None
    return after.type if isinstance(before, tl.tensor) else after


_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}  # what block types of one element type and shape have
_numpy_types: dict[str, np.dtype] = {}


def _remember_types(stack: contextlib.ExitStack) -> None:
    """Let equal types share what they are made of."""
    make_block, unwrap = tl.block_type.__init__, tl.core._unwrap_if_constexpr
    numpy_type, scalar = interpreter._get_np_dtype, (tl.tuple([]), tl.constexpr(1))

    def block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = (id(element_ty), *[s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if key not in _blocks:
            make_block(self, element_ty, shape)
            self.made = tl.tuple([tl.constexpr(s) for s in self.shape]), tl.constexpr(self.numel)
            _blocks[key] = dict(vars(self))
        vars(self).update(_blocks[key])

    def tensor(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
        if type.is_block():
            made = type.made
            self.kind = id(made)
        else:
            made = scalar
            self.kind = id(type)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = made

    def numpy_type_of(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in _numpy_types:
            _numpy_types[name] = numpy_type(dtype)
        return _numpy_types[name]

    def unwrapped(value: Any) -> Any:
        return value if isinstance(value, tl.tensor) else unwrap(value)

    for owner, name, function in (
        (tl.block_type, "__init__", block),
        (tl.tensor, "__init__", tensor),
        (tl.core, "_unwrap_if_constexpr", unwrapped),
        (interpreter, "_get_np_dtype", numpy_type_of),
    ):
        stack.enter_context(mock.patch.object(owner, name, function))


def _patch_builtin(obj: Any, name: str, member: Any, _: Any, scope: Any) -> None:
    """Of a function of the language, one that gets the rules of the interpreter that runs."""
    function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def builtin(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(obj, name, builtin)


# ----------------------------------------------------------------------------------------------------------- running


class _Interpreter:
    """Runs `@triton.jit` functions, on CPU tensors, with a builder of ours."""

    def __init__(self, builder: _Builder) -> None:
        self.builder = builder
        self.functions: dict[tuple[int, str], Callable[..., Any]] = {}

    def run(self, jit: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in jit.params]
        options = (
            set(kwargs) - set(names) - {"num_warps", "num_stages", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim"}
        )
        if options:
            raise KeyError(f"{jit.__name__} has no parameter {', '.join(sorted(options))}")
        bound = jit.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
        bound.apply_defaults()
        builder = self.builder
        builder.arguments, builder.kernel = [], jit.__name__
        if builder.meter is not None:
            builder.meter._launch()
        constexpr = {p.name for p in jit.params if p.is_constexpr}
        values = {n: v if n in constexpr else self._argument(n, v) for n, v in bound.arguments.items()}
        shape = tuple(grid(bound.arguments) if callable(grid) else grid)
        builder.set_grid_dim(*shape, *(1,) * (3 - len(shape)))
        function = self.function(jit)
        with np.errstate(all="ignore"):
            for program in np.ndindex(*builder.grid_dim):
                builder.set_grid_idx(*program)
                function(**values)

    def call(self, jit: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return self.function(jit)(*args, **kwargs)

    def function(self, jit: JITFunction) -> Callable[..., Any]:
        """The Python function of the source of `jit`, whose assignments make tensors of numbers."""
        key = (id(jit), jit.src)
        if key not in self.functions:
            code = _code(jit.src, jit.file_name, jit.def_file_line_number)
            scope = jit.get_capture_scope()  # the globals of its module, live, unless it is a closure
            scope["interpreter_semantic"] = interpreter.interpreter_semantic
            made: dict[str, Any] = {}
            exec(code, scope, made)
            self.functions[key] = made[jit.fn.__name__]
        return self.functions[key]

    def _argument(self, name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._argument(f"{name}[{i}]", v) for i, v in enumerate(value))
        if not isinstance(value, Tensor):
            return interpreter._implicit_cvt(value)
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}; the interpreter runs on CPU tensors")
        number = len(self.builder.arguments) + 1
        # the alignment is kept, and what lies just before a tensor at the start of a page is still its own slot
        start = (number << SLOT_BITS) + (1 << (SLOT_BITS - 1)) + value.data_ptr() % 4096
        last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        size = (last + 1) * value.element_size() if value.numel() else 0
        self.builder.arguments.append(_Argument(name, value, start, size))
        kind = _pointer_type(value.dtype)
        return tl.tensor(TensorHandle(np.array([start], dtype=np.uint64), kind), kind)


@functools.cache
def _code(source: str, file: str, line: int) -> CodeType:
    tree = interpreter.ASTTransformer().visit(ast.parse(source))
    ast.increment_lineno(ast.fix_missing_locations(tree), line - 1)
    return compile(tree, file, "exec", flags=annotations.compiler_flag, dont_inherit=True)


@functools.cache
def _pointer_type(dtype: torch.dtype) -> tl.pointer_type:
    return interpreter._implicit_cvt(torch.empty(0, dtype=dtype)).dtype


_running: list[_Interpreter] = []


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within, every launch of a `@triton.jit` function runs in the interpreter, on CPU tensors; may be nested.

    Out-of-bounds accesses raise `OutOfBoundsError`. Kernels cannot be compiled within, but can before and after.
    """
    if _running:
        yield
        return
    runner = _Interpreter(_Builder())
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("interpreter_builder", runner.builder),
            ("interpreter_semantic", _Semantic(runner.builder)),
            ("_patch_attr", _patch_builtin),
        ):
            stack.enter_context(mock.patch.object(interpreter, name, value))
        _remember_types(stack)
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(scope.restore)
        for name, member in inspect.getmembers(tl.tensor, lambda m: isinstance(m, JITFunction)):
            scope.set_attr(tl.tensor, name, _method(member))
        for owner, function in ((interpreter.ReduceOps, "apply_impl"), (interpreter.ScanOps, "apply_impl")):
            wide = _in_float32(getattr(owner, function))
            stack.enter_context(mock.patch.object(owner, function, wide))
        stack.enter_context(mock.patch.object(JITFunction, "run", lambda jit, *a, **k: runner.run(jit, *a, **k)))
        stack.enter_context(mock.patch.object(JITFunction, "__call__", lambda jit, *a, **k: runner.call(jit, *a, **k)))
        stack.enter_context(_triton.forced_target(_triton.INTERPRETER))
        _running.append(runner)
        stack.callback(_running.pop)
        yield


def _method(jit: JITFunction) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: jit(self, *args, **kwargs)


def _in_float32(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction or scan of bfloat16 tensors carried out in float32, its results rounded."""

    def wide(self: Any, inputs: tuple[tl.tensor, ...]) -> Any:
        if not any(t.dtype == tl.bfloat16 for t in inputs):
            return apply(self, inputs)
        out = apply(self, tuple(self.to_tensor(_widen(t.handle).data, _widen(t.handle).dtype) for t in inputs))
        several = isinstance(out, (tuple, list))
        rounded = [t.to(tl.bfloat16) if t.dtype == tl.float32 else t for t in (out if several else [out])]
        return tuple(rounded) if several else rounded[0]

    return wide


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Within `interpreted()`: count accesses; races raise `RaceError`, overflowing int32 arithmetic AssertionError."""
    if not _running:
        raise ValueError("metered() counts what the interpreter does: enter interpreted() first")
    builder = _running[-1].builder
    before = builder.meter, builder.options
    builder.meter, builder.options = Meter(), InterpreterOptions(debug=True)
    try:
        yield builder.meter
    finally:
        builder.meter, builder.options = before


@contextlib.contextmanager
def mutated(kernel: JITFunction, old: str, new: str) -> Iterator[None]:
    """Within, `kernel` has the first `old` of its source replaced by `new`.

    Raises:
        ValueError: if `old` does not occur in the source.
    """
    source = kernel.src
    if old not in source:
        raise ValueError(f"{old!r} is not in the source of {kernel.__name__}: mutate what is there")
    kernel._unsafe_update_src(source.replace(old, new, 1))
    kernel.device_caches.clear()
    try:
        yield
    finally:
        kernel._unsafe_update_src(source)
        kernel.device_caches.clear()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, `torch.empty` and its kin give tensors full of NaN, or of the smallest integer."""
    functions = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    functions += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]

    def filled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            with torch.no_grad():
                return out.fill_(float("nan") if out.is_floating_point() else _smallest(out.dtype))

        return make

    with contextlib.ExitStack() as stack:
        for owner, name in functions:
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


def _smallest(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bool or dtype.is_complex else torch.iinfo(dtype).min
