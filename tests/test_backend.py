"""Which path runs, why, and that it can be forced."""

from __future__ import annotations

import pytest
import torch

from striate.ops import _backend, explain, partition, routing_attention, window_attention
from striate.ops.window_attention import cpu, reference


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
    assert explain(window_attention, QKV) == f"window_attention: {path} (STRIATE_BACKEND={path})"


def test_an_unknown_path_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="STRIATE_BACKEND='gpu' is no path; use one of reference, cpu, or unset it"):
        attend(QKV)


def test_a_path_that_cannot_take_the_input_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "cpu")
    with pytest.raises(ValueError, match=r"STRIATE_BACKEND=cpu cannot run here: .*meta.*; unset it"):
        attend(QKV.to("meta"))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (lambda: QKV, "cpu (an eager tensor on the CPU)"),
        (lambda: QKV.to("meta"), "reference (no kernel for meta tensors yet)"),
        (lambda: torch._subclasses.FakeTensorMode().from_tensor(QKV), "reference (a FakeTensor is traced or"),
    ],
)
def test_explain_gives_the_reason(tensor, reason) -> None:
    assert explain(window_attention, tensor()).startswith(f"window_attention: {reason}")


def test_explain_reads_keyword_arguments() -> None:
    assert explain(routing_attention, qkv=QKV).startswith("routing_attention: cpu")


def test_explain_runs_nothing(calls) -> None:
    explain(window_attention, QKV, num_heads=2, window=2)
    assert calls == []


@pytest.mark.parametrize("op", [torch.relu, partition.split, reference.window_attention, explain])
def test_explain_takes_operators_only(op) -> None:
    with pytest.raises(ValueError, match="is not an operator of striate.ops"):
        explain(op, QKV)


def test_explain_needs_a_tensor() -> None:
    with pytest.raises(ValueError, match=r"explain\(window_attention, …\) needs the operator's first tensor"):
        explain(window_attention)


def test_paths_are_those_that_exist() -> None:
    assert _backend.PATHS == ("reference", "cpu")
