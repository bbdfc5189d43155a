"""Which implementation of an operator runs, and why.

Every operator has the same result on every path. `reference` is the definition in plain PyTorch: it is what
`torch.compile`, `torch.export` and `torch.func` see, since they fuse, trace or transform it themselves. `cpu` is the
eager path on a CPU. The environment variable `STRIATE_BACKEND=reference|cpu` forces one of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PATHS = ("reference", "cpu")


def choose(x: Tensor) -> tuple[str, str]:
    """Return the path for input `x` and the reason for it.

    Raises:
        ValueError: if `STRIATE_BACKEND` names no path, or one that cannot take `x`.
    """
    obstacle = _cpu_obstacle(x)
    forced = os.environ.get("STRIATE_BACKEND", "")
    if not forced:
        return ("reference", obstacle) if obstacle else ("cpu", "an eager tensor on the CPU")
    if forced not in PATHS:
        raise ValueError(f"STRIATE_BACKEND={forced!r} is no path; use one of {', '.join(PATHS)}, or unset it")
    if forced == "cpu" and obstacle:
        raise ValueError(f"STRIATE_BACKEND=cpu cannot run here: {obstacle}; unset it")
    return forced, f"STRIATE_BACKEND={forced}"


def _cpu_obstacle(x: Tensor) -> str:
    """What keeps `x` from the eager CPU path, or an empty string."""
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export trace the definition"
    if x.device.type != "cpu":
        return f"no kernel for {x.device.type} tensors yet"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__} is traced or transformed through the definition"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms the definition"
    if torch.jit.is_tracing():
        return "torch.jit.trace records the definition"
    return ""


def explain(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> str:
    """Say which path `op(*args, **kwargs)` takes and why, without running it.

    The first argument of `op` decides, e.g. `explain(window_attention, qkv)`.

    Returns:
        One line such as `window_attention: cpu (an eager tensor on the CPU)`.

    Raises:
        ValueError: if `op` is no operator of `striate.ops` or no tensor is given.
    """
    name = getattr(op, "__name__", repr(op))
    if op is explain or getattr(sys.modules[__package__], name, None) is not op:
        raise ValueError(f"{name} is not an operator of striate.ops")
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if not tensors:
        raise ValueError(f"explain({name}, …) needs the operator's first tensor")
    path, reason = choose(tensors[0])
    return f"{name}: {path} ({reason})"
