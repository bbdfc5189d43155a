"""Whole models on the Triton path, in the interpreter: values, gradients, AMP, checkpointing, compilation, DDP."""

from __future__ import annotations

import copy
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import striate
from helpers import relative
from striate.ops import _backend
from striate.ops.window_attention import triton as window
from triton_tools import interpreted

# side of the image and options: two stages are as good as four, as long as maps are padded and hold several groups
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "swin_tiny": (32, dict(dim=64, depths=(2, 1), num_heads=(2, 4))),
    "swinv2_tiny_window8_256": (48, dict(dim=64, depths=(2, 1), num_heads=(2, 4), img_size=32)),  # windows of 8 and 4
    "biformer_nano": (64, dict(dims=(32, 64, 128), depths=(1, 1, 1), topks=(1, 2, 0))),  # by lists, by words, full
    "maxvit_tiny": (32, dict(stem_dim=32, dims=(64, 128), depths=(1, 1))),
    "crossformer_tiny": (
        32, dict(dim=64, depths=(2, 1), num_heads=(2, 4), group_size=(7, 7), interval=(2, 1))
    ),
    "davit_tiny": (32, dict(dims=(64, 128), depths=(1, 1), num_heads=(2, 4))),
    "vig_h_tiny": (48, dict(dims=(64, 128), depths=(1, 1), num_heads=(2, 4))),  # several chunks, and one
}  # fmt: skip


def make(name: str, batch: int = 1) -> tuple[nn.Module, Tensor]:
    side, options = MODELS[name]
    torch.manual_seed(0)
    return striate.create_model(name, num_classes=5, **options), torch.randn(batch, 3, side, side)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that operators have taken."""
    taken: list[str] = []
    right = _backend.choose

    def choose(op: str, *args):
        taken.append(f"{op}: {right(op, *args)}")
        return taken[-1].rpartition(" ")[2]

    monkeypatch.setattr(_backend, "choose", choose)
    return taken


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits and the gradients of one training step, without updates of running statistics."""
    model = copy.deepcopy(model).eval()
    logits = model(x)
    logits.float().square().sum().backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same_values_and_gradients(name, launched) -> None:
    model, x = make(name)
    want = step(model, x)
    assert not any(path.endswith("triton") for path in launched)
    with interpreted():
        got = step(model, x)
    assert any(path.endswith(": triton") for path in launched)
    assert len(got) == len(want)
    largest = max(t.abs().max() for t in want[1:])
    assert relative(got[0], want[0]) < 1e-4
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a - b).abs().max() < 1e-4 * largest


def test_a_wrong_kernel_would_be_seen(monkeypatch) -> None:
    model, x = make("swin_tiny")
    want = step(model, x)
    right = window.launch_forward

    def wrong(*args):
        out, lse = right(*args)
        return out.roll(1, 1), lse

    monkeypatch.setattr(window, "launch_forward", wrong)
    with interpreted():
        assert relative(step(model, x)[0], want[0]) > 1e-3


def test_autocast() -> None:
    model, x = make("swin_tiny")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = step(model, x)
        with interpreted():
            got = step(model, x)
    assert got[0].dtype == torch.bfloat16
    assert relative(got[0], want[0]) < 0.05
    assert all(g.isfinite().all() for g in got)


@pytest.mark.parametrize("name", ["swin_tiny", "biformer_nano", "vig_h_tiny"])
def test_activation_checkpointing(name) -> None:
    model, x = make(name)
    with interpreted():
        want = step(model, x)
        model.set_grad_checkpointing()
        got = step(model, x)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["swin_tiny", "biformer_nano", "vig_h_tiny"])
def test_one_compiled_graph_holds_the_kernels(name) -> None:
    model, x = make(name)
    model.eval()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with interpreted(), torch.no_grad():
        got = compiled(x)
    with torch.no_grad():
        assert relative(got, model(x)) < 1e-4
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1
    assert any(target.startswith("striate.") for target in targets)


def test_exported_programs_hold_the_kernels() -> None:
    model, x = make("swin_tiny")
    model.eval()
    with interpreted(), torch.no_grad():
        program = torch.export.export(model, (x,))
        with tempfile.TemporaryDirectory() as folder:
            torch.export.save(program, Path(folder, "model.pt2"))
            loaded = torch.export.load(Path(folder, "model.pt2"))
    assert any("striate.window_attention" in str(node.target) for node in loaded.graph.nodes)
    with torch.no_grad():  # on a CPU, without an interpreter, the operator computes the definition
        assert relative(loaded.module()(x), model(x)) < 1e-4


def _gradients(rank: int, folder: str) -> list[Tensor]:
    """Of the mean over two processes, each with one of two images."""
    limit = timedelta(minutes=2)  # of waiting for a process that has died
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    try:
        model, images = make("swin_tiny", batch=2)
        parallel = nn.parallel.DistributedDataParallel(model.eval())
        with interpreted():
            parallel(images[rank : rank + 1]).square().sum().backward()
        return [p.grad for p in model.parameters()]
    finally:
        dist.destroy_process_group()


def _other(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.save(_gradients(1, folder), Path(folder, "gradients.pt"))


def test_two_processes_average_their_gradients(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    other = mp.spawn(_other, (str(tmp_path),), nprocs=1, join=False)
    mine = _gradients(0, str(tmp_path))
    other.join()
    model, images = make("swin_tiny", batch=2)
    (model.eval()(images).square().sum() / 2).backward()
    theirs = torch.load(tmp_path / "gradients.pt")
    for a, b, p in zip(mine, theirs, model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a - p.grad).abs().max() < 1e-4
