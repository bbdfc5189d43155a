"""`striate push` and `striate pull`: models to and from the Hugging Face Hub, or a folder."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..hub import pull, push
from ..hub.sources import parse_address
from .config import ConfigParser, load_config
from .evaluate import in_the_middle, open_model, parse_source, source_parser
from .model import read_metadata
from .state import RunFolder

FASHION_MNIST = "zalando-datasets/fashion_mnist"
_DATASETS = {"fashion-mnist": FASHION_MNIST, "fashion-mnist-subset": FASHION_MNIST}


def push_parser() -> ConfigParser:
    """The parser of `striate push`."""
    parser = source_parser(
        "push",
        "Publish a model: config.json, model.safetensors, a model card, and the recipe and metrics of a run.",
        usage="striate push RUN_OR_CHECKPOINT org/name[@branch] [OPTIONS]",
    )
    parser.add_argument("target", type=str, help="org/name[@branch] of a hub, or local-dir:PATH")
    parser.add_argument("--private", action="store_true", help="of a new repository; default: as the account says")
    parser.add_argument("--tag", type=str, default=None, help="give the commit this tag")
    parser.add_argument("--message", type=str, default="Add model", help="of the commit")
    parser.add_argument("--dataset", type=str, default=None, help="identifier of the data that a run was evaluated on")
    parser.add_argument("--description", type=str, default=None, help="first paragraph of the card")
    parser.add_argument("--licence", type=str, default=None, help="of the weights; default: that of the source")
    parser.add_argument("--endpoint", type=str, default=None, help="address of a hub; default: HF_ENDPOINT")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`striate push`: publish a model and print its address.

    Raises:
        ValueError, OSError: the model cannot be had or described, or the target is none.
        CommandFailedError: the hub refuses or fails.
    """
    values, run = parse_source(push_parser(), list(sys.argv[1:] if argv is None else argv))
    parse_address(values["target"])
    story = _story(values, run)
    model, _ = open_model(values, run)
    with in_the_middle("publishing"):
        address = push(
            model,
            values["target"],
            **story,
            description=values["description"],
            licence=values["licence"],
            private=values["private"] or None,
            commit_message=values["message"],
            tag=values["tag"],
            endpoint=values["endpoint"],
        )
    print(json.dumps({"address": address, **story}) if values["json"] else f"published: {address}")
    return 0


def _story(values: dict[str, Any], run: RunFolder | None) -> dict[str, Any]:
    """What is known of how the weights were made: recipe, metrics and data set, each None if it is not known."""
    weights = Path(values["source"]) if run is None else run.weights(values["weights"])
    try:
        metrics = read_metadata(weights)["metrics"] if weights.is_file() else None
    except ValueError:  # not of a run
        metrics = None
    folder = RunFolder(weights.parent)
    if metrics is None or not folder.config.is_file():
        return {"recipe": None, "metrics": None, "dataset": values["dataset"]}
    dataset = values["dataset"] or _dataset(load_config(folder.config).data.name)
    if dataset is None:
        raise ValueError(
            "the run says where its data lies, not what it is; name it, --dataset imagenet-1k or --dataset org/name"
        )
    return {
        "recipe": folder.config.read_text(encoding="utf-8"),
        "metrics": {name: metrics[name] for name in ("top1", "top5")},
        "dataset": dataset,
    }


def _dataset(name: str) -> str | None:
    """The identifier of a data set by its name in a configuration, None if that is a place."""
    if match := re.fullmatch(r"(?:hfds|hfids|torch|tfds)/(.+)", name):
        return match[1]
    return _DATASETS.get(name)


def pull_command(argv: Sequence[str] | None = None) -> int:
    """`striate pull`: fetch a saved model to a folder.

    Raises:
        ValueError, OSError: there is no such model, or the hub, the network or the folder does not allow it.
    """
    parser = argparse.ArgumentParser(prog="striate pull", description="Fetch a saved model, all files of one commit.")
    parser.add_argument("source", help="org/name[@revision] of a hub, or local-dir:PATH")
    parser.add_argument("folder", nargs="?", help="where to put it; default: leave it in the cache, and say where")
    parser.add_argument("--endpoint", help="address of a hub; default: HF_ENDPOINT")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    print(pull(args.source, args.folder, endpoint=args.endpoint))
    return 0
