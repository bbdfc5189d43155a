"""`striate benchmark --sizes`: rows, files and plot; and which costs must grow linearly with the image."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import striate
from helpers import relative
from striate.ops import gated_linear_attention, route_regions, routing_attention
from striate.ops.partition import crop, merge, pad_map, padded_size, split
from striate.ops.routing_attention import cpu
from striate.train import benchmark as bench
from striate.train import cli, growth, measure
from striate.train.measure import PeakMemory, Workload

# The report


def _work(*keys: tuple[str, int]) -> dict[str, Workload]:
    return {f"{name} {size}": Workload(name, "plain", 2, size, "float32", "cpu") for name, size in keys}


def test_rows_compare_with_the_first_size_round_by_round() -> None:
    work = _work(("a", 100), ("a", 200), ("b", 100), ("b", 200))
    timings = {"a 100": [1.0, 2.0, 4.0], "a 200": [4.0, 16.0, 16.0], "b 100": [1.0] * 3, "b 200": [2.0] * 3}
    peaks = {"a 100": PeakMemory(10, True), "a 200": PeakMemory(35, True), "b 100": None, "b 200": PeakMemory(7, False)}
    rows = growth.make_rows(work, timings, peaks)
    assert [(row["model"], row["size"], row["batch"]) for row in rows] == [
        ("a", 100, 2), ("a", 200, 2), ("b", 100, 2), ("b", 200, 2)
    ]  # fmt: skip
    assert [row["time_per_pixel_ratio"] for row in rows] == [1.0, 1.0, 1.0, 0.5]
    assert [row["memory_ratio"] for row in rows] == [1.0, 3.5, None, None]
    assert rows[1]["microseconds_per_pixel"] == pytest.approx(16.0 / (2 * 200**2) * 1e6)
    table = growth.format_rows(rows)
    assert "3.5x" in table
    assert "lower bound" in table


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 1e-3)
    monkeypatch.setattr(measure, "peak_memory", lambda work, threads: PeakMemory(work.size << 20, True))


@pytest.mark.usefixtures("_quick")
def test_command_writes_csv_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cost.csv"
    arguments = "biformer_nano timm:test_resnet --sizes 64,96 --rounds 2 --threads 1 --json --optimize"
    assert cli.main(["benchmark", *arguments.split(), "--output", str(file)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    with file.open() as text:
        written = list(csv.DictReader(text))
    assert [(row["model"], row["mode"], row["size"], row["batch"]) for row in written] == [
        (name, "optimized", size, "1") for name in ("biformer_nano", "timm:test_resnet") for size in ("64", "96")
    ]
    for line, row in zip(written, rows, strict=True):
        assert float(line["seconds"]) == row["seconds"] > 0
        assert int(line["peak_memory_bytes"]) == row["size"] << 20
    with Image.open(file.with_suffix(".png")) as plot:
        assert plot.format == "PNG"
        assert plot.width > 2 * plot.height  # two panels
        assert len(plot.convert("RGB").getcolors(1 << 24) or []) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.csv", "cost.png"]


@pytest.mark.usefixtures("_quick")
def test_without_memory_there_is_one_panel_and_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "biformer_nano --sizes 64,96 --rounds 1 --threads 1 --no-memory"
    assert cli.main(["benchmark", *arguments.split(), "--output", str(tmp_path / "cost.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["-", "-"]
    assert ",,,\n" in (tmp_path / "cost.csv").read_text()
    with Image.open(tmp_path / "cost.png") as plot:
        assert plot.width < 2 * plot.height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("biformer_nano --sizes 64", "at least two different sizes"),
        ("biformer_nano --sizes 64,64", "at least two different sizes"),
        ("biformer_nano --sizes 64,0", "'0' is no positive number"),
        ("biformer_nano --sizes 64,96 --size 64", "--size does not go with --sizes"),
        ("biformer_nano --sizes 64,96 --against swin_tiny", "--against does not go with --sizes"),
        ("biformer_nano --sizes 64,96 --output cost.json", "cost.json: give a .csv file"),
        ("biformer_nano --sizes 64,96 --output /no/such/folder/cost.csv", "/no/such/folder/cost.csv"),
        ("biformer_nanno --sizes 64,96", "no model 'biformer_nanno'"),
        ("biformer_nano swin_tiny", "give one model, not 2"),
        ("", "give one model, not 0"),
    ],
)
def test_bad_requests_write_nothing(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(growth, "interleave", lambda *args, **kwargs: pytest.fail("measured"))
    try:
        code: Any = cli.main(["benchmark", *arguments.split()])
    except SystemExit as stop:  # argparse's way
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["benchmark", "biformer_nano", "--sizes", "64,96"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# What must grow linearly


def _flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def test_gated_linear_attention_costs_the_same_per_token_at_any_length() -> None:
    per_token = []
    for tokens in (1024, 4096):
        inputs = [torch.randn(1, tokens, 2, 16) for _ in range(3)] + [-torch.rand(1, tokens, 2, 16) for _ in range(2)]
        per_token.append(_flops(lambda inputs=inputs: gated_linear_attention(*inputs)) / tokens)
    assert per_token[1] == pytest.approx(per_token[0], rel=0.01)


def test_vig_costs_the_same_per_pixel_at_any_size() -> None:
    model = striate.create_model("vig_h_tiny").eval()
    small, large = (_flops(lambda size=size: model(torch.zeros(1, 3, size, size))) / size**2 for size in (128, 256))
    assert large == pytest.approx(small, rel=0.05)


def gather_then_attend(qkv: Tensor, routes: Tensor, num_heads: int, region: tuple[int, int], scale: float) -> Tensor:
    """Routing attention as its equations are written: a copy of the keys and values of every route, then attention."""
    b, h, w, c = qkv.shape
    groups = split(pad_map(qkv, region), region)
    regions, tokens = groups.shape[1:3]
    q, k, v = groups.chunk(3, -1)
    images = torch.arange(b)[:, None, None]
    k, v = (t[images, routes].flatten(2, 3) for t in (k, v))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    out = ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(b, regions, tokens, c // 3)
    return crop(merge(out, padded_size((h, w), region), region), (h, w))


def test_the_yardstick_is_routing_attention() -> None:
    qkv = torch.randn(2, 13, 11, 3 * 8)
    routes = route_regions(qkv, region=(4, 3), topk=3)
    got = gather_then_attend(qkv, routes, 2, (4, 3), 0.3)
    assert relative(got, routing_attention(qkv, routes, num_heads=2, region=(4, 3), scale=0.3)) < 1e-6


def biformer_peak(gather: bool) -> int:
    """Bytes that one inference of BiFormer-T on 672x672 pixels takes above the loaded model."""
    if gather:
        cpu.routing_attention = gather_then_attend
    torch.manual_seed(0)
    model = striate.create_model("biformer_tiny").eval()
    image = torch.randn(1, 3, 672, 672)
    with torch.inference_mode():
        model(image[..., :64, :64])
        return measure.resident_rise(lambda: model(image)).rise


def test_routing_holds_no_copy_of_the_routed_keys_and_values() -> None:
    peaks = [
        int(subprocess.run([sys.executable, __file__, word], capture_output=True, text=True, check=True).stdout)
        for word in ("ours", "gather")
    ]
    assert peaks[0] < peaks[1] / 2, f"{peaks[0] >> 20} MiB against {peaks[1] >> 20} MiB of gather-then-attend"


if __name__ == "__main__":
    print(biformer_peak(sys.argv[1] == "gather"))
