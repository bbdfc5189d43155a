"""What `striate benchmark` measures: seconds, FLOPs and peak memory of a model, and the matmul limit of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import logging
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg, is_model, model_entrypoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import create_model
from .evaluate import autocast

logger = logging.getLogger(__name__)

TIMM = "timm:"
WARM_UP_IMAGES = 2  # some batch norms refuse to train on one
MEMORY_REPEATS = 3
GEMM_SECONDS = 0.04  # per shape and round: long enough for all threads to be at work
GEMM_SHAPES = {  # (rows, inputs, outputs): a large square one and those of MLPs, sizes at which a GPU is at work for ms
    "cpu": [(2048, 2048, 2048), (4096, 1024, 1024), (6272, 384, 1536), (1568, 768, 3072)],
    "cuda": [(8192, 8192, 8192), (16384, 4096, 4096), (32768, 1024, 4096)],
}


@dataclass(frozen=True)
class Workload:
    """A model and what it does over and over.

    `source` is `timm:NAME` for timm's own model, or whatever `striate.create_model` takes; `mode` is `plain`
    (inference), `optimized` (inference after `striate.optimize_for_inference`) or `train` (a training step); `batch`
    images of `size` x `size`; `dtype` is `float32`, or `bfloat16` for autocast; `device` as torch names it.
    """

    source: str
    mode: str
    batch: int
    size: int
    dtype: str
    device: str


def build(source: str, size: int) -> nn.Module:
    """The model of a workload, with random weights.

    Raises:
        ValueError: there is no such model, or `timm:` is given for one that timm does not have itself.
    """
    name = source.removeprefix(TIMM)
    arch = name.partition(".")[0]
    own = is_model(arch) and not model_entrypoint(arch).__module__.startswith(f"{__name__.partition('.')[0]}.")
    if source.startswith(TIMM) and not own:
        raise ValueError(f"timm has no model {name!r} of its own; timm.list_models() shows what it has")
    cfg = get_pretrained_cfg(name) if is_model(arch) else None
    options: dict[str, Any] = (
        {"img_size": size} if cfg and cfg.fixed_input_size and cfg.input_size[1:] != (size, size) else {}
    )
    return timm.create_model(name, **options) if source.startswith(TIMM) else create_model(name, **options)


class Runner:
    """A workload ready to run: every call is one inference or one training step on random images.

    A training step is forward, cross-entropy, backward and plain SGD; gradients are dropped when the next one starts.
    Weights and images are the same for every workload of a model.

    Raises:
        ValueError: there is no such model, or it cannot be optimised.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload, self.device = workload, torch.device(workload.device)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build(workload.source, workload.size).to(self.device)
            channels = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3,))[0]
            self.images = torch.randn(workload.batch, channels, workload.size, workload.size).to(self.device)
        self.labels = torch.zeros(workload.batch, dtype=torch.int64, device=self.device)
        if workload.mode == "optimized":
            from .. import optimize_for_inference

            model = optimize_for_inference(model.eval())
        self.model = model.train(workload.mode == "train")
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3) if workload.mode == "train" else None

    def __call__(self, count: int | None = None) -> None:
        """Run once, on the first `count` images or all."""
        images, labels = self.images[:count], self.labels[:count]
        if self.optimizer is None:
            with torch.inference_mode(), autocast(self.device, self.workload.dtype):
                self.model(images)
            return
        self.optimizer.zero_grad()
        with autocast(self.device, self.workload.dtype):
            logits = self.model(images)
        F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()

    def warm_up(self, count: int | None = None) -> float:
        """Run twice and return the seconds of the second time.

        Raises:
            ValueError: the model does not take such a batch; with what it said.
        """
        with self._blamed(count):
            self(count)
            return seconds_per_call(lambda: self(count), 1, self.device)

    @contextlib.contextmanager
    def _blamed(self, count: int | None) -> Iterator[None]:
        work = self.workload
        try:
            yield
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            verb = "train" if work.mode == "train" else "run"
            images = f"a batch of {count or work.batch} images of {work.size}x{work.size}"
            raise ValueError(f"{work.source} ({work.mode}) does not {verb} on {images}: {error}") from error

    def count_flops(self) -> int:
        """FLOPs (two per multiply-add) of one image through the model: matmuls, convolutions and attention.

        Counted with torch's FlopCounterMode in a plain forward on the `reference` path and with attention as matmuls:
        the counter knows neither the CPU's fused attention nor oneDNN's packed linears, and a fast path may do more
        than the definition asks for (masked dense attention instead of a gather). All modes share this number.

        Raises:
            ValueError: the model does not take such an image.
        """
        counter = FlopCounterMode(display=False)
        with self._blamed(1), reference_path(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
            self.model(self.images[:1])
        return counter.get_total_flops()


@contextlib.contextmanager
def reference_path() -> Iterator[None]:
    """Operators run on the `reference` path."""
    saved = os.environ.get("STRIATE_BACKEND")
    os.environ["STRIATE_BACKEND"] = "reference"
    try:
        yield
    finally:
        del os.environ["STRIATE_BACKEND"]
        if saved is not None:
            os.environ["STRIATE_BACKEND"] = saved


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """`count` CPU threads, or as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_per_call(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean seconds of `repeats` calls, until the device has finished; garbage is not collected meanwhile."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        _synchronize(device)
        return (time.perf_counter() - start) / repeats
    finally:
        if collecting:
            gc.enable()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(function: Callable[[], Tensor], skip: Sequence[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of `function()`, without those of `skip`."""
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in skip}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()  # alive until the count is taken, so that no address is used twice
    del out
    return sum(kept.values())


class PeakMemory(NamedTuple):
    """`rise` in bytes; `exact` is False where it is only a lower bound."""

    rise: int
    exact: bool


def peak_memory(workload: Workload, threads: int) -> PeakMemory | None:
    """How far the memory in use rises above the loaded model during one inference or one training step.

    On a CPU this is resident memory, in a process of its own for each workload, so that nothing that others left in
    the allocator's pools hides a part. There, after a warm-up on two images (which loads code and builds tables), the
    allocator gives free memory back (`malloc_trim`, glibc only), the high-water mark is reset (5 written to
    /proc/self/clear_refs) and the rise is VmHWM after the step less VmRSS before it; the median of three. Where the
    mark cannot be reset, the rise is the growth of the mark itself: a lower bound, since an earlier peak hides a part.
    On CUDA it is the peak of torch's allocator less what was allocated before. A training step starts without
    gradients, so they count; an optimised model's packed weights belong to the loaded model.

    Returns None, and says so, if the process died.

    Raises:
        ValueError: as `Runner` and its warm-up.
    """
    if workload.device != "cpu":
        return _peak_memory_here(workload)
    # A server that only imports and forks: each process is fresh, but torch is imported once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", __name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak_memory_here, workload, threads).result()
        except BrokenProcessPool:
            logger.warning("no peak memory of %s: its process died, probably for want of memory", workload)
            return None


def _peak_memory_here(workload: Workload, threads: int | None = None) -> PeakMemory:
    if threads is not None:
        torch.set_num_threads(threads)
    runner = Runner(workload)
    runner.warm_up(min(WARM_UP_IMAGES, workload.batch))
    rises = []
    for _ in range(MEMORY_REPEATS):
        if runner.optimizer is not None:
            runner.optimizer.zero_grad()
        rises.append(_cuda_rise(runner) if runner.device.type == "cuda" else resident_rise(runner))
    return PeakMemory(int(statistics.median(r.rise for r in rises)), all(r.exact for r in rises))


def _cuda_rise(run: Runner) -> PeakMemory:
    _synchronize(run.device)
    before = torch.cuda.memory_allocated(run.device)
    torch.cuda.reset_peak_memory_stats(run.device)
    run()
    _synchronize(run.device)
    return PeakMemory(torch.cuda.max_memory_allocated(run.device) - before, True)


def resident_rise(run: Callable[[], object]) -> PeakMemory:
    """How far the resident memory of this process rises while `run` runs; see `peak_memory`."""
    with contextlib.suppress(AttributeError, OSError):  # without it, what the allocator retains is missing
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before, exact = _status_bytes("VmRSS"), True
    except OSError:
        before, exact = _high_water_bytes(), False
    run()
    return PeakMemory(_high_water_bytes() - before, exact)


def _high_water_bytes() -> int:
    try:
        return _status_bytes("VmHWM")  # unlike ru_maxrss, it does not start at the size of the parent process
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


class GemmLimit:
    """Matmul throughput in one dtype: each call times `torch.mm` and oneDNN's packed linear at a few shapes.

    Keys of the result are such as `oneDNN 2048x2048x2048` (rows, inputs, outputs); `flops` has the FLOPs of each.
    """

    def __init__(self, dtype: str, device: str) -> None:
        self.device = torch.device(device)
        self.flops: dict[str, int] = {}
        self._calls: dict[str, Callable[[], Tensor]] = {}
        self._repeats: dict[str, int] = {}
        for m, k, n in GEMM_SHAPES["cpu" if self.device.type == "cpu" else "cuda"]:
            inputs, weight = (torch.randn(rows, k, dtype=getattr(torch, dtype), device=self.device) for rows in (m, n))
            calls: dict[str, Callable[[], Tensor] | None] = {"torch.mm": _mm(inputs, weight)}
            calls["oneDNN"] = _onednn_linear(inputs, weight) if self.device.type == "cpu" else None
            for method, call in calls.items():
                if call is not None:
                    key = f"{method} {m}x{k}x{n}"
                    self.flops[key], self._calls[key] = 2 * m * k * n, call

    def warm_up(self) -> None:
        """Find how often to repeat each product."""
        for key, call in self._calls.items():
            call()
            self._repeats[key] = repeats_for(seconds_per_call(call, 1, self.device), GEMM_SECONDS)

    def __call__(self) -> dict[str, float]:
        """Seconds of one product, by key."""
        with torch.inference_mode():
            return {k: seconds_per_call(call, self._repeats[k], self.device) for k, call in self._calls.items()}


def repeats_for(seconds: float, least: float) -> int:
    """How many calls of `seconds` each last at least `least` seconds."""
    return max(1, math.ceil(least / max(seconds, 1e-9)))


def _mm(inputs: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    out = inputs.new_empty(inputs.shape[0], weight.shape[0])  # fresh memory would be timed with the product
    return lambda: torch.mm(inputs, weight.t(), out=out)


def _onednn_linear(inputs: Tensor, weight: Tensor) -> Callable[[], Tensor] | None:
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, inputs.shape[0])
        linear = torch.ops.mkldnn._linear_pointwise
        linear(inputs, packed, None, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        _say_once(f"the GEMM limit is that of torch.mm alone, oneDNN's linear is missing: {str(error).splitlines()[0]}")
        return None
    return lambda: linear(inputs, packed, None, "none", [], "")


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


SETTINGS = (
    "ATEN_CPU_CAPABILITY", "CUDA_", "DNNL_", "GLIBC_TUNABLES", "GOMP_", "KMP_", "LD_PRELOAD", "MALLOC_", "MKL_",
    "NVIDIA_TF32_OVERRIDE", "OMP_", "ONEDNN_", "PYTORCH_", "STRIATE_BACKEND", "TIMM_FUSED_ATTN",
)  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """What decides speed here besides the model; `variables` are the set environment variables that can.

    The allocator matters most on a CPU: keeping large blocks instead of mapping them afresh (MALLOC_MMAP_THRESHOLD_,
    MALLOC_TRIM_THRESHOLD_, another malloc) alone made models 1.15 to 1.36 times as fast. Called before measuring, it
    warns of other work on the machine, by the load average of the last minute.
    """
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load > cpus / 2:
        logger.warning("other work keeps this machine busy (load %.1f on %d CPUs): wait for it to end", load, cpus)
    config = torch.__config__.show().splitlines()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": cpus,
        "load_average": load,
        "threads": torch.get_num_threads(),
        "libraries": [line.strip(" -") for line in config if "Math Kernel Library" in line or "MKL-DNN v" in line],
        "malloc": _malloc(),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(SETTINGS)},
    }
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _cpu_name() -> str:
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _malloc() -> str:
    """The allocator in force: a preloaded one by the file that is mapped, else the C library."""
    files = {Path(line.split()[-1]).name for line in (_read("/proc/self/maps") or "").splitlines() if "/" in line}
    names = itertools.product(sorted(files), ("jemalloc", "tcmalloc", "mimalloc"))
    return next((file for file, name in names if name in file), None) or " ".join(platform.libc_ver()) or "unknown"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
