"""`striate convert`: tell what an official file of weights is, and write it with our keys as safetensors."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones import CheckpointError, FeaturePyramid, create_model, load_checkpoint, model_info
from ..backbones._checkpoint import EMA_WRAPPERS, WRAPPERS, strip_prefix, unwrap
from ..backbones._hub_files import sha256
from ..backbones._reading import read_file
from ..backbones._recognise import Fit, collected_messages, find_closest, find_fits, try_fit
from .folders import save_weights, write_whole
from .publish import push
from .sources import LOCAL


def main(argv: Sequence[str] | None = None) -> int:
    """`striate convert`: report what a file of weights is, or write it with our keys.

    Raises:
        ValueError, OSError: the file cannot be read safely, fits no registered model, or several of which none was
            named, or the output cannot be written. Nothing is left of it then.
    """
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    file, target = Path(args.file), None if args.to is None else _checked_target(args.file, args.to)
    content = read_file(file, inert=args.inert)
    if args.ema and not _has_ema(content):
        raise ValueError(f"{file} has no averaged weights; leave out --ema")
    fits = _fits(file, content, args.model, args.ema)
    record = _describe(file, content, fits, args.ema)
    if target is not None:
        record["output"] = _convert(file, content, _chosen(file, fits, args.model), args.ema, record, target)
    print(json.dumps(record) if args.json else _report(record))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="striate convert",
        description="Tell which model a file of weights belongs to, and write it with our keys. No code in it is run.",
    )
    parser.add_argument("file", metavar="FILE", help="weights of the authors, of timm or of ours: .pth, .safetensors")
    parser.add_argument(
        "--to", metavar="OUTPUT", help="write FILE.safetensors, or a folder for local-dir:FOLDER; default: only report"
    )
    parser.add_argument("--model", metavar="NAME", help="the model, where several have the same keys and shapes")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights, where the file has both")
    parser.add_argument(
        "--inert", action="store_true", help="put empty objects for classes of training frameworks in the file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _checked_target(file: str, to: str) -> Path:
    target = Path(to)
    if target.suffix == ".safetensors" and not target.is_dir():
        if target.exists() and target.samefile(file):
            raise ValueError(f"--to {to} is the file to convert; name another one")
        if not os.access(target.absolute().parent, os.W_OK):
            raise ValueError(f"--to {to} cannot be written; give a file in a folder that exists and is yours")
    elif target.suffix and not target.is_dir():
        raise ValueError(f"--to {to} must end in .safetensors, or name a folder")
    return target


def _fits(file: Path, content: Mapping[str, Any], name: str | None, use_ema: bool) -> list[Fit]:
    if name is not None:
        model_info(name)
        fit = try_fit(name, strip_prefix(unwrap(content, use_ema, str(file)))[0])
        if not isinstance(fit, Fit):
            others = [str(other) for other in find_fits(content, use_ema)]
            hint = f"; it has the keys and shapes of {' or '.join(others)}" if others else ""
            raise CheckpointError(f"{file} is no {name}: {fit}{hint}") from fit
        return [fit]
    fits = find_fits(content, use_ema)
    if not fits:
        closest = " ".join(f"({i}) {reason}" for i, reason in enumerate(find_closest(content, use_ema), 1))
        raise CheckpointError(f"{file} fits no registered model. {f'The closest: {closest}' if closest else ''}")
    return fits


def _chosen(file: Path, fits: list[Fit], name: str | None) -> Fit:
    if len(fits) > 1:
        names = ", ".join(fit.name for fit in fits)
        raise ValueError(f"{file} has the keys and shapes of {names}: say which with --model NAME")
    if fits[0].changes and name is None:
        changes = "; ".join(fits[0].changes[:4])
        raise ValueError(
            f"{file} fits {fits[0].name} only after changes: {changes}. --model {fits[0].name} accepts them"
        )
    return fits[0]


def _describe(file: Path, content: Mapping[str, Any], fits: list[Fit], use_ema: bool) -> dict[str, Any]:
    state = unwrap(content, use_ema, str(file))
    _, prefix, outside = strip_prefix(state)
    names = (*EMA_WRAPPERS, *WRAPPERS) if use_ema else WRAPPERS
    wrapper = next((name for name in names if isinstance(content.get(name), Mapping)), None)
    others = (key for key, value in content.items() if wrapper or not isinstance(value, Tensor))
    return {
        "file": str(file),
        "sha256": sha256(file),
        "models": [_model(fit) for fit in fits],
        "tensors": len(state),
        "ema": _has_ema(content),
        "weights": "ema" if use_ema else "model",
        "outside": f"{outside} tensors outside {prefix}*" if outside else None,
        "beside": [str(key) for key in others if key != wrapper],
        "output": None,
    }


def _model(fit: Fit) -> dict[str, Any]:
    info = model_info(fit.name)
    return {
        "name": fit.name,
        "title": info.family.title,
        "args": dict(fit.args),
        "changes": list(fit.changes),
        "input_size": [fit.args.get("in_chans", 3), *info.input_size[1:]],
        "source": info.family.source,
        "licence": info.family.licence,
    }


def _has_ema(content: Mapping[str, Any]) -> bool:
    inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)]
    return any(content.get(name) for name in EMA_WRAPPERS) or any(map(_has_ema, inner))


def _convert(
    file: Path, content: Mapping[str, Any], fit: Fit, use_ema: bool, record: Mapping[str, Any], target: Path
) -> str:
    """Write the weights and return what loads them: a file, or `local-dir:` and a folder."""
    with collected_messages():  # reported as changes
        model = create_model(fit.name, **fit.args)
        for tensor in filter(Tensor.is_floating_point, model.state_dict().values()):
            tensor.fill_(math.nan)  # so that a weight that the file does not have shows
        load_checkpoint(model, content, use_ema=use_ema)  # type: ignore[arg-type]
    info, state = model_info(fit.name), _checked_state(file, model)
    if target.suffix != ".safetensors" or target.is_dir():
        origin = f"Converted from {file.name} (sha256 {record['sha256']}), weights of {info.family.source}."
        return push(model, f"{LOCAL}:{target}", description=origin, licence=info.family.licence)
    metadata = {
        "format": "pt",
        "architecture": fit.name,
        "model_args": json.dumps(fit.args),
        "num_classes": str(0 if isinstance(model, FeaturePyramid) else model.num_classes),
        "source": info.family.source,
        "licence": info.family.licence,
        "converted_from": file.name,
        "converted_from_sha256": str(record["sha256"]),
    }
    _write(target, state, metadata)
    return str(target)


def _checked_state(file: Path, model: nn.Module) -> dict[str, Tensor]:
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    if broken := [key for key, value in state.items() if value.is_floating_point() and bool(value.isnan().any())]:
        raise ValueError(
            f"{file}: {len(broken)} tensors are not there or hold NaN ({', '.join(broken[:3])}); nothing was written"
        )
    return state


def _write(target: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Beside its place first, and moved there once it could be read again."""

    def write(temporary: Path) -> None:
        save_weights(state, temporary, metadata)
        found = read_file(temporary)
        if found.keys() != state.keys() or not all(found[key].equal(value) for key, value in state.items()):
            raise OSError("it comes back differently from the disk")

    write_whole(target, write)


def _report(record: Mapping[str, Any]) -> str:
    models, lines = record["models"], [record["file"]]
    if len(models) > 1:
        lines.append(f"  one of {len(models)} models with these keys and shapes; --model NAME says which:")
    for model in models:
        channels, height, width = model["input_size"]
        lines += [
            f"  model     {model['name']} ({model['title']})",
            f"  part      {_part(model['args'])}",
            f"  input     {channels} x {height} x {width}",
            f"  source    {model['source']} ({model['licence']})",
        ]
        lines += [f"  change    {change}" for change in model["changes"]]
    both = "--ema takes them" if record["weights"] == "model" else "taken"
    lines += [
        f"  averaged  {f'there are averaged weights too: {both}' if record['ema'] else 'no averaged weights'}",
        f"  tensors   {record['tensors']}",
    ]
    if record["outside"]:
        lines.append(f"  left out  {record['outside']}")
    if record["beside"]:
        lines.append(f"  left out  {', '.join(record['beside'])}")
    lines.append(f"  sha256    {record['sha256']}")
    if record["output"]:
        lines.append(f"  written   {record['output']}")
    return "\n".join(lines)


def _part(args: Mapping[str, Any]) -> str:
    if args.get("features_only"):
        return f"features for dense prediction, {'with' if args.get('feature_norms') else 'without'} norms"
    return f"classifier of {args['num_classes']} classes" if args["num_classes"] else "without a classifier"
