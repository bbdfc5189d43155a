"""`striate export`: a model as a folder that loads again, its binary layers packed to bits, and what that saves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..backbones._binary import BinaryBackbone, BinaryLinear, PackedLinear
from ..backbones.binaryvit import PackedProjection
from ..hub import push
from .config import ConfigParser
from .evaluate import open_model
from .measure import reference_path
from .state import RunFolder

BITS_PER_OP = 64  # binary operations that count as one, as papers on binary networks since Bi-Real Net have it


@dataclass(frozen=True)
class Size:
    """Bytes of a state dict, and of its binary layers alone."""

    total: int
    binary: int


def measure_size(model: nn.Module) -> Size:
    """Bytes of what is saved of `model`.

    Of binary layers count the weights and their scales. Biases and norms, into which BinaryViT's scales are folded when
    it is packed, count among the others.
    """
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    owners = {key: modules[key.rpartition(".")[0]] for key in sizes}
    binary = [key for key, owner in owners.items() if key.endswith(_weights_of(owner))]
    return Size(sum(sizes.values()), sum(sizes[key] for key in binary))


def _weights_of(module: nn.Module) -> tuple[str, ...]:
    """Ends of the names of what a binary layer has for weights, scales that belong to no norm included."""
    if isinstance(module, BinaryLinear):
        return ".weight", ".scaling_factor"
    if isinstance(module, PackedLinear):
        return ".words", ".scale"
    return (".words",) if isinstance(module, PackedProjection) else ()


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of one image: between two binary factors, and others."""

    binary: int
    real: int


def count_operations(model: nn.Module) -> Operations:
    """Count the matrix products and convolutions of an unpacked model for one image of its size."""
    chans, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]
    like = next(model.parameters())
    image = torch.zeros(1, chans, height, width, dtype=like.dtype, device=like.device)
    counter = FlopCounterMode(display=False)
    training = model.training
    with torch.no_grad(), reference_path(), counter:
        model.eval()(image)
    model.train(training)
    modules = {f"{type(model).__name__}.{name}": module for name, module in model.named_modules() if name}
    counts = counter.get_flop_counts()
    flops = {name: sum(of_kinds.values()) for name, of_kinds in counts.items()}  # with those of the parts
    parts = {name: [inner for inner in flops if inner.rpartition(".")[0] == name] for name in flops}
    own = {name: flops[name] - sum(flops[part] for part in parts[name]) for name in flops}
    binary = sum(number for name, number in own.items() if getattr(modules.get(name), "binary_products", False))
    return Operations(binary // 2, (counter.get_total_flops() - binary) // 2)


def export_parser() -> ConfigParser:
    """The parser of `striate export`."""
    parser = ConfigParser(prog="striate export", description="Write a model to a folder that create_model loads.")
    parser.add_argument("source", type=str, help="run folder, model name, local-dir:path or hf-hub:org/name")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--packed", action="store_true", help="pack binary layers to bits, for inference")
    parser.add_argument("--weights", type=str, default="best", help="best or last weights of a run folder")
    parser.add_keys("model", ["checkpoint_path", "num_classes", "in_chans", "pretrained", "options"])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`striate export MODEL --output DIR`: write the model, and print what it weighs.

    Raises:
        ValueError, OSError: the model or its weights cannot be had, it has nothing to pack, or the folder is refused.
    """
    parser = export_parser()
    values = parser.parse(list(sys.argv[1:] if argv is None else argv))
    run = RunFolder(values["source"])
    model, _ = open_model(values, run if run.config.is_file() else None)
    before = measure_size(model)
    if values["packed"]:
        if not isinstance(model, BinaryBackbone):
            raise ValueError(f"{values['source']} has no binary layers to pack; leave out --packed")
        operations = count_operations(model)
        model.pack()
        print(_report(before, measure_size(model), operations))
    folder = Path(values["output"])
    source = push(model, f"local-dir:{folder}")
    print(f"written: {source}, {(folder / 'model.safetensors').stat().st_size / 1e6:.2f} MB")
    return 0


def _report(before: Size, after: Size, operations: Operations) -> str:
    rows = [("all weights", before.total, after.total), ("binary layers", before.binary, after.binary)]
    lines = [f"{'MB':<14}{'unpacked':>10}{'packed':>10}{'ratio':>8}"]
    for name, old, new in rows:
        lines.append(f"{name:<14}{old / 1e6:>10.2f}{new / 1e6:>10.2f}{old / new:>8.1f}")
    total = operations.real + operations.binary / BITS_PER_OP
    lines += [
        "",
        f"multiply-adds of an image: {operations.binary / 1e6:.1f} M binary (BOPs), {operations.real / 1e6:.1f} M real",
        f"together {total / 1e6:.1f} M, with {BITS_PER_OP} binary ones as one",
    ]
    return "\n".join(lines)
