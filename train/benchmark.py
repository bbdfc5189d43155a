"""`striate benchmark`: speed and peak memory of a model, alone or against a rival, and how near the machine's limit.

Everything that is compared runs in one process in turns: every round does everything once, in an order in which each
takes every place and follows every other equally often. So a machine that slows down, or an allocator that somebody
else has filled, hits all alike, and a ratio is the median of the ratios of single rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import check_output

if TYPE_CHECKING:
    import torch

    from .measure import GemmLimit, PeakMemory, Workload

DEFAULT_SECONDS = 60.0
TURN_SECONDS = 0.2  # a fast model is called again until its turn has lasted so long
TRAIN_COST = 3  # a training step counts as so many forwards: the backward has a matmul for each of the two factors
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What to measure. `rounds` and `seconds` both limit the measurement; None for no limit.

    `model` and `against` are names as in `striate.create_model`, or `timm:NAME` for timm's own model.
    """

    model: str
    against: str | None = None
    batch: int = 8
    size: int = 224
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    against_dtype: str | None = None
    optimize: bool = False
    train: bool = True
    memory: bool = True
    rounds: int | None = None
    seconds: float | None = DEFAULT_SECONDS


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Those of `values`, interpolated between neighbours."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Those of the ratios round by round."""
        return cls.of([n / d for n, d in zip(numerators, denominators, strict=True)])


def turn_order(count: int, turn: int) -> list[int]:
    """The order in which `count` tasks take their turns in round `turn`: E. J. Williams's design.

    Over `count` rounds every task takes every place once; over `2 * count` rounds each follows each other twice.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    order = [(place + turn) % count for place in zigzag]
    return order[::-1] if count % 2 and turn // count % 2 else order


Task = Callable[[], Mapping[str, float]]


def interleave(
    tasks: Sequence[Task],
    rounds: int | None,
    seconds: float | None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Run all tasks in turns and collect what each call returns, by key, one value a round.

    There is at least one round, and no further one after `rounds` of them or after `seconds`.
    """
    start, turn = clock(), 0
    collected: dict[str, list[float]] = {}
    while turn == 0 or ((rounds is None or turn < rounds) and (seconds is None or clock() - start < seconds)):
        for index in turn_order(len(tasks), turn):
            for key, value in tasks[index]().items():
                collected.setdefault(key, []).append(value)
        turn += 1
        progress()
    return collected


def benchmark(settings: Settings, progress: bool = False) -> dict[str, Any]:
    """Measure and return the report, as JSON values.

    `results` has one entry per model (`role` is `model` or `rival`) and mode (`plain`, `optimized`, `train`): `seconds`
    of one batch or step (median, quartiles, and of every round), `images_per_second`, `flops_per_image`,
    `gemm_fraction` (FLOPs per second over those of the best matmul of the same round), `peak_memory_bytes` (rise above
    the loaded model) and `against`: the same mode of the rival, or without a rival plain inference against optimised;
    `time_ratio` is this time over that one, `speedup` the inverse of its median.

    Peak memory is measured in new processes, so a script that calls this needs `if __name__ == "__main__":`.

    Raises:
        ValueError: a model, size, batch or device that cannot be measured.
    """
    import torch
    from tqdm import tqdm

    from .evaluate import choose_device
    from .measure import GemmLimit, Runner, cpu_threads, environment, peak_memory

    device = str(choose_device(settings.device))
    with cpu_threads(settings.threads):
        found = environment(device)
        work = workloads(replace(settings, device=device))
        runners = {key: Runner(workload) for key, workload in work.items()}
        flops = {key.split("/")[0]: runners[key].count_flops() for key in work if key.endswith("/plain")}
        quiet = None if progress else True  # None: shown on a terminal
        todo = tqdm(work.items() if settings.memory else (), "memory", file=sys.stderr, disable=quiet)
        peaks = {key: peak_memory(workload, torch.get_num_threads()) for key, workload in todo}
        limits = {dtype: GemmLimit(dtype, device) for dtype in dict.fromkeys(w.dtype for w in work.values())}
        with tqdm(desc="rounds", total=settings.rounds, file=sys.stderr, disable=quiet) as bar:
            tasks = [timed(key, runner, runner.device, runner.warm_up()) for key, runner in runners.items()]
            tasks += [_limit_task(dtype, limit) for dtype, limit in limits.items()]
            timings = interleave(tasks, settings.rounds, settings.seconds, progress=bar.update)
        return make_report(work, timings, flops, peaks, limits) | {"environment": found}


def workloads(settings: Settings) -> dict[str, Workload]:
    """What to measure, by key `role/mode`."""
    from .measure import Workload

    found = {}
    for role, source, dtype in (
        ("model", settings.model, settings.dtype),
        ("rival", settings.against, settings.against_dtype or settings.dtype),
    ):
        modes = ["plain"] + ["optimized"] * (settings.optimize and role == "model") + ["train"] * settings.train
        for mode in modes if source else []:
            found[f"{role}/{mode}"] = Workload(str(source), mode, settings.batch, settings.size, dtype, settings.device)
    return found


def timed(key: str, call: Callable[[], object], device: torch.device, seconds: float) -> Task:
    """A task of `interleave` that returns the seconds of one `call` under `key`; one takes about `seconds`."""
    from .measure import repeats_for, seconds_per_call

    repeats = repeats_for(seconds, TURN_SECONDS)
    return lambda: {key: seconds_per_call(call, repeats, device)}


def _limit_task(dtype: str, limit: GemmLimit) -> Task:
    limit.warm_up()
    return lambda: {f"{dtype} {key}": seconds for key, seconds in limit().items()}


def make_report(
    work: Mapping[str, Workload],
    timings: Mapping[str, Sequence[float]],
    flops: Mapping[str, int],
    peaks: Mapping[str, PeakMemory | None],
    limits: Mapping[str, GemmLimit],
) -> dict[str, Any]:
    """The report of `benchmark` from what was measured.

    `timings` are seconds of every round, of the workloads by their keys and of products by `dtype method shape`;
    `flops` of one image by role.
    """
    rates = {
        dtype: {key: [count / s for s in timings[f"{dtype} {key}"]] for key, count in limit.flops.items()}
        for dtype, limit in limits.items()
    }
    best = {dtype: max(by_key, key=lambda key: statistics.median(by_key[key])) for dtype, by_key in rates.items()}
    results = []
    for key, workload in work.items():
        role, mode = key.split("/")
        per_call = flops[role] * workload.batch * (TRAIN_COST if mode == "train" else 1)
        limit = rates[workload.dtype][best[workload.dtype]]
        seconds, peak = timings[key], peaks.get(key)
        results.append(
            {
                "role": role,
                "name": workload.source,
                "mode": mode,
                "dtype": workload.dtype,
                "seconds": vars(Spread.of(seconds)) | {"rounds": list(seconds)},
                "images_per_second": workload.batch / statistics.median(seconds),
                "flops_per_image": per_call // workload.batch,
                "gemm_fraction": vars(Spread.of_ratios([per_call / s for s in seconds], limit)),
                "peak_memory_bytes": peak and peak.rise,
                "peak_memory_exact": peak and peak.exact,
                "against": _compare(key, timings, peaks),
            }
        )
    first = next(iter(work.values()))
    return {
        "batch": first.batch,
        "size": first.size,
        "device": first.device,
        "rounds": len(next(iter(timings.values()))),
        "results": results,
        "gemm_limit": {
            dtype: {
                "flops_per_second": statistics.median(by_key[best[dtype]]),
                "best": best[dtype],
                "all": {key: statistics.median(values) for key, values in by_key.items()},
            }
            for dtype, by_key in rates.items()
        },
    }


def _compare(
    key: str, timings: Mapping[str, Sequence[float]], peaks: Mapping[str, PeakMemory | None]
) -> dict[str, Any] | None:
    """`key` against the same of the rival (whose inference is always plain), or optimised against plain."""
    role, mode = key.split("/")
    rival = "rival/train" if mode == "train" else "rival/plain"
    if rival not in timings and mode == "optimized":
        rival = "model/plain"
    if role == "rival" or rival not in timings:
        return None
    time_ratio = Spread.of_ratios(timings[key], timings[rival])
    ours, theirs = peaks.get(key), peaks.get(rival)
    return {
        "result": rival,
        "time_ratio": vars(time_ratio),
        "speedup": 1 / time_ratio.median,
        "memory_ratio": ours.rise / theirs.rise if ours and theirs and theirs.rise > 0 else None,
    }


HEADINGS = ("model", "mode", "ms", "(quartiles)", "img/s", "of GEMM limit", "peak MiB", "time ratio", "(quartiles)",
            "speed-up", "memory ratio")  # fmt: skip


def align(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table, with what the numbers mean and what they were measured on below."""
    found, results = report["environment"], report["results"]
    images = f"batches of {report['batch']} images of {report['size']}x{report['size']}"
    lines = [f"{images}, {report['device']}, {found['threads']} threads, {report['rounds']} rounds", ""]
    rows = [HEADINGS, *map(_row, results)]
    lines += [*align(rows, left=2), ""]
    against = {result["against"]["result"] for result in results if result["against"]}
    if against:
        rival = "plain inference" if against == {"model/plain"} else "the rival, which is never optimised"
        lines.append(f"ratios: to {rival}; median and quartiles over rounds; below 1 is less time or memory")
    bound = " (here a lower bound)" if any(result["peak_memory_exact"] is False for result in results) else ""
    lines.append(f"peak: rise above the loaded model during one inference or training step{bound}")
    for result in results:
        lines.append(f"{result['name']}, {result['mode']}: {result['flops_per_image'] / 1e9:.2f} GFLOP per image")
    for dtype, limit in report["gemm_limit"].items():
        lines.append(f"GEMM limit, {dtype}: {limit['flops_per_second'] / 1e9:.0f} GFLOP/s ({limit['best']})")
    lines += [f"{key}: {value}" for key, value in found.items() if key != "variables" and value]
    variables = " ".join(f"{key}={value}" for key, value in found["variables"].items())
    lines.append(f"variables: {variables or 'none set that concern the allocator, threads or matmuls'}")
    return "\n".join(lines)


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    seconds, peak, against = result["seconds"], result["peak_memory_bytes"], result["against"] or {}
    ratio, memory = against.get("time_ratio"), against.get("memory_ratio")
    return (
        result["name"],
        result["mode"] if result["dtype"] == "float32" else f"{result['mode']} {result['dtype']}",
        f"{seconds['median'] * 1e3:.1f}",
        f"({seconds['q1'] * 1e3:.1f}-{seconds['q3'] * 1e3:.1f})",
        f"{result['images_per_second']:.1f}",
        f"{result['gemm_fraction']['median']:.2f}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
        f"{ratio['median']:.3f}" if ratio else "-",
        f"({ratio['q1']:.3f}-{ratio['q3']:.3f})" if ratio else "-",
        f"{against['speedup']:.2f}x" if ratio else "-",
        "-" if memory is None else f"{memory:.2f}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="striate benchmark",
        description="Measure inference and training step of a model, in turns with a rival and with plain matmuls.",
    )
    name = "as in striate.create_model, or timm:NAME for timm's own"
    parser.add_argument("model", nargs="*", help=f"model, {name}; several only with --sizes")
    parser.add_argument("--against", metavar="NAME", help=f"rival, {name}")
    parser.add_argument("--batch", type=_positive(int), help="images per batch (default 8, or 1 with --sizes)")
    parser.add_argument("--size", type=_positive(int), help="image height and width (default 224)")
    parser.add_argument(
        "--sizes",
        type=_positive_list,
        metavar="N,N,…",
        help="how the cost of several models (default: one of each kind) grows with the image; writes CSV and PNG",
    )
    parser.add_argument(
        "--ops",
        nargs="?",
        const="",
        type=_names,
        metavar="NAME,NAME,…",
        help="operators instead of models, against other ways to compute them (default: all operators)",
    )
    parser.add_argument(
        "--loop", action="store_true", help="what the training loop costs beyond the steps it runs, over --rounds steps"
    )
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … or auto (default cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 is autocast (default float32)")
    parser.add_argument("--against-dtype", choices=DTYPES, help="of the rival (default: the same)")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--optimize", action=flag, default=False, help="also after striate.optimize_for_inference")
    parser.add_argument("--train", action=flag, default=True, help="also a training step (default)")
    parser.add_argument("--memory", action=flag, default=True, help="also peak memory (default)")
    parser.add_argument("--rounds", type=_positive(int), metavar="N", help="stop after N rounds")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        metavar="S",
        help=f"start no round after S seconds (default {DEFAULT_SECONDS:.0f}, or no limit with --rounds)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the report to FILE as JSON, or with --sizes, as CSV"
    )
    return parser


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is no positive number; give one")
        return value

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _positive_list(text: str) -> tuple[int, ...]:
    return tuple(map(_positive(int), text.split(",")))


def main(argv: Sequence[str] | None = None) -> int:
    """`striate benchmark`: print the report and return 0.

    Raises:
        ValueError: a model, size, batch or device that cannot be measured, or an --output that cannot be written.
    """
    parser = _parser()
    args = vars(parser.parse_args(argv))
    if args["rounds"] is None and args["seconds"] is None:
        args["seconds"] = DEFAULT_SECONDS
    as_json, output, models = args.pop("json"), args.pop("output"), args.pop("model")
    if args["sizes"] and args["ops"] is not None:
        parser.error("--ops does not go with --sizes")
    if args["loop"] and (args["sizes"] or args["ops"] is not None):
        parser.error("--loop does not go with --sizes or --ops")
    if args["sizes"]:
        return _main_growth(parser, args, models, as_json, output or Path("growth.csv"))
    if args["ops"] is not None:
        return _main_ops(parser, args, models, as_json, output)
    del args["sizes"], args["ops"]
    if len(models) != 1:
        parser.error(f"give one model, not {len(models)}; several go with --sizes")
    if args.pop("loop"):
        return _main_loop(parser, args, models[0], as_json, output)
    if args["against_dtype"] and not args["against"]:
        parser.error("--against-dtype goes with --against NAME")
    check_output("--output", output)
    args |= {"batch": args["batch"] or 8, "size": args["size"] or 224}
    report = benchmark(Settings(model=models[0], **args), progress=True)
    if output is not None:
        _write(output, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report) if as_json else format_report(report))
    return 0


def _main_growth(
    parser: argparse.ArgumentParser, args: dict[str, Any], models: list[str], as_json: bool, output: Path
) -> int:
    from ..hub.folders import write_whole
    from . import growth

    _refuse(parser, args, "--sizes", "size", "against", "against_dtype")
    del args["train"], args["ops"], args["loop"]
    args |= {"batch": args["batch"] or 1, "models": tuple(models) or growth.DEFAULT_MODELS}
    if output.suffix != ".csv":
        raise ValueError(f"--output {output}: give a .csv file; the plot goes beside it as .png")
    plot = output.with_suffix(".png")
    check_output("--output", output)
    check_output("--output", plot)
    growth.check_plotting()
    report = growth.measure_growth(growth.GrowthSettings(**args), progress=True)
    _write(output, growth.format_csv(report["rows"]))
    write_whole(plot, lambda path: growth.draw(report["rows"], path))
    print(json.dumps(report) if as_json else growth.format_rows(report["rows"]))
    print(f"written: {output}, {plot}", file=sys.stderr)
    return 0


def _main_ops(
    parser: argparse.ArgumentParser, args: dict[str, Any], models: list[str], as_json: bool, output: Path | None
) -> int:
    from .op_benchmark import OpSettings, benchmark_ops, format_ops

    if models:
        parser.error(f"--ops measures operators, not models such as {models[0]}")
    _refuse(parser, args, "--ops", "size", "sizes", "against", "against_dtype")
    if args.pop("optimize"):
        parser.error("--optimize does not go with --ops")
    del args["memory"], args["loop"]
    check_output("--output", output)
    report = benchmark_ops(OpSettings(**args | {"batch": args["batch"] or 8}), progress=True)
    if output is not None:
        _write(output, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report) if as_json else format_ops(report))
    return 0


def _main_loop(
    parser: argparse.ArgumentParser, args: dict[str, Any], model: str, as_json: bool, output: Path | None
) -> int:
    from .overhead import format_overhead, measure_overhead

    _refuse(parser, args, "--loop", "against", "against_dtype")
    check_output("--output", output)
    report = measure_overhead(
        model, args["batch"] or 8, args["size"] or 224, args["rounds"] or 200, args["threads"], args["device"]
    )
    if output is not None:
        _write(output, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report) if as_json else format_overhead(report))
    return 0


def _refuse(parser: argparse.ArgumentParser, args: dict[str, Any], mode: str, *options: str) -> None:
    """Remove `options` from `args`; none of them may have been given."""
    for option in options:
        if args.pop(option) is not None:
            parser.error(f"--{option.replace('_', '-')} does not go with {mode}")


def _write(path: Path, text: str) -> None:
    from ..hub.folders import write_whole

    write_whole(path, lambda temporary: temporary.write_text(text))
