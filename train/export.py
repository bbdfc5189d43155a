"""`striate export`: a model for inference, and what it weighs.

A folder that loads again, its binary layers packed to bits where that is asked for, or a program that needs no code of
this package: `.pt2` of torch.export, or ONNX.
"""

from __future__ import annotations

import importlib.util
import json
import operator
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..backbones._binary import BinaryBackbone, BinaryLinear, PackedLinear
from ..backbones.binaryvit import PackedProjection
from ..hub import push
from ..hub.config import describe
from ..hub.folders import write_whole
from .config import ConfigParser
from .evaluate import in_the_middle, open_model, source_parser
from .measure import reference_path
from .state import RunFolder

AXES = {"batch": 0, "height": 2, "width": 3}
CLOSE = 1e-4  # of the largest output: how far the answers of an exported program may be from PyTorch's
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
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


@dataclass(frozen=True)
class Program:
    """A traced model: sizes from 1 or the first to the last number, None for any, and why others are fixed."""

    exported: ExportedProgram
    example: Tensor
    free: dict[str, tuple[int, int | None]]
    fixed: dict[str, str]

    def inputs(self) -> list[Tensor]:
        """Images of two batches, and of two sizes where those are free, to compare answers on."""
        chans, *sides = self.example.shape[1:]
        others = [self._other(axis, side) for axis, side in zip(("height", "width"), sides, strict=True)]
        generator = torch.Generator().manual_seed(0)
        batches = (1, 3) if "batch" in self.free else (self.example.shape[0],) * 2
        shapes = ((batches[0], chans, *sides), (batches[1], chans, *others))
        return [torch.randn(shape, generator=generator) for shape in shapes]

    def _other(self, axis: str, side: int) -> int:
        if axis not in self.free:
            return side
        low, high = self.free[axis]
        return side + 16 if high is None or side + 16 <= high else max(low, side - 16)


@torch.no_grad()
def trace(model: nn.Module, size: tuple[int, int], axes: Sequence[str] = tuple(AXES)) -> Program:
    """Trace a model of images on the CPU, with any sizes of those `axes` that the model allows.

    The height and width that the program then takes are those for which the model does the same as for `size`: where a
    map of `size` is one window, it is one for all of them.
    """
    example = _image(model, size, 2 if "batch" in axes else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dims = {AXES[axis]: Dim.DYNAMIC for axis in axes}
        exported = torch.export.export(model.eval(), (example,), dynamic_shapes=(dims,))
    free = _free_sizes(exported, example)
    same = "the model does not do the same for other sizes"
    return Program(exported, example, free, {axis: same for axis in AXES if axis not in free})


def _image(model: nn.Module, size: tuple[int, int], batch: int) -> Tensor:
    pretrained_cfg: Any = model.pretrained_cfg
    return torch.zeros(batch, pretrained_cfg["input_size"][0], *size)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _free_sizes(exported: ExportedProgram, example: Tensor) -> dict[str, tuple[int, int | None]]:
    """The range of every free axis: the tracer's bounds, narrowed to what the program accepts around the example."""
    (name,) = exported.graph_signature.user_inputs
    node = next(node for node in exported.graph.nodes if node.name == name)
    program = exported.module()
    free: dict[str, tuple[int, int | None]] = {}
    for axis, number in AXES.items():
        side = node.meta["val"].shape[number]
        if isinstance(side, int):
            continue
        bounds = exported.range_constraints[side.node.expr]
        low = 1 if axis == "batch" else int(bounds.lower)  # the tracer takes no example of 1, the program may
        high = None if bounds.upper > 1 << 30 else int(bounds.upper)
        given = example.shape[number]

        def accepts(size: int, number: int = number) -> bool:
            try:
                program(example.new_zeros([*example.shape[:number], size, *example.shape[number + 1 :]]))
            except (AssertionError, RuntimeError, ValueError):
                return False
            return True

        free[axis] = (_furthest(given, low, accepts), None if high is None else _furthest(given, high, accepts))
    return free


def _furthest(start: int, end: int, accepts: Callable[[int], bool]) -> int:
    """The last number from `start`, which is accepted, towards `end` that is accepted too, found by halving."""
    if accepts(end):
        return end
    while abs(end - start) > 1:
        middle = (start + end) // 2
        start, end = (middle, end) if accepts(middle) else (start, middle)
    return start


def write_pt2(program: Program, file: Path, config: str) -> Callable[[Tensor], list[Tensor]]:
    """Write the program with `config` as its extra file config.json; what computes with it."""
    torch.export.save(program.exported, file, extra_files={"config.json": config})
    module = torch.export.load(file).module()
    return lambda images: tree_leaves(module(images))


def write_onnx(program: Program, file: Path, config: str) -> Callable[[Tensor], list[Tensor]]:
    """Write the program as ONNX with `config` among its properties; what computes with it, by onnxruntime."""
    import onnxruntime  # type: ignore[import-untyped]
    from onnxscript import opset18

    def floor_divide(number: Any, divisor: Any) -> Any:
        """ONNX divides integers towards 0, and so a rounded-up size, -(-h // w), would be rounded down."""
        return opset18.Div(opset18.Sub(number, opset18.Mod(number, divisor)), divisor)

    table: Any = {operator.floordiv: floor_divide}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # onnxscript's optimizer breaks off at splits into sequences; onnxruntime optimizes what it loads anyway.
        made = torch.onnx.export(
            program.exported,
            (program.example,),
            dynamo=True,
            verbose=False,
            optimize=False,
            custom_translation_table=table,
        )
    assert made is not None
    made.model.metadata_props["striate.config"] = config
    made.save(str(file), external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every constant that it cannot fold
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {entry.name: images.numpy()})]


Writer = Callable[[Program, Path, str], Callable[[Tensor], list[Tensor]]]
WRITERS: dict[str, Writer] = {"pt2": write_pt2, "onnx": write_onnx}


def export_program(model: nn.Module, size: tuple[int, int], kind: str, file: Path) -> tuple[Program, float]:
    """Trace `model`, write it to `file`, and compare its answers with PyTorch's before it is put in place.

    Where a program with free sizes cannot be made, or answers differently, height and width are fixed, then the batch.

    Returns:
        The program, and the largest difference of an answer, relative to the largest answer.

    Raises:
        ValueError: the model refuses images of this size, or cannot be exported at all.
    """
    with torch.no_grad():
        model.eval()(_image(model, size, 1))
    fixed: dict[str, str] = {}
    config = json.dumps(describe(model))
    for axes, given_up in ((tuple(AXES), ("height", "width")), (("batch",), ("batch",)), ((), ())):
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / file.name
            try:
                program, difference = _draft(model, size, axes, WRITERS[kind], draft, config)
            except Exception as error:  # of the tracer, its solver of sizes, the translation, or what runs it
                reason = _first_line(error)
                if not axes:
                    raise ValueError(f"a {type(model).__name__} cannot be exported as {kind}: {reason}") from error
                fixed |= dict.fromkeys(given_up, reason)
                continue
            with in_the_middle("writing"):
                write_whole(file, lambda path, draft=draft: shutil.copyfile(draft, path))  # type: ignore[misc]
        return replace(program, fixed=program.fixed | fixed), difference
    raise AssertionError


def _draft(
    model: nn.Module, size: tuple[int, int], axes: Sequence[str], write: Writer, file: Path, config: str
) -> tuple[Program, float]:
    program = trace(model, size, axes)
    answer = write(program, file, config)
    difference = max(_difference(answer(images), model, images) for images in program.inputs())
    if not difference <= CLOSE:
        raise RuntimeError(f"the exported program answers differently, by {difference:.1e} of the largest answer")
    return program, difference


@torch.no_grad()
def _difference(found: list[Tensor], model: nn.Module, images: Tensor) -> float:
    wanted = tree_leaves(model(images))
    assert len(found) == len(wanted)
    if any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return float("inf")
    pairs = [((a - b).abs().max(), b.abs().max()) for a, b in zip(found, wanted, strict=True)]
    return max(float(gap / largest.clamp_min(1e-12)) for gap, largest in pairs)


def export_parser() -> ConfigParser:
    """The parser of `striate export`."""
    parser = source_parser("export", "Write a model for inference.")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--format",
        type=str,
        default="folder",
        help="folder = what create_model loads; pt2 = DIR/model.pt2 of torch.export; onnx = DIR/model.onnx",
    )
    parser.add_argument("--packed", action="store_true", help="pack binary layers to bits, for a folder")
    parser.add_argument(
        "--size",
        type=tuple[int, int] | None,
        default=None,
        help="[height, width] to trace pt2 and onnx with, which sets the range they take; default the model's own",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`striate export MODEL --output DIR`: write the model, and print what it weighs.

    Raises:
        ValueError, OSError: the model or its weights cannot be had, it has nothing to pack, the folder is refused, or
            no program that answers as the model does can be made of it.
    """
    parser = export_parser()
    values = parser.parse(list(sys.argv[1:] if argv is None else argv))
    _check_request(values)
    run = RunFolder(values["source"])
    model, _ = open_model(values, run if run.config.is_file() else None)
    folder = Path(values["output"])
    if values["format"] == "folder":
        record, text = _export_folder(model, folder, values)
    else:
        record, text = _export_program(model, folder, values)
    print(json.dumps({"source": values["source"], "format": values["format"], **record}) if values["json"] else text)
    return 0


def _check_request(values: dict[str, Any]) -> None:
    kind, size = values["format"], values["size"]
    if kind not in ("folder", *WRITERS):
        raise ValueError(f"--format {kind} is not known; give folder, {' or '.join(WRITERS)}")
    if kind == "folder" and size is not None:
        raise ValueError("--size is for --format pt2 and onnx; a folder takes images of any size that the model takes")
    if kind != "folder" and values["packed"]:
        raise ValueError(f"--packed does not go with --format {kind}: bits are counted by code of this package")
    if size is not None and min(size) < 1:
        raise ValueError(f"--size {list(size)} must be two numbers of 1 or more")
    missing = [name for name in ONNX_PACKAGES if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install striate[export]")


def _export_folder(model: nn.Module, folder: Path, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    before = measure_size(model)
    record: dict[str, Any] = {"bytes_of_weights": before.total}
    lines = []
    if values["packed"]:
        if not isinstance(model, BinaryBackbone):
            raise ValueError(f"{values['source']} has no binary layers to pack; leave out --packed")
        operations = count_operations(model)
        model.pack()
        after = measure_size(model)
        lines.append(_report(before, after, operations))
        record |= {"packed": asdict(after), "unpacked": asdict(before), "operations": asdict(operations)}
        record["bytes_of_weights"] = after.total
    source = push(model, f"local-dir:{folder}")
    size = (folder / "model.safetensors").stat().st_size
    lines.append(f"written: {source}, {size / 1e6:.2f} MB")
    return {"output": source, "bytes": size, **record}, "\n".join(lines)


def _export_program(model: nn.Module, folder: Path, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"model.{values['format']}"
    size = values["size"] or tuple(model.pretrained_cfg["input_size"][1:])  # type: ignore[index]
    program, difference = export_program(model, size, values["format"], file)
    lines = [f"{axis:<8}{_range(*bounds)}" for axis, bounds in program.free.items()]
    for axis, reason in program.fixed.items():
        lines.append(f"{axis:<8}fixed at {program.example.shape[AXES[axis]]}: {reason}")
    written = file.stat().st_size
    lines.append(f"written: {file}, {written / 1e6:.2f} MB, answers within {difference:.0e} of PyTorch's")
    record = {"output": str(file), "bytes": written, "free": program.free, "fixed": program.fixed}
    return {**record, "largest_difference": difference}, "\n".join(lines)


def _range(low: int, high: int | None) -> str:
    return f"{low} or more" if high is None else f"{low} to {high}"


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
