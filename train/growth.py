"""`striate benchmark --sizes`: how time and memory of inference grow with the image, for several models.

All models run at all sizes in turns in one process, as in `benchmark`; peak memory is measured in processes of its own.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .benchmark import Spread, Task, align, interleave, timed

if TYPE_CHECKING:
    from .measure import PeakMemory, Workload

DEFAULT_MODELS = ("vig_h_tiny", "biformer_tiny", "swin_tiny", "maxvit_tiny", "crossformer_tiny")
COLUMNS = (
    "model", "mode", "size", "batch", "seconds", "seconds_q1", "seconds_q3", "microseconds_per_pixel",
    "time_per_pixel_ratio", "peak_memory_bytes", "peak_memory_exact", "memory_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class GrowthSettings:
    """What to measure: inference of every model (`timm:NAME` for timm's own) at every size.

    `rounds` and `seconds` both limit the timing; None for no limit.
    """

    models: tuple[str, ...] = DEFAULT_MODELS
    sizes: tuple[int, ...] = (224, 448, 896)
    batch: int = 1
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    optimize: bool = False
    memory: bool = True
    rounds: int | None = None
    seconds: float | None = 60.0


def measure_growth(settings: GrowthSettings, progress: bool = False) -> dict[str, Any]:
    """Measure and return `rows` (one per model and size, keys as in `COLUMNS`) and the `environment`.

    `time_per_pixel_ratio` is the time per pixel over that at the first size, the median of single rounds;
    `memory_ratio` the peak (rise above the loaded model) over that at the first size.

    Raises:
        ValueError: a model, size or device that cannot be measured, or fewer than two sizes.
    """
    import torch
    from tqdm import tqdm

    from .evaluate import choose_device
    from .measure import Runner, cpu_threads, environment, peak_memory

    if len(set(settings.sizes)) < 2:
        raise ValueError(f"sizes={settings.sizes}: growth needs at least two different sizes, e.g. 224,448,896")
    device = str(choose_device(settings.device))
    with cpu_threads(settings.threads):
        found = environment(device)
        work = _workloads(settings, device)
        quiet = None if progress else True  # None: shown on a terminal
        tasks: list[Task] = []
        for key, workload in tqdm(work.items(), "models", file=sys.stderr, disable=quiet):
            runner = Runner(workload)
            tasks.append(timed(key, runner, runner.device, runner.warm_up()))
        todo = tqdm(work.items() if settings.memory else (), "memory", file=sys.stderr, disable=quiet)
        peaks = {key: peak_memory(workload, torch.get_num_threads()) for key, workload in todo}
        with tqdm(desc="rounds", total=settings.rounds, file=sys.stderr, disable=quiet) as bar:
            timings = interleave(tasks, settings.rounds, settings.seconds, progress=bar.update)
        return {"rows": make_rows(work, timings, peaks), "environment": found}


def _workloads(settings: GrowthSettings, device: str) -> dict[str, Workload]:
    from .measure import Workload

    mode = "optimized" if settings.optimize else "plain"
    return {
        f"{model} {size}": Workload(model, mode, settings.batch, size, settings.dtype, device)
        for model in settings.models
        for size in settings.sizes
    }


def make_rows(
    work: Mapping[str, Workload], timings: Mapping[str, Sequence[float]], peaks: Mapping[str, PeakMemory | None]
) -> list[dict[str, Any]]:
    """The rows of the report; `timings` are seconds of every round and `peaks` memory, by the keys of `work`."""
    first: dict[str, str] = {}
    rows = []
    for key, workload in work.items():
        base = first.setdefault(workload.source, key)
        pixels = workload.size**2 * workload.batch
        seconds = Spread.of(timings[key])
        growth = Spread.of_ratios(timings[key], timings[base]).median / (workload.size / work[base].size) ** 2
        peak, base_peak = peaks.get(key), peaks.get(base)
        rows.append(
            {
                "model": workload.source,
                "mode": workload.mode,
                "size": workload.size,
                "batch": workload.batch,
                "seconds": seconds.median,
                "seconds_q1": seconds.q1,
                "seconds_q3": seconds.q3,
                "microseconds_per_pixel": seconds.median / pixels * 1e6,
                "time_per_pixel_ratio": growth,
                "peak_memory_bytes": peak.rise if peak else None,
                "peak_memory_exact": peak.exact if peak else None,
                "memory_ratio": peak.rise / base_peak.rise if peak and base_peak and base_peak.rise > 0 else None,
            }
        )
    return rows


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    lines = [("model", "size", "ms", "us/pixel", "per pixel", "peak MiB", "growth")]
    for row in rows:
        peak, growth = row["peak_memory_bytes"], row["memory_ratio"]
        lines.append(
            (
                row["model"],
                str(row["size"]),
                f"{row['seconds'] * 1e3:.1f}",
                f"{row['microseconds_per_pixel']:.2f}",
                f"{row['time_per_pixel_ratio']:.2f}x",
                "-" if peak is None else f"{peak / 2**20:.0f}",
                "-" if growth is None else f"{growth:.1f}x",
            )
        )
    text = [
        *align(lines, left=1),
        "",
        "per pixel: time of a pixel over that at the first size; growth: peak memory over that there",
    ]
    if any(row["peak_memory_exact"] is False for row in rows):
        text.append("peak memory is a lower bound here")
    return "\n".join(text)


def format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV with a header; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def check_plotting(option: str = "--sizes") -> None:
    """Raise a ValueError that names the option and the remedy where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{option} draws a plot and needs matplotlib; pip install matplotlib, or striate with its extra `plot`"
        ) from error


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with seconds and, if measured, peak memory against pixels, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("seconds", 1.0, "seconds per batch")]
    if all(row["peak_memory_bytes"] for row in rows):
        panels.append(("peak_memory_bytes", 2**20, "peak memory above the model (MiB)"))
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    sizes = sorted({row["size"] for row in rows})
    for axis, (column, unit, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            points = sorted((row["size"] ** 2, row[column] / unit) for row in rows if row["model"] == model)
            axis.plot(*zip(*points, strict=True), marker="o", label=model)
        axis.set(xscale="log", yscale="log", xlabel="image size", ylabel=label)
        axis.set_xticks([size**2 for size in sizes], [str(size) for size in sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    FigureCanvasAgg(figure).print_png(path)
