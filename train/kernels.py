"""`striate kernels`: compile every Triton kernel for GPUs that need not be there, and show what each needs."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..ops import _aot, _triton
from ..ops._aot import KernelReport
from .benchmark import align

COLUMNS = ("op", "config", "target", "registers", "spills", "shared", "mma")
INTRODUCTION = """# What the kernels need

Written by `striate kernels --markdown docs/kernels.md`: every configuration that a registered model uses, compiled by
Triton {version} without a GPU. A cell gives registers per thread, bytes spilled per thread, shared memory per program,
matrix instructions in the code (mma, wgmma, tcgen05.mma, mfma) and warps per program. Products of float32 in full
precision take no matrix instructions on NVIDIA GPUs. No time was measured: see `striate benchmark --ops`.
"""


class Job(NamedTuple):
    """One configuration, by its place in `configurations()`, and the target it is compiled for."""

    target: str
    op: str
    number: int


def main(argv: Sequence[str]) -> int:
    """`striate kernels`: 0 if every kernel compiles, spills nothing and fits into shared memory, otherwise 1."""
    args = _parse(argv)
    try:
        jobs = [
            Job(target, op, number)
            for target in args.target or _aot.CHECKED
            for op in args.op or _aot.OPS
            for number in range(len(_configurations(op, target)))
        ]
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    reports, failures = [], []
    for result in _results(jobs, args.jobs):
        if isinstance(result, str):
            failures.append(result)
            continue
        reports += result
        if args.json:
            for report in result:
                print(json.dumps(_row(report)), flush=True)
    if not args.json:
        _print_table(reports)
    failures += [f"{r.op} {_row(r)['config']} on {r.target} {fault}" for r in reports for fault in r.faults]
    for failure in failures:
        print(f"striate kernels: {failure}", file=sys.stderr)
    if args.markdown and not failures:
        Path(args.markdown).parent.mkdir(parents=True, exist_ok=True)
        Path(args.markdown).write_text(_markdown(reports), encoding="utf-8")
    return 1 if failures else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    targets, ops = ", ".join(_aot.TARGETS), ", ".join(_aot.OPS)
    parser = argparse.ArgumentParser(prog="striate kernels", description=__doc__)
    parser.add_argument("--target", action="append", help=f"{targets}; may be repeated; default the first-class four")
    parser.add_argument("--op", action="append", help=f"{ops}; may be repeated; default all")
    parser.add_argument("--json", action="store_true", help="print one JSON object per kernel")
    parser.add_argument("--markdown", metavar="FILE", help="write the table to FILE too, if no kernel is at fault")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default one per core")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be at least 1")
    return args


def _configurations(op: str, target: str) -> list[str]:
    with _aot.compiling(target):  # complains about an unknown target, or Triton missing, before anything is compiled
        return [label for label, _ in _aot.configurations(op)]


def _results(jobs: Sequence[Job], processes: int) -> Iterator[list[KernelReport] | str]:
    if min(processes, len(jobs)) <= 1:
        yield from map(_compile, jobs)
        return
    # Not forked: a fork of a process whose threads have run may hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile, jobs, chunksize=4)


def _compile(job: Job) -> list[KernelReport] | str:
    """The reports of one job, or why it failed."""
    label, launch = _aot.configurations(job.op)[job.number]
    try:
        return _aot.compile_launch(job.op, label, job.target, launch)
    except RuntimeError as error:
        return " ".join(str(error).split())


def _row(report: KernelReport) -> dict[str, str | int]:
    """What is shown of a report; a configuration launches several kernels, so that the kernel's name goes with it."""
    return {c: getattr(report, c) for c in COLUMNS} | {"config": f"{report.config}: {report.kernel}"}


def _print_table(reports: Sequence[KernelReport]) -> None:
    rows = [COLUMNS, *(tuple(str(v) for v in _row(r).values()) for r in reports)]
    print("\n".join(align(rows, left=3)))


def _markdown(reports: Sequence[KernelReport]) -> str:
    targets = list(dict.fromkeys(r.target for r in reports))
    cells: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for r in reports:
        row = cells[r.op, r.config, r.kernel]
        text = f"{r.registers} reg, {r.spills} B spilled, {r.shared / 1024:.3g} KiB, {r.mma} mma, {r.warps} warps"
        row[r.target] = f"{row[r.target]}; {text}" if r.target in row else text
    lines = [INTRODUCTION.format(version=_triton.triton.__version__)]
    for op in dict.fromkeys(r.op for r in reports):
        lines += [
            f"## {op}",
            "",
            f"| configuration | kernel | {' | '.join(targets)} |",
            "|---" * (2 + len(targets)) + "|",
        ]
        lines += [
            f"| {config} | `{kernel}` | {' | '.join(found.get(t, '') for t in targets)} |"
            for (owner, config, kernel), found in cells.items()
            if owner == op
        ]
        lines.append("")
    return "\n".join(lines)
