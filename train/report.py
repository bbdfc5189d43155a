"""`striate report`: a run on one HTML page that needs nothing else: no network, no scripts, no other file."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..hub.folders import write_whole
from .config import check_output, read_config_file
from .evaluate import in_the_middle
from .log import read_log
from .model import read_metadata
from .page import fill_page
from .state import RunFolder

CONFUSION = "confusion.csv"
MAX_POINTS = 1200  # of a curve; more are not seen
MAX_CELLS = 40  # classes of a matrix that is drawn; of more, the worst pairs are listed alone
_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 40


@dataclass(frozen=True)
class Curve:
    """A named line through (step, value)."""

    name: str
    points: list[tuple[float, float]]


def render_report(run: RunFolder) -> str:
    """The page of a run, finished or not.

    Raises:
        ValueError: the folder holds no run, or a damaged file.
    """
    if not run.config.is_file():
        raise ValueError(f"{run.path} is no run folder: it has no config.yaml; give the run.output of a training")
    config = read_config_file(run.config)
    records = read_log(run.log) if run.log.is_file() else []
    summary = json.loads(run.summary.read_text()) if run.summary.is_file() else None
    best = run.weights("best")
    metadata = read_metadata(best) if best.is_file() else {}
    name = config.get("model", {}).get("name", "?")
    parts = {
        "subtitle": escape(_state(run, records, summary)),
        "tiles": "".join(_tile(label, value) for label, value in _numbers(records, summary, metadata)),
        "curves": "".join(_figure(title, curves) for title, curves in _curves(records)),
        "confusion": _confusion(run),
        "environment": _card("Environment", _environment(summary, metadata)) + _card("Weights", _weights(metadata)),
        "config": "".join(_card(group, keys) for group, keys in config.items()),
    }
    return fill_page("report.html", f"{name} on {config.get('data', {}).get('name', '?')}", **parts)


def _state(run: RunFolder, records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> str:
    if summary is not None:
        return f"{run.path}: finished after {summary['steps']} steps in {summary['epochs']} epochs"
    step = records[-1]["step"] if records else 0
    return f"{run.path}: not finished, {step} steps logged so far"


def _numbers(
    records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None, metadata: Mapping[str, Any]
) -> list[tuple[str, str]]:
    evaluations = [record for record in records if record["type"] == "eval"]
    best = (summary or {}).get("best") or metadata.get("metrics") or {}
    numbers = []
    if "top1" in best:
        numbers.append(("best top-1", f"{best['top1']:.2f} %"))
        numbers.append(("right answers", f"{best['correct']} of {best['total']}"))
    if evaluations:
        numbers.append(("last top-1", f"{evaluations[-1]['top1']:.2f} %"))
    if summary is not None:
        numbers.append(("parameters", f"{summary['parameters'] / 1e6:.2f} M"))
        numbers.append(("training images", f"{summary['train_images']:,}"))
        numbers.append(("time", _duration(summary["seconds"])))
    if skipped := sum(record["type"] == "skipped" for record in records):
        numbers.append(("skipped steps", str(skipped)))
    return numbers


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _tile(label: str, value: str) -> str:
    return f'<div class="card"><span class="soft">{escape(label)}</span><b>{escape(value)}</b></div>'


def _card(title: str, rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(_plain(value))}</td></tr>" for key, value in rows.items()
    )
    return f'<section class="card"><h2>{escape(title)}</h2><table>{cells}</table></section>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _environment(summary: Mapping[str, Any] | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if summary is None:
        written = {"striate": metadata["striate"]} if "striate" in metadata else {}
        return written | {"more": "is in summary.json, once the run is finished"}
    known = ("device", "world_size", "seed", "python", "platform")
    return {**summary["versions"], **{key: summary[key] for key in known if key in summary}}


def _weights(metadata: Mapping[str, Any]) -> dict[str, Any]:
    if not metadata:
        return {"best.safetensors": "is written at the first evaluation"}
    config = metadata["config"]
    rows = {"architecture": config["architecture"], "classes": config["num_classes"]}
    rows |= {"arguments": config.get("model_args", {}), "kind": metadata.get("weights"), "step": metadata.get("step")}
    metrics = metadata.get("metrics") or {}
    return rows | {key: metrics[key] for key in ("epoch", "top1", "top5", "loss") if key in metrics}


def _curves(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Curve]]]:
    def curve(name: str, kind: str, key: str) -> Curve:
        found = [(record["step"], record[key]) for record in records if record["type"] == kind and key in record]
        return Curve(name, [(step, value) for step, value in found if value is not None and math.isfinite(value)])

    return [
        ("Loss", [curve("training", "train", "loss"), curve("evaluation", "eval", "loss")]),
        ("Accuracy in %", [curve("top-1", "eval", "top1"), curve("top-5", "eval", "top5")]),
        ("Learning rate", [curve("learning rate", "train", "lr")]),
        ("Images per second", [curve("training", "train", "images_per_second")]),
    ]


def _figure(title: str, curves: Sequence[Curve]) -> str:
    keys = "".join(
        f'<span><i class="key s{number}"></i>{escape(curve.name)}</span>'
        for number, curve in enumerate(curves, 1)
        if curve.points and len(curves) > 1
    )
    picture = draw_curves(curves, title) if any(curve.points for curve in curves) else "<p>nothing logged yet</p>"
    return f'<figure class="card"><h2>{escape(title)}</h2>{picture}<figcaption>{keys}</figcaption></figure>'


def draw_curves(curves: Sequence[Curve], title: str) -> str:
    """Curves over the step as an SVG element; every point tells its numbers where they are few."""
    points = [point for curve in curves for point in curve.points]
    xs, ys = ticks([x for x, _ in points]), ticks([y for _, y in points])
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_x, high_x = (low_x, high_x) if high_x > low_x else (low_x - 1, high_x + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)
        down = _HEIGHT - _BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return round(right, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over the step">']
    for y in ys:
        height = place(low_x, y)[1]
        parts.append(f'<line class="rule" x1="{_LEFT}" y1="{height}" x2="{_WIDTH - _RIGHT}" y2="{height}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height + 4}" text-anchor="end">{y:.6g}</text>')
    for x in xs:
        if low_x <= x <= high_x:
            parts.append(
                f'<text x="{place(x, ys[0])[0]}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:.10g}</text>'
            )
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
    for number, curve in enumerate(curves, 1):
        kept = thin(curve.points)
        line = " ".join(f"{a},{b}" for a, b in (place(x, y) for x, y in kept))
        parts.append(f'<polyline class="curve s{number}" points="{line}"/>')
        for x, y in kept if len(kept) <= 60 else ():
            a, b = place(x, y)
            label = escape(f"{curve.name}: {y:.6g} at step {x:g}")
            parts.append(f'<circle class="s{number}" cx="{a}" cy="{b}" r="2.5"><title>{label}</title></circle>')
    return "".join([*parts, "</svg>"])


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of the points, evenly taken, the last among them."""
    every = math.ceil(len(points) / MAX_POINTS)
    return list(points) if every <= 1 else list(points[::-1][::every][::-1])


def ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers that enclose the values."""
    low, high = min(values), max(values)
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def read_confusion(path: Path) -> tuple[list[str], list[list[int]]]:
    """Class names and counts (rows true, columns predicted) of a file of `striate validate --confusion`.

    Raises:
        ValueError: it is something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            (_, *names), *rows = csv.reader(file)
        counts = [[int(cell) for cell in row[1:]] for row in rows]
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no confusion matrix ({error}); write it with `striate validate`") from error
    if not names or len(counts) != len(names) or any(len(row) != len(names) for row in counts):
        raise ValueError(f"{path} has {len(names)} columns and {len(counts)} rows of counts; it must be square")
    return names, counts


def _confusion(run: RunFolder) -> str:
    path = run.path / CONFUSION
    if not path.is_file():
        command = f"striate validate {run.path} --confusion {path}"
        return f"<p>There is none yet. This makes it: <code>{escape(command)}</code></p>"
    names, counts = read_confusion(path)
    pairs = sorted(
        ((count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count), reverse=True
    )
    cells = "".join(
        f"<tr><td>{escape(names[i])}</td><td>{escape(names[j])}</td><td>{count} of {sum(counts[i])}</td></tr>"
        for count, i, j in pairs[:10]
    )
    worst = f"<table><tr><th>class</th><th>taken for</th><th>images</th></tr>{cells}</table>"
    if len(names) > MAX_CELLS:
        return f"<p>{len(names)} classes are too many to draw; most often mistaken:</p>{worst}"
    return f'<div class="grid">{draw_matrix(names, counts)}<div><p>Most often mistaken:</p>{worst}</div></div>'


def draw_matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A confusion matrix as an SVG element: a row per true class, darker for a larger part of its images."""
    side, left, top = 30, 120, 96
    width, height = left + side * len(names) + 60, top + side * len(names) + 4
    parts = [
        f'<svg class="matrix" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="confusion matrix, rows true, columns predicted">'
    ]
    for i, name in enumerate(names):
        short = escape(name if len(name) <= 16 else name[:15] + "…")
        middle = side * i + side / 2
        parts.append(f'<text x="{left - 6}" y="{top + middle + 4}" text-anchor="end">{short}</text>')
        x = left + middle + 4
        parts.append(f'<text x="{x}" y="{top - 6}" transform="rotate(-60 {x} {top - 6})">{short}</text>')
        total = sum(counts[i])
        for j, count in enumerate(counts[i]):
            x, y = left + side * j, top + side * i
            label = escape(f"{name} taken for {names[j]}: {count} of {total}")
            shade = count / total if total else 0
            parts.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{side}" height="{side}" fill-opacity="{0.85 * shade:.3f}">'
                f"<title>{label}</title></rect>"
            )
            if count:
                parts.append(f'<text class="count" x="{x + side / 2}" y="{y + side / 2 + 4}">{count}</text>')
    return "".join([*parts, "</svg>"])


def main(argv: Sequence[str] | None = None) -> int:
    """`striate report RUN`: write the page of a run.

    Raises:
        ValueError, OSError: the folder holds no run, or a damaged file, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(prog="striate report", description="Show a run on one HTML page.")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--output", metavar="FILE.html", help="file to write; default RUN/report.html")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    run = RunFolder(args.run)
    page = render_report(run)
    output = check_output("--output", args.output or str(run.path / "report.html"), (".html",))
    assert output is not None
    with in_the_middle("writing"):
        write_whole(output, lambda path: path.write_text(page, encoding="utf-8"))
    print(f"written: {output}")
    return 0
