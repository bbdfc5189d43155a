"""The processes of a run, as torchrun starts them: who does what, what they agree on, how they share the model.

One process without torchrun is a world of one; nothing here communicates then.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from .config import RunConfig
from .evaluate import choose_device

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: longer than the slowest evaluation may keep others waiting
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Processes:
    """This process among those of the run. Use as a context manager, which leaves the group.

    Attributes:
        rank, size: its number and how many there are.
        device: where it computes; with several processes on CUDA each has the GPU of its local rank.

    Raises:
        ValueError: no such device, or a numbered one for several processes.
    """

    def __init__(self, device: str) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = choose_device(device if self.size == 1 else _own_device(device))
        self._vote: tuple[Tensor, Any] | None = None
        self._owns_group = False
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=TIMEOUT, store=_store(), rank=self.rank, world_size=self.size)
                self._owns_group = True
            # votes are on their way while gradients are exchanged: they must not wait in one queue
            self._votes: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Leave the group of processes."""
        if self._owns_group and dist.is_initialized():
            if self._vote is not None:
                self._vote[1].wait()
            dist.destroy_process_group()
            self._owns_group = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes the folder and the console."""
        return self.rank == 0

    def agree(self, number: int) -> int:
        """The largest of the numbers that all processes gave, one call ago: so no step waits for the answer.

        A world of one gets its own number at once. Every process has to call this equally often.
        """
        if self.size == 1:
            return number
        before = self._vote
        ballot = torch.tensor(number)
        self._vote = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._votes, async_op=True)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes, on all of them; `x` is left as it is."""
        if self.size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank, on all of them. For small Python values."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._votes)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)


def _own_device(device: str) -> str:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in device:
        raise ValueError(f"run.device {device} for {os.environ['WORLD_SIZE']} processes; give cuda: each takes its own")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def _store() -> dist.Store:
    """Where the processes find each other.

    torchrun keeps one store over all restarts, in which gloo would find the addresses of processes that are no more. On
    one machine the number of the restart tells them apart; on several it may be another one on each.
    """
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Replica:
    """The model as this process trains it: itself, a copy that exchanges gradients, or a shard of it.

    `forward` is what to call in training: the model, or what `wrap` makes of it. `module` is the model, which holds the
    parameters to optimise and is what to evaluate. `sharded` tells whether that takes all processes at the same time.

    Raises:
        ValueError: `sync_batchnorm` without CUDA.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        processes: Processes,
        wrap: Callable[[nn.Module], nn.Module],
    ) -> None:
        self.processes = processes
        self.sharded = config.parallel == "fsdp" and processes.size > 1
        if config.sync_batchnorm:
            if processes.device.type != "cuda":
                raise ValueError(f"run.sync_batchnorm needs CUDA, but run.device is {processes.device}; leave it out")
            model = convert_sync_batchnorm(model)
        self.module = shard(model, processes) if self.sharded else model
        self.forward: nn.Module = wrap(self.module)
        if config.compile is not None:
            self.forward.compile(backend=config.compile)
        if processes.size > 1 and not self.sharded:
            on_gpu = processes.device.type == "cuda"
            self.forward = DistributedDataParallel(
                self.forward, device_ids=[processes.device.index] if on_gpu else None, gradient_as_bucket_view=True
            )

    def exchanging(self, gradients: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass: whether its gradients are exchanged, or kept for the next one to add."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(gradients)
        elif isinstance(self.forward, DistributedDataParallel) and not gradients:
            return self.forward.no_sync()
        return nullcontext()


def share_buffers(model: nn.Module, processes: Processes) -> None:
    """Give all processes the buffers of the first one: each has had its own images' statistics of batch norms."""
    if processes.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def shard(model: nn.Module, processes: Processes) -> nn.Module:
    """Split the parameters of every block, and then of the rest, over all processes (FSDP2)."""
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("forward_intermediates", "forward_head"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What our models and timm's keep in lists called blocks."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks" and isinstance(module, (nn.ModuleList, nn.Sequential)):
            yield from module


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, on the CPU if the model is sharded; then all processes have to call this."""
    if isinstance(model, FSDPModule):
        return dict(get_model_state_dict(model, options=_WHOLE))  # type: ignore[arg-type]
    return model.state_dict()


def save_shards(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> None:
    """Let every process write its part of a sharded run into the folder `path` (torch.distributed.checkpoint)."""
    dcp.save(_shards(model, optimizer, ema), checkpoint_id=path)


def load_shards(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> None:
    """Undo `save_shards`, with any number of processes."""
    state = _shards(model, optimizer, ema)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if ema is not None:
        set_model_state_dict(ema, state["ema"])


def _shards(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Any]:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    return state if ema is None else state | {"ema": get_model_state_dict(ema)}
