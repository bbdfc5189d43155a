"""`striate zoo`: all models on one HTML page, to sort, search and compare; it needs nothing else: no network, no file.

Speed and memory are shown only if they were measured, and only beside others of the same machine and settings.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..backbones import ModelInfo, list_models, model_info
from ..backbones._published import published
from ..hub.folders import write_whole
from .config import check_output
from .evaluate import in_the_middle
from .page import fill_page

PAGE = "index.html"
MODES = {"plain": "inference", "optimized": "optimised inference", "train": "training step"}
HOW = "write it with `striate benchmark MODEL --json`"

# What is read of a report of `striate benchmark`, with its type; a float is positive and finite, an int positive.
REPORT = {"batch": int, "size": int, "device": str, "rounds": int, "results": list, "environment": dict}
RESULT = {"name": str, "mode": str, "dtype": str, "images_per_second": float, "seconds": dict}
SECONDS = {"median": float, "q1": float, "q3": float}
ENVIRONMENT = {"cpu": str, "cpus": int, "threads": int, "torch": str, "timm": str}
KINDS = {int: "a positive whole number", float: "a positive number", str: "a text", list: "a list", dict: "an object"}


@dataclass
class Group:
    """Measurements that may be compared, by name of the model: machine, settings and versions are the same.

    `native` tells that every model was measured at its own input size, which its top-1 holds for.
    """

    facts: dict[str, str]
    native: bool
    label: str
    loads: list[float] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)


def render_zoo(infos: Sequence[ModelInfo], groups: Sequence[Group] = ()) -> str:
    """The page of some models and of what was measured of them."""
    families = {info.family.name: info.family for info in infos}
    data = {
        "version": __version__,
        "families": {
            name: {"title": family.title, "paper": family.paper, "source": family.source, "licence": family.licence}
            for name, family in sorted(families.items(), key=lambda item: item[1].title.lower())
        },
        "models": [_entry(info) for info in infos],
        "groups": [
            {"label": group.label, "native": group.native, "facts": _facts(group), "models": group.models}
            for group in groups
        ],
    }
    return fill_page("zoo.html", "striate model zoo", data=embed(data))


def published_weights(name: str) -> list[dict[str, Any]]:
    """What the page says of a model's published weights, the default first: `works` if `pretrained=True` gets them."""
    keys = ("name", "page", "licence", "top1", "works", "dead")
    return [{key: getattr(one, key) for key in keys} for one in published(name)]


def embed(value: Any) -> str:
    """JSON to stand inside of a script element: none of its characters can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _entry(info: ModelInfo) -> dict[str, Any]:
    weights = published_weights(info.name)
    arguments = json.dumps(info.name) + ", pretrained=True" * any(one["works"] for one in weights[:1])
    return {
        "name": info.name,
        "family": info.family.name,
        "params": info.params,
        "gmacs": info.gmacs,
        "top1": info.top1,
        "pretraining": info.pretraining,
        "input": list(info.input_size),
        "weights": weights,
        "use": f"import striate; model = striate.create_model({arguments})",
    }


def _facts(group: Group) -> list[tuple[str, str]]:
    low, high = min(group.loads, default=None), max(group.loads, default=None)
    load = {} if low is None else {"load average": f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"}
    return list({**group.facts, **load}.items())


def read_benchmarks(files: Sequence[Path], infos: Sequence[ModelInfo]) -> tuple[list[Group], list[str]]:
    """What files of `striate benchmark MODEL --json` say of some models: groups, the largest first, and remarks.

    A file holds one report or several, one after the other. The remarks tell what was left out.

    Raises:
        ValueError: a file cannot be read, is something else, or has none of the models.
    """
    known = {info.name: info for info in infos}
    groups: dict[str, Group] = {}
    remarks: list[str] = []
    for file in files:
        reports = list(read_reports(file))
        names = list(dict.fromkeys(result["name"] for report in reports for result in report["results"]))
        strangers = [name for name in names if name not in known]
        if strangers == names:
            raise ValueError(f"{file} measures no model of this page, but {', '.join(names)}; leave it out")
        if strangers:
            remarks.append(f"{file}: left out {', '.join(strangers)}: no model of this page")
        for report in reports:
            for result in report["results"]:
                if result["name"] in known:
                    remarks += _add(groups, report, result, known[result["name"]])
    found = sorted(groups.values(), key=lambda group: (-len(group.models), group.label))
    for same in ([other for other in found if other.label == label] for label in {group.label for group in found}):
        _tell_apart(same)
    return found, list(dict.fromkeys(remarks))


def read_reports(file: Path) -> Iterator[dict[str, Any]]:
    """The checked reports of `striate benchmark MODEL --json` that a file holds, one after the other.

    Raises:
        ValueError: it cannot be read, or holds something else, or nothing.
    """
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error}); {HOW}") from error
    if not text:
        raise ValueError(f"{file} is empty; {HOW}")
    decoder, position, number = json.JSONDecoder(), 0, 0
    while position < len(text):
        number += 1
        try:
            report, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no JSON ({error}); {HOW}") from error
        try:
            _check_report(report)
        except ValueError as error:
            raise ValueError(f"{file}: document {number} is no report of a model: {error}; {HOW}") from error
        yield report
        position = end + len(text[end:]) - len(text[end:].lstrip())


def _check_report(report: Any) -> None:
    _check(report, "the report", REPORT)
    _check(report["environment"], "'environment'", ENVIRONMENT)
    if not report["results"]:
        raise ValueError("'results' is empty")
    for result in report["results"]:
        _check(result, "a result", RESULT)
        _check(result["seconds"], "'seconds'", SECONDS)
        if result["mode"] not in MODES:
            raise ValueError(f"'mode' is {result['mode']!r}, not {', '.join(MODES)}")
        if result.get("peak_memory_bytes") not in (None, 0):
            _check(result, "a result", {"peak_memory_bytes": int})


def _check(record: Any, what: str, kinds: Mapping[str, type]) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{what} is {_short(record)}, not an object")
    for key, kind in kinds.items():
        if key not in record:
            raise ValueError(f"{what} has no {key!r}")
        value = record[key]
        right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not right or (kind in (int, float) and not 0 < value < math.inf):
            raise ValueError(f"{key!r} is {_short(value)}, not {KINDS[kind]}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _add(
    groups: dict[str, Group], report: Mapping[str, Any], result: Mapping[str, Any], info: ModelInfo
) -> Iterator[str]:
    """Put a result into its group, and yield a remark if it replaces one."""
    batch, size, found = report["batch"], report["size"], report["environment"]
    native = info.input_size[1:] == (size, size)
    settings = {
        "mode": MODES[result["mode"]],
        "images": "the model's own size" if native else f"{size} × {size}",
        "batch": batch,
        "dtype": result["dtype"],
        "device": report["device"],
    }
    told = {**settings, **{key: found[key] for key in found if found[key] is not None and key != "load_average"}}
    facts = {key: _plain(value) for key, value in told.items()}
    group = groups.setdefault(json.dumps(facts, sort_keys=True), Group(facts, native, _label(facts, native)))
    if isinstance(load := found.get("load_average"), (int, float)) and math.isfinite(load):
        group.loads.append(load)
    if info.name in group.models:
        yield f"{info.name} was measured more than once on {group.label}; the last one counts"
    seconds = result["seconds"]
    group.models[info.name] = {
        "speed": result["images_per_second"],
        "slow": batch / seconds["q3"],
        "fast": batch / seconds["q1"],
        "memory": result.get("peak_memory_bytes"),
        "exact": result.get("peak_memory_exact") is not False,
        "rounds": report["rounds"],
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={value[key]}" for key in sorted(value)) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _label(facts: Mapping[str, str], native: bool) -> str:
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != '1')}"
    parts = [facts["gpu"]] if "gpu" in facts else [facts["cpu"], threads]
    parts += [f"batch {facts['batch']}", facts["dtype"], facts["mode"]]
    return " · ".join(parts if native else [*parts, facts["images"]])


def _tell_apart(groups: Sequence[Group]) -> None:
    """Add to equal labels of groups the facts in which they differ."""
    keys = dict.fromkeys(key for group in groups for key in group.facts)
    differ = [key for key in keys if len({group.facts.get(key) for group in groups}) > 1]
    for group in groups:
        group.label = " · ".join([group.label, *(f"{key} {group.facts.get(key, '?')}" for key in differ)])


def _page_file(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made ({error.strerror}); give a folder that is yours") from error
    file = check_output("--out", folder / PAGE)
    assert file is not None
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """`striate zoo --out DIR`: write the page of all models, or of one family.

    Raises:
        ValueError, OSError: the folder or a file of measurements is refused, or there is no such family.
    """
    parser = argparse.ArgumentParser(prog="striate zoo", description="Show all models on one HTML page.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"folder to write {PAGE} into")
    parser.add_argument("--family", help="only models of this family")
    parser.add_argument(
        "--benchmarks",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="what `striate benchmark MODEL --json` printed, one report or several in a file",
    )
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    file = _page_file(args.out)
    infos = [model_info(name) for name in list_models(family=args.family)]
    groups, remarks = read_benchmarks(args.benchmarks, infos)
    for remark in remarks:
        print(f"striate zoo: {remark}", file=sys.stderr)
    page = render_zoo(infos, groups)
    with in_the_middle("writing"):
        write_whole(file, lambda path: path.write_text(page, encoding="utf-8"))
    print(f"written: {file}")
    return 0
