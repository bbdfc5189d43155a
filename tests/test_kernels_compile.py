"""Every kernel compiles well for every first-class GPU, and `striate kernels` tells what each needs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from striate.ops import _aot, _triton
from striate.ops._aot import KernelReport
from striate.train.cli import main
from triton_tools import interpreted

KEYS = {"op", "config", "target", "registers", "spills", "shared", "mma"}
PRODUCTS = tuple(op for op in _aot.OPS if op != "lif")  # operators that multiply matrices


@pytest.mark.parametrize("op", _aot.OPS)
@pytest.mark.parametrize("target", _aot.CHECKED)
def test_every_configuration_is_good(target: str, op: str) -> None:
    reports = _aot.compile_all(target, [op])
    bad = {f"{r.config} {r.kernel} ({r.warps} warps)": r.faults for r in reports if r.faults}
    assert not bad
    assert {r.config for r in reports} == {label for label, _ in _aot.configurations(op)}
    for passed in ("forward", "backward") if op != "binary" else ("real input",):
        assert any(r.mma for r in reports if passed in r.config) == (op in PRODUCTS), passed


@pytest.mark.parametrize("target", _aot.CHECKED)
def test_spiking_neurons_are_loaded_16_bytes_at_a_time(target: str) -> None:
    """Each time step once, unless the backward needs the registers for more steps: then fewer bytes."""
    loads = {r.config: r.loads for r in _aot.compile_all(target, ["lif"])}
    for name in ("bf16", "fp16", "fp32"):
        assert loads[f"{name} lif T 4 forward"] == {16: 4}
        assert loads[f"{name} lif T 4 backward"] == {16: 8}
    assert all(
        list(widths) == [16] for config, widths in loads.items() if "forward" in config or "multispike" in config
    )
    assert loads["bf16 lif T 16 backward"] == {4: 32}
    assert loads["fp32 lif T 16 backward"] == {8: 32}


@pytest.mark.parametrize("target", _aot.CHECKED)
def test_bits_are_counted_by_an_instruction(target: str) -> None:
    """Once per word and element of a thread. What is packed is loaded 16 bytes at a time."""
    for label, launch in _aot.configurations("binary"):
        if "real input" in label:
            continue
        with _aot.compiling(target) as kernels:
            launch()
        for kernel in kernels.values():
            nvidia = target.startswith("sm_")
            code = kernel.asm["ptx" if nvidia else "amdgcn"]
            counted = len(re.findall(r"\bpopc\.b64\b", code)) or len(re.findall(r"\bv_bcnt_u32_b32", code)) // 2
            if "matmul" in kernel.metadata.name:
                assert counted == 64 * 64 // (kernel.metadata.num_warps * (32 if nvidia else 64)), label
            else:
                assert counted > 0
                assert list((_aot._nvidia_loads if nvidia else _aot._amd_loads)(code)) == [16], label


@pytest.mark.parametrize("op", PRODUCTS)
def test_float32_as_tf32_is_good(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "precision", lambda dtype: "tf32" if dtype == torch.float32 else "ieee")
    for label, launch in _aot.configurations(op):
        if ("float32" in label or "fp32" in label) and "binary input" not in label:
            reports = _aot.compile_launch(op, label, "sm_90", launch)
            assert not [(r.kernel, r.faults) for r in reports if r.faults], label
            assert any(r.mma for r in reports), label


@pytest.mark.parametrize("op", _aot.OPS)
def test_labels_are_distinct(op: str) -> None:
    labels = [label for label, _ in _aot.configurations(op)]
    assert len(labels) == len(set(labels)) > 0


# ------------------------------------------------------------------------------------------------- the tool itself


@triton.jit
def _product_kernel(x, y, out, depth, size: tl.constexpr):
    """size x size = (size, depth) times (depth, size)."""
    row, column = tl.arange(0, size), tl.arange(0, 64)
    total = tl.zeros((size, size), tl.float32)
    for k in range(0, depth, 64):
        a = tl.load(x + row[:, None] * 512 + k + column[None, :])
        b = tl.load(y + (k + column[:, None]) * 512 + row[None, :])
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + row[:, None] * size + row[None, :], total)


def product(size: int, dtype: torch.dtype, warps: int) -> None:
    x = torch.empty(512, 512, dtype=dtype, device="meta")
    _product_kernel[(1,)](x, x, torch.empty(size, size, device="meta"), 512, size, num_warps=warps)


def good() -> None:
    product(64, torch.bfloat16, 4)


def spilling() -> None:
    product(128, torch.bfloat16, 1)


def broken() -> None:
    product(3, torch.bfloat16, 4)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let one operator have the given launches and the others none."""

    def configure(*launches: Callable[[], None]) -> None:
        monkeypatch.setattr(_aot, "OPS", ("window_attention",))
        monkeypatch.setattr(_aot, "configurations", lambda op: [(f.__name__, f) for f in launches])

    return configure


@pytest.mark.parametrize("target", _aot.CHECKED)
def test_reports(target: str) -> None:
    (report,) = _aot.compile_launch("window_attention", "good", target, good)
    assert report.kernel == "_product_kernel"
    assert not report.faults
    assert report.mma > 0
    assert report.dots == 1
    assert report.warps == 4
    assert 16 < report.registers < 256
    assert max(report.loads) == 16
    assert (report.tensor_memory > 0) == (target == "sm_100")
    (exact,) = _aot.compile_launch("window_attention", "exact", target, lambda: product(64, torch.float32, 4))
    assert (exact.mma > 0) == (exact.dots > 0) == (target == "gfx942"), "float32 in full precision"


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_spills_are_seen(target: str) -> None:
    (report,) = _aot.compile_launch("window_attention", "spilling", target, spilling)
    assert report.spills > 100
    assert report.faults == [f"spills {report.spills} bytes"]


@pytest.mark.parametrize(("code", "spills"), [("STG.E [R2], R3", 0), ("STL.64 [R1+0x8], R4", 24), ("LDL R0, [R1]", 24)])
def test_an_unused_stack_frame_is_no_spill(code: str, spills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = "Function _k:\n REG:40 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0"
    monkeypatch.setattr(_aot, "_read", lambda tool, *arguments: usage if "-res-usage" in arguments else code)
    assert _aot._nvidia_usage(b"") == (40, spills)


def test_faults() -> None:
    fine = KernelReport("window_attention", "a", "k", "sm_90", 255, 0, 227 * 1024, 1, 4, 512, 1, {})
    assert not fine.faults
    assert replace(fine, shared=227 * 1024 + 1).faults == ["needs 232449 bytes of shared memory of 232448"]
    assert replace(fine, tensor_memory=513).faults == ["needs 513 columns of tensor memory of 512"]
    assert replace(fine, mma=0).faults == ["has products but no matrix instruction"]
    assert not replace(fine, mma=0, dots=0).faults
    assert replace(fine, target="gfx942").faults == ["needs 232448 bytes of shared memory of 65536"]


def test_load_widths() -> None:
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.b16 { %rs1 }, [ %rd1 + 0 ];
    cp.async.ca.shared.global [ %r9 + 0 ], [ %rd3 + 0 ], 0x8, %r7;
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];"""
    assert _aot._nvidia_loads(ptx) == {2: 1, 8: 1, 16: 1}
    lines = ["buffer_load_dwordx4 v[2:5]", "global_load_ushort v1", "global_load_dword v1", "global_load_b128 v1"]
    assert _aot._amd_loads("\n".join([*lines, "buffer_load_ubyte v1", "s_load_dword s1"])) == {1: 1, 2: 1, 4: 1, 16: 2}


@pytest.mark.parametrize("target", ["sm_75", "sm_9", "h100", "gfx", ""])
def test_unknown_targets(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (_aot.compile_all, _aot.shared_limit):
        with pytest.raises(ValueError, match=f"target='{target}' is unknown; choose one of sm_80, "):
            call(target)
    assert main(["kernels", "--target", target]) == 2
    assert "choose one of sm_80" in capsys.readouterr().err


def test_unknown_operator(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="op='softmax' has no Triton kernels; choose one of window_attention, "):
        _aot.compile_all("sm_90", ["softmax"])
    assert main(["kernels", "--op", "softmax"]) == 2
    assert "choose one of window_attention" in capsys.readouterr().err


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_triton, "triton", None)
    assert main(["kernels"]) == 2
    assert "triton is not installed" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match="pip install 'triton"):
        _aot.compile_launch("window_attention", "good", "sm_90", good)


def test_not_while_interpreting() -> None:
    message = "leave it first"
    with interpreted(), pytest.raises(RuntimeError, match=message):
        _aot.compile_launch("window_attention", "good", "sm_90", good)


def test_driver_is_as_before() -> None:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run, active = JITFunction.run, driver._active
    with pytest.raises(RuntimeError, match=r"(?s)window_attention 'broken' does not compile for sm_90: .*power of 2"):
        _aot.compile_launch("window_attention", "broken", "sm_90", broken)
    assert JITFunction.run is run
    assert driver._active is active


# ----------------------------------------------------------------------------------------------------- the command


def test_command_prints_json(configured: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    configured(good)
    assert main(["kernels", "--json", "--jobs", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["target"] for row in rows] == list(_aot.CHECKED)
    for row in rows:
        assert row.keys() == KEYS
        assert (row["op"], row["config"], row["spills"]) == ("window_attention", "good: _product_kernel", 0)
        assert row["mma"] > 0


def test_command_prints_a_table_and_writes_it(
    configured: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    configured(good)
    file = tmp_path / "new" / "kernels.md"
    assert main(["kernels", "--target", "sm_80", "--target", "gfx942", "--jobs", "1", "--markdown", str(file)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert set(head.split()) == KEYS
    assert [row.split()[:4] for row in rows] == [
        ["window_attention", "good:", "_product_kernel", t] for t in ("sm_80", "gfx942")
    ]
    said = file.read_text()
    assert "## window_attention\n\n| configuration | kernel | sm_80 | gfx942 |\n|---|---|---|---|\n" in said
    assert "| good | `_product_kernel` | " in said
    assert said.count(" 0 B spilled, ") == 2


def test_command_fails_for_bad_kernels(
    configured: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    configured(broken, spilling)
    file = tmp_path / "kernels.md"
    assert main(["kernels", "--target", "sm_80", "--jobs", "1", "--json", "--markdown", str(file)]) == 1
    said = capsys.readouterr()
    assert [json.loads(line)["config"] for line in said.out.splitlines()] == ["spilling: _product_kernel"]
    assert "'broken' does not compile for sm_80" in said.err
    assert "window_attention spilling: _product_kernel on sm_80 spills" in said.err
    assert not file.exists()


def test_command_with_processes(capsys: pytest.CaptureFixture[str]) -> None:
    op = min(_aot.OPS, key=lambda name: len(_aot.configurations(name)))
    assert main(["kernels", "--target", "sm_90", "--op", op, "--json", "--jobs", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["config"].rpartition(": ")[0] for row in rows} == {label for label, _ in _aot.configurations(op)}


def test_command_refuses_no_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--jobs", "0"]) == 2
    assert "--jobs 0 must be at least 1" in capsys.readouterr().err
