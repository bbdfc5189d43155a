"""`striate benchmark`: order of turns, ratios, FLOPs, memory, limits, report, command line. No time decides a test."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from striate.backbones import _registry
from striate.backbones.biformer import BiFormer
from striate.train import benchmark as bench
from striate.train import cli, measure
from striate.train.benchmark import Settings, Spread
from striate.train.measure import PeakMemory, Runner, Workload

NANO = Workload("biformer_nano", "plain", batch=2, size=64, dtype="float32", device="cpu")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other in work as small as this."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Order and statistics


@pytest.mark.parametrize("count", range(1, 8))
def test_every_task_takes_every_place_and_follows_every_other_equally_often(count: int) -> None:
    orders = [bench.turn_order(count, turn) for turn in range(2 * count)]
    places = Counter((place, task) for order in orders for place, task in enumerate(order))
    followers = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert places == dict.fromkeys(itertools.product(range(count), repeat=2), 2)
    assert followers == dict.fromkeys(itertools.permutations(range(count), 2), 2)


def _tasks(names: str, log: list[str]) -> list[bench.Task]:
    def task(name: str) -> bench.Task:
        def run() -> dict[str, float]:
            log.append(name)
            return {name: float(len(log))}

        return run

    return [task(name) for name in names]


def test_interleaving_runs_everything_once_a_round_and_pairs_by_round() -> None:
    log: list[str] = []
    ticks: list[int] = []
    collected = bench.interleave(_tasks("abc", log), rounds=6, seconds=None, progress=lambda: ticks.append(1))
    rounds = ["".join(log[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["".join("abc"[i] for i in bench.turn_order(3, turn)) for turn in range(6)]
    assert len(ticks) == 6
    for name, places in collected.items():
        assert [int(place - 1) // 3 for place in places] == list(range(6)), f"{name} is out of step"


@pytest.mark.parametrize(
    ("rounds", "seconds", "done"), [(4, None, 4), (None, 10.0, 4), (2, 10.0, 2), (9, 10.0, 4), (None, 0.5, 1)]
)
def test_rounds_and_seconds_both_limit_but_one_round_is_always_done(
    rounds: int | None, seconds: float | None, done: int
) -> None:
    now = iter(range(0, 100, 3))  # every look at the clock finds it three seconds on
    collected = bench.interleave(_tasks("ab", []), rounds, seconds, clock=lambda: next(now))
    assert [len(values) for values in collected.values()] == [done, done]


def test_spread_has_median_and_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ratio_is_taken_round_by_round() -> None:
    # The machine is slow in some rounds: the ratio of medians would be 4 / 4, and that of means still less.
    assert Spread.of_ratios([1.0, 8.0, 4.0], [2.0, 16.0, 4.0]) == Spread(0.5, 0.5, 0.75)
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratios([1.0, 2.0], [1.0])


# The report


def _report(**changes: Any) -> dict[str, Any]:
    """Of three rounds in which the machine is once half as fast, with round numbers everywhere."""
    work = {
        key: replace(NANO, mode=key.split("/")[1], source=key.split("/")[0], batch=4)
        for key in ("model/plain", "model/optimized", "model/train", "rival/plain", "rival/train")
    }
    timings = {
        "model/plain": [2.0, 4.0, 2.0],
        "model/optimized": [1.0, 2.0, 1.5],
        "model/train": [8.0, 16.0, 8.0],
        "rival/plain": [4.0, 8.0, 2.0],
        "rival/train": [10.0, 20.0, 10.0],
        "float32 torch.mm a": [0.5, 1.0, 0.5],
        "float32 oneDNN b": [1.0, 2.0, 1.0],
    }
    peaks = {key: PeakMemory(size, True) for key, size in zip(work, (30, 20, 60, 40, 80), strict=True)}
    limits = {"float32": SimpleNamespace(flops={"torch.mm a": 400, "oneDNN b": 1600})}
    flops = {"model": 200, "rival": 100}
    parts: dict[str, Any] = dict(work=work, timings=timings, flops=flops, peaks=peaks, limits=limits) | changes
    return bench.make_report(**parts) | {"environment": measure.environment("cpu")}


def _by_key(report: dict[str, Any]) -> dict[str, Any]:
    return {f"{result['role']}/{result['mode']}": result for result in report["results"]}


def test_report_states_speed_fraction_and_ratios() -> None:
    report = _report()
    results = _by_key(report)
    plain, train = results["model/plain"], results["model/train"]
    assert report["rounds"] == 3
    assert plain["seconds"] == {"median": 2.0, "q1": 2.0, "q3": 3.0, "rounds": [2.0, 4.0, 2.0]}
    assert plain["images_per_second"] == 2.0
    # oneDNN does 1600 in every good round, torch.mm 800; 4 images of 200 in 2 seconds are 400.
    limit = report["gemm_limit"]["float32"]
    assert (limit["best"], limit["flops_per_second"]) == ("oneDNN b", 1600.0)
    assert limit["all"] == {"torch.mm a": 800.0, "oneDNN b": 1600.0}
    assert plain["gemm_fraction"] == {"median": 0.25, "q1": 0.25, "q3": 0.25}  # the slow round has a lower limit too
    assert train["flops_per_image"] == 600
    assert train["gemm_fraction"]["median"] == 4 * 600 / 8 / 1600
    assert plain["against"] == {
        "result": "rival/plain",
        "time_ratio": {"median": 0.5, "q1": 0.5, "q3": 0.75},
        "speedup": 2.0,
        "memory_ratio": 0.75,
    }
    assert results["model/optimized"]["against"]["result"] == "rival/plain"
    assert results["model/optimized"]["against"]["time_ratio"] == {"median": 0.25, "q1": 0.25, "q3": 0.5}
    assert train["against"]["result"] == "rival/train"
    assert train["against"]["time_ratio"]["median"] == 0.8
    assert train["against"]["memory_ratio"] == 0.75
    assert results["rival/train"]["against"] is None


def _timings() -> dict[str, list[float]]:
    captured: dict[str, list[float]] = {}
    for key, result in _by_key(_report()).items():
        captured[key] = result["seconds"]["rounds"]
    return captured | {"float32 torch.mm a": [0.5, 1.0, 0.5], "float32 oneDNN b": [1.0, 2.0, 1.0]}


def test_without_a_rival_optimized_is_compared_with_plain() -> None:
    alone = {"model/plain": NANO, "model/optimized": NANO, "model/train": NANO}
    results = _report(work=alone, timings={k: v for k, v in _timings().items() if not k.startswith("rival")})["results"]
    assert [result["against"] and result["against"]["result"] for result in results] == [None, "model/plain", None]
    assert results[1]["against"]["time_ratio"]["median"] == 0.5


def test_table_shows_the_numbers_and_what_they_were_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "12345")
    lines = bench.format_report(_report()).splitlines()
    row = next(line for line in lines if line.startswith("model  train"))
    assert row.split() == [
        *("model", "train", "8000.0", "(8000.0-12000.0)", "0.5", "0.19", "0"),
        *("0.800", "(0.800-0.800)", "1.25x", "0.75"),
    ]
    text = "\n".join(lines)
    assert "GEMM limit, float32: 0 GFLOP/s (oneDNN b)" in text
    assert "MALLOC_TRIM_THRESHOLD_=12345" in text
    assert f"torch: {torch.__version__}" in text
    assert "lower bound" not in text


def test_table_without_memory_or_rival_has_dashes_and_says_what_is_a_bound() -> None:
    table = bench.format_report(_report(peaks={}))
    assert next(line for line in table.splitlines() if line.startswith("rival  plain")).split()[-5:] == ["-"] * 5
    assert "lower bound" in bench.format_report(_report(peaks={"model/plain": PeakMemory(10, False)}))


def test_environment_names_the_allocator_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    monkeypatch.setenv("UNRELATED", "1")
    found = measure.environment("cpu")
    assert found["variables"]["MALLOC_MMAP_THRESHOLD_"] == "1"
    assert "UNRELATED" not in found["variables"]
    assert found["threads"] == torch.get_num_threads()
    assert "jemalloc" not in found["malloc"]
    maps = "7f00-7f01 r-xp 0 fe:00 1 /usr/lib/libc.so.6\n7f02-7f03 r-xp 0 fe:00 2 /usr/lib/libjemalloc.so.2"
    monkeypatch.setattr(measure, "_read", lambda path: maps if path == "/proc/self/maps" else None)
    assert measure.environment("cpu")["malloc"] == "libjemalloc.so.2"


@pytest.mark.parametrize(("load", "warnings"), [(0.9, 0), (1.1, 1)])
def test_a_busy_machine_is_reported(
    monkeypatch: pytest.MonkeyPatch, messages: Callable[[], list[str]], load: float, warnings: int
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert measure.environment("cpu")["load_average"] == load
    said = messages()
    assert len(said) == warnings
    assert all(f"load {load} on 2 CPUs" in line for line in said)


# FLOPs


@pytest.mark.parametrize(
    ("source", "gmacs"),
    [
        ("swin_tiny", 4.5),  # arXiv 2103.14030, table 1
        ("biformer_tiny", 2.2),  # arXiv 2303.08810, table 2
    ],
)
def test_flops_are_the_published_ones(source: str, gmacs: float) -> None:
    runner = Runner(replace(NANO, source=source, size=224, batch=1))
    assert runner.count_flops() / 2e9 == pytest.approx(gmacs, rel=0.03)


def test_flops_of_fused_attention_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)[:, None].contiguous()  # else the CPU has no fused form
            return F.scaled_dot_product_attention(tokens, tokens, tokens)

    monkeypatch.setenv("STRIATE_BACKEND", "cpu")
    runner = Runner(NANO)
    runner.model = Attention()
    assert runner.count_flops() == 2 * 2 * 64**4 * 3  # q k^T and the product with v, two per multiply-add
    assert os.environ["STRIATE_BACKEND"] == "cpu"


# Workloads


def test_timm_prefix_means_timms_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = replace(_registry.model_info("biformer_nano"), name="resnet10t")
    monkeypatch.setitem(_registry._MODELS, "resnet10t", ours)
    assert isinstance(measure.build("resnet10t", 64), BiFormer)
    assert isinstance(measure.build("timm:resnet10t", 64), ResNet)
    with pytest.raises(ValueError, match=r"timm has no model 'biformer_nano' of its own.*list_models"):
        measure.build("timm:biformer_nano", 64)
    with pytest.raises(ValueError, match="'nonsense'"):
        measure.build("timm:nonsense", 64)


@pytest.mark.parametrize("source", ["timm:vit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_models_of_one_image_size_are_built_for_the_size_asked_for(source: str) -> None:
    Runner(replace(NANO, source=source))()


def test_modes_do_what_they_say() -> None:
    before = Runner(NANO).model.state_dict()
    train = Runner(replace(NANO, mode="train"))
    train()
    assert all(parameter.grad is not None for parameter in train.model.parameters())
    changed = {key for key, value in train.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"head.fc.weight", "stem.conv1.conv.weight", "norm.running_mean"} <= changed
    plain = Runner(NANO)
    plain()
    assert all(torch.equal(value, before[key]) for key, value in plain.model.state_dict().items())
    assert all(parameter.grad is None for parameter in plain.model.parameters())
    optimized = Runner(replace(NANO, mode="optimized"))
    new = {type(m) for m in optimized.model.modules()} - {type(m) for m in plain.model.modules()}
    assert new, "optimize_for_inference changed nothing"
    assert torch.allclose(optimized.model(optimized.images), plain.model(plain.images), atol=1e-5)


@pytest.mark.parametrize(("dtype", "seen"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("mode", ["plain", "train"])
def test_bfloat16_is_autocast(mode: str, dtype: str, seen: torch.dtype) -> None:
    runner = Runner(replace(NANO, mode=mode, dtype=dtype))
    dtypes: list[torch.dtype] = []
    runner.model.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    runner()
    assert dtypes == [seen]
    assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.float32}


def test_count_runs_on_the_first_images_only() -> None:
    runner, shapes = Runner(NANO), []
    runner.model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    runner(1)
    runner()
    assert shapes == [(1, 3, 64, 64), (2, 3, 64, 64)]


def test_a_size_that_cannot_work_is_explained() -> None:
    runner = Runner(replace(NANO, source="timm:test_vit", size=50))
    pattern = r"timm:test_vit \(plain\) does not run on a batch of {} images of 50x50: .*divisible"
    with pytest.raises(ValueError, match=pattern.format(2)):
        runner.warm_up()
    with pytest.raises(ValueError, match=pattern.format(1)):
        runner.count_flops()
    assert "STRIATE_BACKEND" not in os.environ


def test_seconds_per_call_is_a_mean_without_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 16.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    collecting: list[bool] = []
    assert measure.seconds_per_call(lambda: collecting.append(gc.isenabled()), 3, torch.device("cpu")) == 2.0
    assert collecting == [False] * 3
    assert gc.isenabled()


def test_cuda_is_synchronised_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def read_clock() -> float:
        events.append("clock")
        return 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(measure.time, "perf_counter", read_clock)
    measure.seconds_per_call(lambda: events.append("call"), 2, torch.device("cuda"))
    assert events == ["wait", "clock", "call", "call", "wait", "clock"]


@pytest.mark.parametrize(("seconds", "repeats"), [(0.05, 4), (0.07, 3), (1.0, 1), (0.0, 200_000_000)])
def test_fast_calls_are_repeated(seconds: float, repeats: int) -> None:
    assert measure.repeats_for(seconds, 0.2) == pytest.approx(repeats)


# Memory


def _touch(mib: int) -> None:
    torch.ones(mib * MIB, dtype=torch.uint8)


def test_resident_rise_is_that_of_the_call_alone() -> None:
    _touch(400)  # a higher peak before does not count
    rise = measure.resident_rise(lambda: _touch(100))
    assert rise.exact
    assert rise.rise == pytest.approx(100 * MIB, rel=0.15)


def test_resident_rise_is_a_lower_bound_where_the_mark_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    _touch(300)
    rise = measure.resident_rise(lambda: _touch(100))
    assert not rise.exact
    assert 0 <= rise.rise < 50 * MIB
    monkeypatch.setattr(measure, "_status_bytes", lambda key: (_ for _ in ()).throw(OSError(2, "no such file")))
    assert 0 <= measure.resident_rise(lambda: _touch(100)).rise < 50 * MIB


def test_peak_memory_is_measured_in_processes_of_their_own() -> None:
    plain = measure.peak_memory(replace(NANO, batch=16, size=128), threads=1)
    train = measure.peak_memory(replace(NANO, batch=16, size=128, mode="train"), threads=1)
    assert plain
    assert train
    parameters = 4 * sum(parameter.numel() for parameter in Runner(NANO).model.parameters())
    assert plain.exact
    assert plain.rise > 16 * 32 * 32 * 32 * 4, "the first map alone takes more"
    assert train.rise > plain.rise + parameters, "a training step keeps gradients and activations"
    with pytest.raises(ValueError, match="divisible"):
        measure.peak_memory(replace(NANO, source="timm:test_vit", size=50), threads=1)


class _Deadly:
    """Ends the process that unpickles it."""

    device = "cpu"

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (1,)


def test_a_process_that_dies_is_reported(messages: Callable[[], list[str]]) -> None:
    assert measure.peak_memory(_Deadly(), threads=1) is None  # type: ignore[arg-type]
    said = messages()
    assert len(said) == 1
    assert "its process died" in said[0]


def test_cuda_peak_is_that_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100)

    class Run:
        device = torch.device("cuda")

        def __call__(self) -> None:
            events.append("run")

    assert measure._cuda_rise(Run()) == PeakMemory(70, True)  # type: ignore[arg-type]
    assert events == ["wait", "reset", "run", "wait"]


# The limit


@pytest.fixture
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.GEMM_SHAPES, "cpu", [(64, 32, 48)])
    monkeypatch.setattr(measure, "GEMM_SECONDS", 1e-4)


@pytest.mark.usefixtures("_small_products")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_limit_times_both_libraries(dtype: str) -> None:
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if onednn and (dtype == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()):  # not by every CPU
        expected = ["torch.mm 64x32x48", "oneDNN 64x32x48"]
    else:
        expected = ["torch.mm 64x32x48"]
    limit = measure.GemmLimit(dtype, "cpu")
    limit.warm_up()
    assert list(limit.flops.items()) == [(key, 2 * 64 * 32 * 48) for key in expected]
    assert list(limit()) == expected
    assert min(limit().values()) > 0
    outputs = [call() for call in limit._calls.values()]
    for out in outputs:
        assert out.shape == (64, 48)
        assert out.dtype == getattr(torch, dtype)
        assert torch.allclose(out.float(), outputs[0].float(), atol=0.1)


@pytest.mark.usefixtures("_small_products")
def test_without_onednn_the_limit_is_that_of_mm_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, messages: Callable[[], list[str]]
) -> None:
    def missing(*args: object) -> Tensor:
        raise NotImplementedError("Could not run 'mkldnn::_reorder_linear_weight'\nand so on")

    measure._say_once.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing)
    for _ in range(2):
        assert list(measure.GemmLimit("float32", "cpu").flops) == ["torch.mm 64x32x48"]
    said = messages()
    assert len(said) == 1
    assert "torch.mm alone" in said[0]
    assert "and so on" not in said[0]


# The command


def _command(*arguments: str) -> int:
    return cli.main(["benchmark", *arguments])


@pytest.mark.usefixtures("_small_products")
def test_command_reports_everything_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 1e-3)
    asked: list[Workload] = []

    def peak(workload: Workload, threads: int) -> PeakMemory:
        asked.append(workload)
        return PeakMemory(1000 * len(asked), True)

    monkeypatch.setattr(measure, "peak_memory", peak)
    torch.set_num_threads(3)
    file = tmp_path / "report.json"
    arguments = "biformer_nano --against timm:test_resnet --batch 2 --size 64 --threads 1 --optimize --rounds 2 --json"
    assert _command(*arguments.split(), "--output", str(file)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(file.read_text())
    assert torch.get_num_threads() == 3, "as it was before"
    assert (report["batch"], report["size"], report["device"], report["rounds"]) == (2, 64, "cpu", 2)
    assert report["environment"]["threads"] == 1
    results = _by_key(report)
    assert list(results) == ["model/plain", "model/optimized", "model/train", "rival/plain", "rival/train"]
    assert [replace(w, batch=2) for w in asked] == [
        Workload(result["name"], result["mode"], 2, 64, "float32", "cpu") for result in results.values()
    ]
    for index, result in enumerate(results.values(), start=1):
        seconds = result["seconds"]
        assert len(seconds["rounds"]) == 2
        assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert result["images_per_second"] == pytest.approx(2 / seconds["median"])
        assert result["gemm_fraction"]["median"] > 0
        assert result["peak_memory_bytes"] == 1000 * index
        assert (result["against"] is None) == (result["role"] == "rival")
    ours, theirs = (results[key]["seconds"]["rounds"] for key in ("model/optimized", "rival/plain"))
    ratio = Spread.of_ratios(ours, theirs).median
    assert results["model/optimized"]["against"]["time_ratio"]["median"] == pytest.approx(ratio)
    assert results["model/plain"]["flops_per_image"] * 3 == results["model/train"]["flops_per_image"]
    assert set(report["gemm_limit"]["float32"]["all"]) >= {"torch.mm 64x32x48"}


@pytest.mark.usefixtures("_small_products")
def test_command_prints_a_table_and_leaves_out_what_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 1e-3)
    monkeypatch.setattr(measure, "peak_memory", lambda *args: pytest.fail("memory was not wanted"))
    models = "biformer_nano --dtype bfloat16 --against biformer_nano --against-dtype float32"
    limits = "--no-train --no-memory --batch 2 --size 64 --threads 1 --rounds 1"
    assert _command(*models.split(), *limits.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batches of 2 images of 64x64, cpu, 1 threads, 1 rounds"
    rows = [line for line in lines if line.startswith("biformer_nano  ")]
    assert [row.split()[1:3] == ["plain", "bfloat16"] for row in rows] == [True, False]
    assert sum(line.startswith("GEMM limit, ") for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("biformer_nanno", "no model 'biformer_nanno'; did you mean biformer_nano"),
        ("biformer_nano --against timm:biformer_nano", "timm has no model 'biformer_nano' of its own"),
        ("biformer_nano --against swin_tinny", "no model 'swin_tinny'"),
        ("timm:test_vit --size 50", "does not run on a batch of 1 images of 50x50"),
        ("biformer_nano --size 0", "'0' is no positive number"),
        ("biformer_nano --batch -2", "'-2' is no positive number"),
        ("biformer_nano --rounds many", "'many' is no positive number"),
        ("biformer_nano --seconds inf", "'inf' is no positive number"),
        ("biformer_nano --dtype float16", "float16"),
        ("biformer_nano --device toaster", "toaster"),
        ("biformer_nano --against-dtype float32", "--against"),
        ("biformer_nano --output /no/such/folder/report.json", "/no/such/folder/report.json"),
    ],
)
def test_bad_requests_end_with_2_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    monkeypatch.setattr(bench, "interleave", lambda *args, **kwargs: pytest.fail("measured"))
    monkeypatch.setattr(measure, "peak_memory", lambda *args: pytest.fail("measured"))
    try:
        code: Any = _command(*arguments.split())
    except SystemExit as stop:  # argparse's way
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.out == ""


def test_seconds_have_a_default_only_without_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def record(settings: Settings, progress: bool) -> dict[str, Any]:
        asked.append(settings)
        return {}

    monkeypatch.setattr(bench, "benchmark", record)
    monkeypatch.setattr(bench, "format_report", lambda report: "")
    for arguments in ("", "--rounds 3", "--seconds 5", "--rounds 3 --seconds 5"):
        bench.main(["swin_tiny", *arguments.split()])
    limits = [(settings.rounds, settings.seconds) for settings in asked]
    assert limits == [(None, bench.DEFAULT_SECONDS), (3, None), (None, 5.0), (3, 5.0)]


def test_importing_the_command_is_light() -> None:
    code = "import sys, striate.train.benchmark; sys.exit(not {'torch', 'timm'}.isdisjoint(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert (done.returncode, done.stderr) == (0, "")
