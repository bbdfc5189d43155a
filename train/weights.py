"""`striate weights`: where the authors publish the weights of each model, and which ones `pretrained=True` fetches."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from ..backbones import list_models
from ..backbones._published import UNPUBLISHED, Weights, published

_COLUMNS = ("weights", "pretrained", "licence", "where", "file", "page")


def main(argv: Sequence[str]) -> int:
    """Print one line, or one JSON object, for each file of published weights, and for each model without."""
    parser = argparse.ArgumentParser(prog="striate weights", description="Show where weights are published.")
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern of model names, e.g. '*former*'")
    parser.add_argument("--json", action="store_true", help="print one JSON document: a list of objects")
    args = parser.parse_args(argv)
    names = list_models(args.pattern)
    if not names:
        raise ValueError(f"no model matches {args.pattern!r}; try a pattern with *, or none for all")
    if args.json:
        print(json.dumps([entry for name in names for entry in _objects(name)]))
        return 0
    rows = [_COLUMNS, *(row for name in names for row in _rows(name))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-2] = 0  # what comes before the last column is long for a few
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _objects(name: str) -> list[dict[str, object]]:
    if entries := published(name):
        return [{**dataclasses.asdict(weights), "works": weights.works} for weights in entries]
    return [{"model": name, "tag": None, "works": False, "note": UNPUBLISHED.get(name, "")}]


def _rows(name: str) -> list[tuple[str, ...]]:
    if entries := published(name):
        return [
            (w.name, "yes" if w.works else "no", w.licence, _where(w), w.file, f"{w.page} {w.note}".rstrip())
            for w in entries
        ]
    return [(name, "no", "-", "none", UNPUBLISHED.get(name, ""), "")]


def _where(weights: Weights) -> str:
    places = ["link"] * bool(weights.working_link) + ["mirror"] * bool(weights.mirrors)
    return ", ".join(places) or ("dead" if weights.dead else "page")
