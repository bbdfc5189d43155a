"""`striate benchmark --ops`: all ways compute the same, the report, what is missing, the command. No time decides."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import relative
from striate.ops.gated_linear_attention import chunked
from striate.train import benchmark as bench
from striate.train import cli, op_benchmark
from striate.train.op_benchmark import COMPILED, DEFINITION, OURS, Case, OpSettings

CPU = torch.device("cpu")


def cases(op: str) -> list[Case]:
    return list(op_benchmark.CASES[op](1, op_benchmark._maker(OpSettings(batch=1), CPU)))


@pytest.mark.parametrize("op", op_benchmark.CASES)
def test_all_ways_compute_the_same(op) -> None:
    for case in cases(op):
        ways = case.ways()
        want = ways.pop(OURS)(*case.inputs)
        for name in set(ways) - {COMPILED, "natten", "flash-linear-attention"}:
            assert relative(ways[name](*case.inputs), want) < 1e-5, f"{name}, {case.name}"


def test_the_shapes_are_those_of_the_models() -> None:
    names = {op: [case.name for case in cases(op)] for op in op_benchmark.CASES}
    assert "56x56, 3 heads of 32, window 7x7, shift 3" in names["window_attention"]
    assert "32x32, 8 heads of 32, regions 4x4, top 16" in names["routing_attention"]
    assert "3136 tokens, 3 heads of 16 and 32" in names["gated_linear_attention"]
    assert "3136 tokens, 3 heads of 32" in names["channel_attention"]
    assert "4 steps, 256 channels, 28x28" in names["lif"]
    assert "196x384 to 1536, binary input" in names["binary_linear"]


def test_flash_linear_attention_is_called_for_both_directions(monkeypatch) -> None:
    def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> tuple[Tensor, None]:
        nothing = torch.zeros_like(g) - 1e30  # a direction that forgets all but the token itself
        both = chunked.gated_linear_attention(q, k, v, g, nothing, scale)
        return both - (q * k).sum(-1, keepdim=True) * scale * v, None

    modules = {"fla.ops.gla": SimpleNamespace(chunk_gla=chunk_gla)}
    monkeypatch.setattr(op_benchmark.importlib, "import_module", modules.__getitem__)
    case = cases("gated_linear_attention")[2]
    ways = case.ways()
    assert relative(ways["flash-linear-attention"](*case.inputs), ways[OURS](*case.inputs)) < 1e-5


def test_natten_gets_its_layout(monkeypatch) -> None:
    shapes: list[Any] = []

    def na2d(q: Tensor, k: Tensor, v: Tensor, kernel_size: int) -> Tensor:
        shapes.append((q.shape, k.shape, v.shape, kernel_size))
        return v

    monkeypatch.setattr(op_benchmark.importlib, "import_module", {"natten": SimpleNamespace(na2d=na2d)}.__getitem__)
    case = cases("window_attention")[0]
    assert case.ways()["natten"](*case.inputs).shape == (1, 56, 56, 96)
    assert shapes == [((1, 56, 56, 3, 32),) * 3 + (7,)]


def test_spikingjelly_begins_anew_at_every_call() -> None:
    case = cases("lif")[2]
    spikes = case.ways()["spikingjelly"]
    assert torch.equal(spikes(*case.inputs), spikes(*case.inputs))
    assert spikes(*case.inputs).mean() > 0.01


def tiny_cases(batch: int, make: Any) -> Any:
    x = make(batch, 4, 6)

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand a long story")

    rivals = {"sdpa": broken, "natten": lambda x: op_benchmark._imported("no_such_package")}
    yield Case(op_benchmark.channel_attention, "4 tokens", (x,), dict(num_heads=1), rivals)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 1e-4)
    monkeypatch.setattr(op_benchmark, "CASES", {"channel_attention": tiny_cases})


@pytest.mark.usefixtures("_tiny")
def test_report_has_ratios_and_reasons() -> None:
    ways = (DEFINITION, "sdpa", "natten")
    report = op_benchmark.benchmark_ops(OpSettings(ways=ways, batch=2, rounds=3, seconds=None, threads=1))
    rows = {(row["mode"], row["way"]): row for row in report["rows"]}
    assert list(rows) == [(mode, way) for mode in ("inference", "train") for way in (OURS, *ways)]
    ours = rows["inference", OURS]
    assert ours["path"] == "channel_attention: cpu (an eager tensor on the CPU)"
    assert ours["speedup"] == 1.0
    assert rows["train", DEFINITION]["seconds"]["median"] > 0
    assert rows["train", "sdpa"]["missing"] == "RuntimeError: no such kernel"
    assert rows["train", "natten"]["missing"] == "no_such_package is not installed"
    text = op_benchmark.format_ops(report)
    assert "channel_attention: 4 tokens, train" in text
    assert "not measured: sdpa: RuntimeError: no such kernel" in text
    assert report["environment"]["threads"] == 1


@pytest.mark.usefixtures("_tiny")
def test_speedups_are_over_ours(monkeypatch) -> None:
    monkeypatch.setattr(op_benchmark, "interleave", lambda *args: {OURS: [1.0, 2.0], DEFINITION: [3.0, 4.0]})
    rows = op_benchmark.benchmark_ops(OpSettings(ways=(DEFINITION,), train=False))["rows"]
    assert [row["speedup"] for row in rows] == [1.0, 2.5]


@pytest.mark.usefixtures("_tiny")
def test_our_own_failure_is_no_missing_way(monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("ours")

    monkeypatch.setattr(op_benchmark, "channel_attention", fail)
    with pytest.raises(RuntimeError, match="ours"):
        op_benchmark.benchmark_ops(OpSettings(ways=(DEFINITION,)))


@pytest.mark.usefixtures("_tiny")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_benchmark.torch, "compile", lambda call, **options: call)
    file = tmp_path / "ops.json"
    arguments = "--ops channel_attention --no-train --rounds 1 --threads 1 --dtype bfloat16 --json"
    assert cli.main(["benchmark", *arguments.split(), "--output", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(file.read_text())
    assert {row["mode"] for row in report["rows"]} == {"inference"}
    assert cli.main(["benchmark", "--ops", "--rounds", "1", "--device", "cpu"]) == 0
    assert "torch.compile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ops softmax", "'softmax' is unknown; choose from window_attention, "),
        ("swin_tiny --ops", "not models such as swin_tiny"),
        ("--ops --sizes 64,96", "--ops does not go with --sizes"),
        ("--ops --against swin_tiny", "--against does not go with --ops"),
        ("--ops --size 64", "--size does not go with --ops"),
        ("--ops --optimize", "--optimize does not go with --ops"),
        ("--ops --output /no/such/folder/ops.json", "/no/such/folder/ops.json"),
        ("--ops --device toaster", "toaster"),
    ],
)
def test_bad_requests(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(op_benchmark, "_measure", lambda *args: pytest.fail("measured"))
    try:
        code: Any = cli.main(["benchmark", *arguments.split()])
    except SystemExit as stop:  # argparse's way
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
