"""Which implementation of an operator runs, and why.

Every operator has the same result on every path. `reference` is the definition in plain PyTorch: it is what
`torch.func` transforms and what `torch.compile` and `torch.export` see on a CPU, since they fuse or trace it
themselves. `cpu` is the eager path on a CPU, `triton` the kernels for GPUs, as custom operators that compile and export
as they are. The environment variable `STRIATE_BACKEND` forces one of them; with `torch` it only rules the kernels out.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _triton

logger = logging.getLogger("striate")

PATHS = ("reference", "cpu", "triton")
TORCH = "torch"  # `cpu` or `reference`, as the input decides
GPUS = ("cuda",)  # torch's name for AMD's too

Obstacle = Callable[[], str]  # what keeps an input from the kernels of an operator, or an empty string


def choose(op: str, x: Tensor, kernels: Obstacle | None = None) -> str:
    """Return the path of operator `op` for its first tensor `x`.

    An operator with Triton kernels gives `kernels`. Where a GPU tensor cannot take them, the definition runs instead,
    and says so once.

    Raises:
        ValueError: if `STRIATE_BACKEND` names no path, or one that cannot take this input.
    """
    path, reason, missed = _decide(x, kernels)
    if _dry_runs:
        raise _DryRun(f"{op}: {path} ({reason})")
    if missed and not torch.compiler.is_compiling():
        say_once(f"{op} runs without its GPU kernels: {reason}")
    return path


def forced_path() -> str:
    """The value of `STRIATE_BACKEND`, or an empty string.

    Raises:
        ValueError: if it names no path.
    """
    forced = os.environ.get("STRIATE_BACKEND", "")
    if forced not in ("", TORCH, *PATHS):
        choices = ", ".join((*PATHS, TORCH))
        raise ValueError(f"STRIATE_BACKEND={forced!r} is no path; use one of {choices}, or unset it")
    return forced


def _decide(x: Tensor, kernels: Obstacle | None) -> tuple[str, str, bool]:
    """Path, reason, and whether a GPU tensor missed the kernels that this operator has."""
    forced = forced_path()
    if forced == "reference":
        return forced, "STRIATE_BACKEND=reference", False
    on_gpu = x.device.type in GPUS or _triton.interpreting()
    if forced == "triton" or (on_gpu and forced == "" and kernels):
        obstacle = _triton_obstacle(x, kernels)
        if not obstacle:
            return "triton", "STRIATE_BACKEND=triton" if forced else f"a {x.device.type} tensor", False
        if forced:
            raise ValueError(f"STRIATE_BACKEND=triton cannot run here: {obstacle}; unset it")
        return "reference", obstacle, not _transformed()
    obstacle = _cpu_obstacle(x)
    if forced == "cpu" and obstacle:
        raise ValueError(f"STRIATE_BACKEND=cpu cannot run here: {obstacle}; unset it")
    if forced:
        return "reference" if obstacle else "cpu", f"STRIATE_BACKEND={forced}", False
    return ("reference", obstacle, False) if obstacle else ("cpu", "an eager tensor on the CPU", False)


def _triton_obstacle(x: Tensor, kernels: Obstacle | None) -> str:
    """What keeps `x` from Triton kernels, or an empty string."""
    if kernels is None:
        return "this operator has none, plain PyTorch is as fast"
    if _transformed():
        return "torch.func and torch.jit.trace take the definition"
    if x.device.type not in GPUS and not _triton.interpreting():
        return f"kernels run on a GPU, not on {x.device.type} tensors"
    if _triton.triton is None:
        return "Triton is not installed; pip install triton"
    return kernels()


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


def _cpu_obstacle(x: Tensor) -> str:
    """What keeps `x` from the eager CPU path, or an empty string."""
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export trace the definition"
    if x.device.type != "cpu":
        return f"no kernel for {x.device.type} tensors"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__} is traced or transformed through the definition"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms the definition"
    if torch.jit.is_tracing():
        return "torch.jit.trace records the definition"
    return ""


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in the dtypes of their operands, on the device of `x`."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


@functools.cache
def say_once(message: str) -> None:
    logger.warning("%s", message)


class _DryRun(Exception):  # noqa: N818
    """Carries the answer of `explain` out of the operator."""


_dry_runs: list[None] = []


def explain(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> str:
    """Say which path `op(*args, **kwargs)` takes and why, without running it.

    Returns:
        One line such as `window_attention: cpu (an eager tensor on the CPU)`.

    Raises:
        ValueError: if `op` is no operator of `striate.ops`, or as `op` itself for these arguments.
        TypeError: if arguments of `op` are missing.
    """
    name = getattr(op, "__name__", repr(op))
    if name in ("explain", "roofline") or getattr(sys.modules[__package__], name, None) is not op:
        raise ValueError(f"{name} is not an operator of striate.ops")
    _dry_runs.append(None)
    try:
        op(*args, **kwargs)
    except _DryRun as answer:
        return str(answer)
    finally:
        _dry_runs.pop()
    return f"{name}: reference (plain PyTorch on every device)"
