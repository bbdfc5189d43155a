"""What happens to a step whose loss or gradient is infinite or not a number: it changes nothing, and it is told."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .distributed import Processes


class BadStep(NamedTuple):
    """A step that was skipped: its number, counted from 1, and the ranks whose loss was not finite.

    No rank if all losses were, and only the gradient was not.
    """

    step: int
    ranks: list[int]


class Guard:
    """Watches losses and gradients on their device and says which steps to skip, at most `limit` in a row.

    Nothing waits for the device before `read`. Once `limit` is exceeded all further steps are bad, so that the weights
    stay those that the step failed with.

    Attributes:
        in_a_row: number of steps skipped since the last good one, a device tensor.
    """

    def __init__(self, limit: int, processes: Processes, model: nn.Module) -> None:
        self.limit, self.processes = limit, processes
        self.device = processes.device
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self._losses_bad = torch.zeros(processes.size, device=self.device)
        self._rows: list[tuple[int, Tensor]] = []
        # a forward pass with bad numbers leaves them in these
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self._before = [buffer.clone() for buffer in self._statistics]

    def begin(self) -> None:
        """Before the first forward pass of a step."""
        self._losses_bad.zero_()
        for kept, buffer in zip(self._before, self._statistics, strict=True):
            kept.copy_(buffer)

    def watch(self, loss: Tensor) -> None:
        """Look at the loss of a forward pass of this process."""
        mine = self._losses_bad[self.processes.rank]
        mine.copy_(torch.maximum(mine, (~torch.isfinite(loss)).to(mine.dtype)))

    def judge(self, step: int, norm: Tensor) -> Tensor:
        """Whether to skip `step`, given the norm of its gradient: 1.0 or 0.0 `()` float32, the same everywhere."""
        flags = torch.cat((self._losses_bad, (~torch.isfinite(norm)).float().view(1)))
        flags = self.processes.sum(flags)
        failed = self.in_a_row > self.limit
        bad = (flags.amax() > 0) | failed
        self.in_a_row = torch.where(failed, self.in_a_row, (self.in_a_row + 1) * bad)
        self._rows.append((step, flags * ~failed))
        return bad.float()

    def restore_statistics(self, bad: Tensor) -> None:
        """After the step: give norms their statistics back if it was bad."""
        for kept, buffer in zip(self._before, self._statistics, strict=True):
            buffer.copy_(torch.where(bad > 0, kept, buffer))

    def read(self) -> list[BadStep]:
        """The bad steps since the last call, up to the one that exceeded the limit. Waits for the device."""
        if not self._rows:
            return []
        steps, flags = zip(*self._rows, strict=True)
        self._rows = []
        table = torch.stack(flags).cpu() > 0
        return [
            BadStep(step, row[:-1].nonzero().flatten().tolist())
            for step, row in zip(steps, table, strict=True)
            if row.any()
        ]

    @property
    def has_failed(self) -> bool:
        """Whether more steps in a row were bad than may be. Waits for the device."""
        return int(self.in_a_row) > self.limit


def first_bad_module(model: nn.Module, images: Tensor) -> str | None:
    """The name of the module, in the order they finish, whose output is the first not to be finite, or None."""
    found: list[str] = []

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not found and not output.isfinite().all():
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
