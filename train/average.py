"""`striate average`: the mean of the weights of several checkpoints of one model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..backbones._checkpoint import read_file, unwrap
from ..hub.folders import write_whole
from .config import check_output
from .evaluate import in_the_middle
from .model import read_metadata
from .state import RunFolder


def find_checkpoint(source: str | Path, weights: str = "best") -> Path:
    """The file that `source` is, or the "best" or "last" weights of the run folder that it is.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(source)
    file = RunFolder(path).weights(weights) if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint file {file}")
    return file


def average_checkpoints(files: Sequence[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """The mean of the state dicts in `files`, summed in float64 and given back in the type they have.

    Tensors of integers cannot be averaged: those of the last file are taken.

    Returns:
        The state dict, and the names of the integer tensors that differ between the files.

    Raises:
        ValueError: a file cannot be read, keys, shapes or types differ, or a weight is infinite or NaN.
    """
    first = _read_state(files[0])
    sums = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in first.items() if _is_real(tensor)}
    differing = set()
    for file in files:
        last = first if file is files[0] else _read_state(file)
        _check_alike(first, last, files[0], file)
        for key, total in sums.items():
            if not bool(last[key].isfinite().all()):
                raise ValueError(f"{file}: {key} is infinite or NaN; leave that checkpoint out")
            total += last[key]
        differing |= {key for key in last.keys() - sums.keys() if not torch.equal(last[key], first[key])}
    means = {key: (total / len(files)).to(first[key].dtype) for key, total in sums.items()}
    return {key: means.get(key, last[key]).contiguous() for key in first}, sorted(differing)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _read_state(file: Path) -> dict[str, Tensor]:
    return unwrap(read_file(file), False, str(file))


def _check_alike(first: Mapping[str, Tensor], other: Mapping[str, Tensor], old: Path, new: Path) -> None:
    if different := sorted(first.keys() ^ other.keys()):
        owner = old if different[0] in first else new
        raise ValueError(
            f"{old} and {new} do not hold the same model: {len(different)} tensors are in one alone, "
            f"{', '.join(different[:3])} … ({different[0]} in {owner})"
        )
    for key, tensor in first.items():
        was, now = (tensor.dtype, tuple(tensor.shape)), (other[key].dtype, tuple(other[key].shape))
        if was != now:
            raise ValueError(f"{key} is {was[0]} {was[1]} in {old}, but {now[0]} {now[1]} in {new}; average one model")


def common_config(files: Sequence[Path]) -> dict[str, Any] | None:
    """What the files say about the model they hold; None if none of them says it.

    Raises:
        ValueError: they say different things.
    """
    known: list[tuple[Path, dict[str, Any]]] = []
    for file in files:
        try:
            known.append((file, read_metadata(file)["config"]))
        except ValueError:  # the authors' files and timm's do not name the model; their keys and shapes are compared
            continue
    for file, config in known[1:]:
        for key in ("architecture", "num_classes", "model_args", "label_names"):
            if config.get(key) != known[0][1].get(key):
                raise ValueError(
                    f"{known[0][0]} has {key} {known[0][1].get(key)}, {file} {config.get(key)}; average one model"
                )
    return known[0][1] if known else None


def main(argv: Sequence[str] | None = None) -> int:
    """`striate average`: write the mean of several checkpoints.

    Raises:
        ValueError, OSError: a checkpoint cannot be read or does not fit the others, or the output cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="striate average", description="Average the weights of checkpoints of one model."
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="weight files or run folders, two or more")
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", help="file to write")
    parser.add_argument("--weights", default="best", choices=("best", "last"), help="which ones of a run folder (best)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    output = check_output("--output", args.output, (".safetensors",))
    assert output is not None
    if len(args.checkpoints) < 2:
        raise ValueError(f"{args.checkpoints[0]} alone has no average; give two checkpoints or more")
    files = [find_checkpoint(source, args.weights) for source in args.checkpoints]
    config = common_config(files)
    state, differing = average_checkpoints(files)
    if differing:
        names = ", ".join(differing[:3])
        print(f"striate average: taken from {files[-1]}, since they differ and are integers: {names}", file=sys.stderr)
    metadata = {"config": config, "weights": "average", "averaged": [str(file) for file in files], "metrics": None}
    header = {"format": "pt"} | {key: json.dumps(value) for key, value in metadata.items() if config or key != "config"}
    content = safetensors.torch.save(state, header)
    with in_the_middle("writing"):
        write_whole(output, lambda path: path.write_bytes(content))
    record = {
        "output": str(output),
        "checkpoints": [str(file) for file in files],
        "architecture": None if config is None else config["architecture"],
        "tensors": len(state),
        "taken_from_last": differing,
    }
    print(json.dumps(record) if args.json else f"written: {output}, the mean of {len(files)} checkpoints")
    return 0
