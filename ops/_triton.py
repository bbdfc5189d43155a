"""What all Triton kernels share: Triton itself where it is installed, and the target they are launched for.

Importing this needs neither Triton nor a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)  # kernel bodies look their names up when they are compiled

INTERPRETER = "interpreter"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that kernels take
SMALL = 16  # the fewest rows and columns of a matrix instruction
_forced: list[str] = []


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function unchanged where there is no Triton."""
    return triton.jit(function) if triton else function


def target(device: torch.device) -> str:
    """What kernels for tensors on `device` are compiled for: `sm_90`, `gfx942`, … or `interpreter`."""
    if _forced:
        return _forced[-1]
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextlib.contextmanager
def forced_target(name: str) -> Iterator[None]:
    """Launch for target `name` whatever the device: for compilation ahead of time and for the interpreter."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(_forced) and _forced[-1] == INTERPRETER


def family(name: str) -> str:
    """Rows of the launch tables: `sm_80` (also 86, 89), `sm_90`, `sm_100` (also 103, 120), or `gfx` for AMD."""
    if name.startswith("gfx"):
        return "gfx"
    if not name.startswith("sm_"):
        return "sm_80"
    number = int(name[3:])
    return "sm_100" if number >= 100 else "sm_90" if number >= 90 else "sm_80"


def power_of_two(count: int) -> int:
    """The smallest power of two that is not less than `count`."""
    return 1 << (count - 1).bit_length()


def padded_dim(dim: int) -> int:
    """Channels of a tile that holds heads of `dim` channels."""
    return max(SMALL, power_of_two(dim))


def dense_channels(x: Tensor) -> Tensor:
    """`x` with neighbouring channels side by side, as kernels read it; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot` for operands of `dtype`: TF32 only for float32 and only where torch allows it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and not torch.version.hip
    return "tf32" if tf32 and not interpreting() else "ieee"
