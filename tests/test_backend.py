"""Which path runs, why, and that it can be forced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from striate import ops
from striate.ops import _backend, _triton, explain, partition, window_attention
from striate.ops.window_attention import cpu, reference

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRIATE_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that window attention has taken."""
    taken: list[str] = []
    for name, module in (("cpu", cpu), ("reference", reference)):
        right = module.window_attention

        def spy(*args, _name=name, _right=right):
            taken.append(_name)
            return _right(*args)

        monkeypatch.setattr(module, "window_attention", spy)
    return taken


def attend(qkv: torch.Tensor) -> torch.Tensor:
    return window_attention(qkv, num_heads=2, window=2)


def explained(qkv: torch.Tensor) -> str:
    return explain(window_attention, qkv, num_heads=2, window=2)


QKV = torch.randn(1, 4, 4, 18)


def test_an_eager_cpu_tensor_takes_the_cpu_path(calls) -> None:
    attend(QKV)
    attend(torch.nn.Parameter(QKV))
    assert calls == ["cpu", "cpu"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # forward mode loads its formulas through it
def test_transforms_take_the_definition(calls) -> None:
    torch.vmap(attend)(QKV[None])
    torch.func.grad(lambda x: attend(x).sum())(QKV)
    torch.func.jvp(attend, (QKV,), (QKV,))
    assert calls == ["reference"] * 3


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_traces_take_the_definition(calls) -> None:
    torch.jit.trace(attend, QKV, check_trace=False)
    attend(QKV.to("meta"))
    with torch._subclasses.FakeTensorMode() as mode:
        attend(mode.from_tensor(QKV))
    assert calls == ["reference"] * 3


def test_compiled_graphs_are_made_of_plain_operators() -> None:
    """What is traced must be the definition: a hand-written autograd function would be opaque to a compiler."""
    targets = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    torch.compile(attend, fullgraph=True, backend=backend)(QKV)
    assert any("softmax" in target for target in targets)
    assert not any("autograd" in target or "apply" in target for target in targets)


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_a_path_can_be_forced(path, calls, monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", path)
    attend(QKV)
    assert calls == [path]
    assert explained(QKV) == f"window_attention: {path} (STRIATE_BACKEND={path})"


def test_an_unknown_path_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="STRIATE_BACKEND='gpu' is no path; use one of reference, cpu, triton, torch"):
        attend(QKV)


def test_a_path_that_cannot_take_the_input_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "cpu")
    with pytest.raises(ValueError, match=r"STRIATE_BACKEND=cpu cannot run here: .*meta.*; unset it"):
        attend(QKV.to("meta"))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (lambda: QKV, "cpu (an eager tensor on the CPU)"),
        (lambda: QKV.to("meta"), "reference (no kernel for meta tensors)"),
        (lambda: torch._subclasses.FakeTensorMode().from_tensor(QKV), "reference (a FakeTensor is traced or"),
    ],
)
def test_explain_gives_the_reason(tensor, reason) -> None:
    assert explained(tensor()).startswith(f"window_attention: {reason}")


def test_explain_runs_nothing(calls) -> None:
    explained(QKV)
    assert calls == []


def test_explain_refuses_what_the_operator_refuses() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads=5"):
        explain(window_attention, QKV, num_heads=5, window=2)
    with pytest.raises(TypeError, match="num_heads"):
        explain(window_attention, QKV)
    assert not _backend._dry_runs


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - {"explain", "roofline"}))
def test_every_operator_explains_itself(name) -> None:
    heads = torch.randn(1, 9, 2, 4)
    arguments: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, int]]] = {
        "binary_linear": ((torch.randn(3, 64), WORDS, torch.ones(2)), {}),
        "binary_projection": ((torch.randn(3, 64), WORDS, *torch.ones(2, 2), torch.ones(3, 2), *torch.ones(2, 2)), {}),
        "binary_sign": ((heads,), {}),
        "channel_attention": ((torch.randn(1, 9, 18),), dict(num_heads=2)),
        "gated_linear_attention": ((heads,) * 5, {}),
        "lif": ((heads,), {}),
        "multispike": ((heads,), {}),
        "pack_signs": ((heads,), {}),
        "packed_matmul": ((WORDS, WORDS), dict(length=64)),
        "route_regions": ((QKV,), dict(region=2, topk=1)),
        "routing_attention": ((QKV, torch.zeros(1, 4, 1, dtype=torch.long)), dict(num_heads=2, region=2)),
        "softmax_aware": ((heads,), {}),
        "unpack_signs": ((WORDS,), dict(length=64)),
        "window_attention": ((QKV,), dict(num_heads=2, window=2)),
    }
    tensors, options = arguments[name]
    plain = name in ("binary_sign", "pack_signs", "softmax_aware", "unpack_signs")
    why = "reference (plain PyTorch on every device)" if plain else "cpu (an eager tensor on the CPU)"
    assert explain(getattr(ops, name), *tensors, **options) == f"{name}: {why}"


WORDS = torch.zeros(2, 1, dtype=torch.long)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    _backend.say_once.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records]
    _backend.say_once.cache_clear()


def test_a_gpu_tensor_takes_the_kernels_unless_something_is_in_the_way(said, monkeypatch) -> None:
    x = QKV.as_subclass(OnGpu)
    monkeypatch.setattr(_triton, "triton", object())
    assert _backend.choose("op", x, lambda: "") == "triton"
    assert said() == []
    for _ in range(2):
        assert _backend.choose("op", x, lambda: "heads of 999 channels") == "reference"
    assert said() == ["op runs without its GPU kernels: heads of 999 channels"]
    monkeypatch.setattr(_triton, "triton", None)
    assert _backend.choose("op", x, lambda: pytest.fail("asked")) == "reference"
    assert said()[1:] == ["op runs without its GPU kernels: Triton is not installed; pip install triton"]
    assert _backend.choose("op", x) == "reference"
    assert len(said()) == 2, "an operator without kernels has nothing to say"


def test_torch_rules_the_kernels_out(monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "torch")
    assert _backend.choose("op", QKV.as_subclass(OnGpu), lambda: pytest.fail("asked")) == "reference"
    assert explained(QKV) == "window_attention: cpu (STRIATE_BACKEND=torch)"


def test_forced_kernels_that_cannot_run_are_an_error(monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"STRIATE_BACKEND=triton cannot run here: kernels run on a GPU, not on cpu"):
        attend(QKV)
    with pytest.raises(ValueError, match="heads of 999 channels; unset it"):
        _backend.choose("op", QKV.as_subclass(OnGpu), lambda: "heads of 999 channels")
    with pytest.raises(ValueError, match="torch.func and torch.jit.trace take the definition"):
        torch.vmap(attend)(QKV[None])
    with pytest.raises(ValueError, match="this operator has none"):
        _backend.choose("op", QKV)


def test_without_triton_everything_still_works() -> None:
    code = """
import sys
sys.modules["triton"] = None  # type: ignore[assignment]
import torch
from striate.ops import explain, gated_linear_attention, lif, multispike, routing_attention, window_attention
qkv = torch.randn(1, 4, 4, 18)
window_attention(qkv, num_heads=2, window=2)
gated_linear_attention(*[torch.randn(1, 9, 2, 4)] * 5)
routing_attention(qkv, torch.zeros(1, 4, 1, dtype=torch.long), num_heads=2, region=2)
multispike(lif(qkv))
from striate.train import cli
sys.exit(cli.main(["kernels"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "triton" in done.stderr.lower()


@pytest.mark.parametrize("op", [torch.relu, partition.split, reference.window_attention, explain, ops.roofline])
def test_explain_takes_operators_only(op) -> None:
    with pytest.raises(ValueError, match="is not an operator of striate.ops"):
        explain(op, QKV)
