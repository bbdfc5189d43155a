"""Compilation of every kernel for a GPU that need not be there, and what the results say about their quality.

Each operator's own launchers run on meta tensors, so that a kernel is compiled with the very specialisation (alignment,
sizes of 1, constants, warps) that tensors on that GPU would get. Written against Triton 3.8.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import _triton

OPS = ("window_attention", "routing_attention", "gated_linear_attention", "lif", "binary")


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's backend, architecture and warp size; KiB of shared memory a program can have."""

    backend: str
    arch: int | str
    warp_size: int
    shared_kib: int


# Shared memory: CUDA C++ Programming Guide, "Technical specifications per compute capability"; AMD ISA documents (LDS).
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163),
    "sm_86": Target("cuda", 86, 32, 99),
    "sm_89": Target("cuda", 89, 32, 99),
    "sm_90": Target("cuda", 90, 32, 227),
    "sm_100": Target("cuda", 100, 32, 227),
    "sm_103": Target("cuda", 103, 32, 227),
    "sm_120": Target("cuda", 120, 32, 99),
    "gfx90a": Target("hip", "gfx90a", 64, 64),
    "gfx942": Target("hip", "gfx942", 64, 64),
    "gfx950": Target("hip", "gfx950", 64, 160),
    "gfx1100": Target("hip", "gfx1100", 32, 64),
    "gfx1201": Target("hip", "gfx1201", 32, 64),
}
CHECKED = ("sm_80", "sm_90", "sm_100", "gfx942")  # those of the tests and of docs/kernels.md
TENSOR_MEMORY = 512  # columns of a Blackwell multiprocessor (PTX ISA, "Tensor Memory")
MATRIX_INSTRUCTION = re.compile(
    r"^\s*(?:@!?%?\w+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma\.|v_s?mfma|v_wmma)", re.MULTILINE
)


@dataclass(frozen=True)
class KernelReport:
    """What one compiled kernel needs.

    Attributes:
        op: operator, or family of operators, one of `OPS`.
        config: the configuration that launches it, e.g. `bf16 window 7x7 head 32 forward`.
        kernel: name of the kernel's function.
        target: e.g. `sm_90`.
        registers: per thread; on AMD vector registers, accumulation registers included.
        spills: bytes of local memory (AMD: scratch) per thread.
        shared: bytes of shared memory per program.
        mma: matrix instructions in the code: mma, wgmma, tcgen05.mma, mfma or wmma.
        warps: per program.
        tensor_memory: columns of tensor memory per program (sm_100 and later).
        dots: products in the source that matrix units can compute: all but those of float32 in full precision.
        loads: number of loads from global memory in the code by width in bytes.
    """

    op: str
    config: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    mma: int
    warps: int
    tensor_memory: int
    dots: int
    loads: dict[int, int]

    @property
    def faults(self) -> list[str]:
        """Why the kernel should not be launched in this form; empty for a good one."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > shared_limit(self.target):
            found.append(f"needs {self.shared} bytes of shared memory of {shared_limit(self.target)}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(f"needs {self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}")
        if self.dots and not self.mma:
            found.append("has products but no matrix instruction")
        return found


def shared_limit(target: str) -> int:
    """Bytes of shared memory a program can have on `target`.

    Raises:
        ValueError: for an unknown target.
    """
    return _target(target).shared_kib * 1024


def configurations(op: str) -> list[tuple[str, Callable[[], Any]]]:
    """`(label, launch)` of every configuration of an operator; `launch()` launches its kernels on meta tensors.

    Raises:
        ValueError: for an unknown operator.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r} has no Triton kernels; choose one of {', '.join(OPS)}")
    return list(importlib.import_module(f".{op}.triton", __package__).configurations())


def compile_all(target: str, ops: Sequence[str] | None = None) -> list[KernelReport]:
    """Compile every configuration of `ops` (default all of `OPS`) for `target`, e.g. `sm_90`; needs no GPU.

    Raises:
        ModuleNotFoundError: without Triton.
        ValueError: for an unknown operator or target.
        RuntimeError: if a configuration does not compile; names it.
    """
    _target(target)
    reports = []
    for op in OPS if ops is None else ops:
        for label, launch in configurations(op):
            reports += compile_launch(op, label, target, launch)
    return reports


def compile_launch(op: str, label: str, target: str, launch: Callable[[], Any]) -> list[KernelReport]:
    """Compile the kernels that `launch()` launches on meta tensors; see `compile_all`."""
    with compiling(target) as kernels:
        try:
            launch()
        except Exception as error:
            raise RuntimeError(f"{op} {label!r} does not compile for {target}: {error}") from error
    return [_report(op, label, target, kernel) for kernel in kernels.values()]


@contextlib.contextmanager
def compiling(target: str) -> Iterator[dict[str, Any]]:
    """Within, a launch compiles its kernel for `target` and collects it by hash in the yielded dict instead of running.

    Raises:
        ModuleNotFoundError: without Triton.
        RuntimeError: while kernels are being interpreted.
        ValueError: for an unknown target.
    """
    known = _target(target)
    if _triton.triton is None:
        raise ModuleNotFoundError("triton is not installed: it compiles the kernels; pip install 'triton~=3.8'")
    if _triton.interpreting():
        raise RuntimeError("kernels cannot be compiled while the interpreter runs them: leave it first")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    collected: dict[str, Any] = {}
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        collected[kernel.hash] = kernel
        return kernel

    driver.set_active(_Driver(target, GPUTarget(known.backend, known.arch, known.warp_size)))
    JITFunction.run = compile_only
    try:
        with _triton.forced_target(target):
            yield collected
    finally:
        JITFunction.run = run
        driver._active = active  # `reset_active` would look for a GPU


class _Driver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, name: str, target: Any) -> None:
        self._name, self._target = name, target

    def get_current_device(self) -> str:
        return self._name  # the key of each kernel's cache in the process

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is unknown; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


def _report(op: str, label: str, target: str, kernel: Any) -> KernelReport:
    nvidia = _target(target).backend == "cuda"
    registers, spills = _nvidia_usage(kernel.asm["cubin"]) if nvidia else _amd_usage(kernel.asm["amdgcn"])
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    return KernelReport(
        op=op,
        config=label,
        kernel=kernel.metadata.name,
        target=target,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        mma=len(MATRIX_INSTRUCTION.findall(text)),
        warps=kernel.metadata.num_warps,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        dots=_dots(kernel.asm["ttir"], float32=target.startswith("gfx9")),
        loads=_nvidia_loads(text) if nvidia else _amd_loads(text),
    )


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _read(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        spills = sizes["STACK"] + sizes["LOCAL"]
        # A stack frame may be left of an array that the optimiser has removed; then nothing loads or stores there.
        if spills and not re.search(r"\b(?:LDL|STL)\b", _read(knobs.nvidia.nvdisasm.path, "-c", file.name)):
            spills = 0
    return sizes["REG"], spills


def _read(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_usage(code: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch per thread. Spilled scalar registers stay in vector registers."""
    usage = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", code)}
    return usage["vgpr_count"], usage["private_segment_fixed_size"]


def _dots(ttir: str, float32: bool) -> int:
    """Products that the target's matrix units take; only AMD's CDNA has them for `float32` in full precision."""
    dots = re.findall(r"tt\.dot .*", ttir)
    exact = [d for d in dots if "inputPrecision" not in d and re.search(r":\s*tensor<[\dx]+xf32>", d)]
    return len(dots) - (0 if float32 else len(exact))


def _nvidia_loads(ptx: str) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for vector, bits in re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx):
        widths[int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)", ptx):
        widths[int(size, 0)] += 1
    return dict(sorted(widths.items()))


def _amd_loads(code: str) -> dict[int, int]:
    sizes = {"ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1, "ushort": 2, "sshort": 2, "u16": 2, "i16": 2, "short": 2}
    widths: Counter[int] = Counter()
    for kind in re.findall(r"\b(?:global|buffer)_load_(\w+)", code):
        wide = re.fullmatch(r"dword(?:x(\d))?|b(\d+)", kind)
        if wide:
            widths[int(wide[2]) // 8 if wide[2] else 4 * int(wide[1] or 1)] += 1
        else:
            widths[next((size for name, size in sizes.items() if kind.startswith(name)), 4)] += 1
    return dict(sorted(widths.items()))
