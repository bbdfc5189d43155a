"""`striate profile --energy`: what one image costs a model layer by layer, in operations and in estimated energy.

The estimate is the one that papers on spiking transformers give (Spikformer, arXiv 2209.15425; Spike-driven
Transformer V1 and V2, 2307.01694 and 2404.03663):

    E = E_MAC * MACs of layers that read real numbers + E_AC * sum over the other layers of SOPs
    SOPs = firing rate of the layer's input * T * MACs of one step

with 4.6 pJ for a multiply-accumulate and 0.9 pJ for an accumulate, 32-bit floating point at 45 nm (Horowitz, ISSCC
2014). Counted are convolutions, matrix products and sums of spikes, while the model runs on real images. Biases, norms,
neurons, pooling, masks and memory are not, as in the papers. What is decided here:

* Whether a layer reads spikes is seen from the values, over all images: they must be non-negative multiples of one
  step, at most `MAX_SPIKES` of it; n steps are n spikes. So integer neurons, whose output n / D stands for n spikes,
  quantised activations, and Spikformer's residual stream, which counts spikes, have rates that can exceed 1, and event
  frames are spikes. The step is that of the neurons which the layer reads, else the largest that fits. A tensor with
  one value everywhere, such as 0, counts as spikes if another in the model does.
* A product of two spike tensors counts those of one factor and takes the other for weights: the factor with fewer
  spikes at once, and of equals the one that fires less. For q (k^T v) that is k or v, whichever is sparser, and then q,
  as in the counter that Spikingformer's authors publish.
* Attention that sums k * v over the tokens adds one number per spike of k * v; masking with q costs nothing.
* A convolution's padding counts as if it fired like the rest of its input: SOPs are MACs times rate.
* A still image passes the first convolution once, and its result is repeated: this is E_MAC * MACs of the formula, not
  T times that. A classifier that reads the mean over T steps of spikes also runs once; it adds every spike of all T.
* Convolutions that follow each other without neurons between are counted as they run: the later ones read real
  numbers. Merged for inference, as Meta-SpikeFormer's RepConv can be, they would be one convolution of spikes.
* The ANN of the comparison runs every layer once, all of it MACs.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from ..backbones._spiking import Lif, Multispike
from ..backbones.mst import Qcfs
from ..hub.folders import write_whole
from .benchmark import align
from .config import ConfigParser, DataConfig, check_output
from .data import eval_loader
from .evaluate import choose_device, open_images, open_model, take_defaults
from .growth import check_plotting
from .measure import reference_path
from .state import RunFolder

E_MAC = 4.6  # pJ: a multiplication 3.7, an addition 0.9
E_AC = 0.9
MAX_SPIKES = 64  # at once; Spikformer's stream reaches 2 per block and 2, average pools of a large map are beyond it

_UNUSED_DATA_KEYS = ("train_split", "batch_size")  # the second is --batch

_aten = torch.ops.aten
_PRODUCTS = {  # name, and which arguments can be spikes: weights never are
    _aten.convolution: ("conv", (0,)),
    _aten.mm: ("linear", (0, 1)),
    _aten.addmm: ("linear", (1, 2)),
    _aten.bmm: ("matmul", (0, 1)),
    _aten.baddbmm: ("matmul", (1, 2)),
}


class Spikes(NamedTuple):
    """Mean and largest number of spikes of a neuron in a step, and whether real numbers could not look like that."""

    rate: float
    most: int
    certain: bool


class Levels:
    """The distinct values of one tensor over all images, to tell spikes from real numbers."""

    def __init__(self) -> None:
        self.counts: Counter[float] | None = Counter()  # None: too many
        self.steps: set[float | None] = set()

    def add(self, x: Tensor, step: float | None = None) -> None:
        """Take in the values of a batch, of which `step` is one spike, if that is known."""
        found = _count_values(x) if self.counts is not None else None
        if self.counts is None or found is None:
            self.counts = None
            return
        self.steps.add(step)
        self.counts.update(found)
        if len(self.counts) > 2 * MAX_SPIKES:  # twice, since rounding can make two values of one
            self.counts = None

    def spikes(self) -> Spikes | None:
        """None if the values are real numbers, or there were none."""
        if not self.counts:
            return None
        (known, *others) = self.steps
        step = (None if others else known) or _common_step([value for value in self.counts if value > 0])
        if step is None:
            return None if any(self.counts) else Spikes(0.0, 0, False)
        total = sum(round(value / step) * count for value, count in self.counts.items())
        certain = step == known or len(self.counts) > 1
        return Spikes(total / self.counts.total(), round(max(self.counts) / step), certain)


def _count_values(x: Tensor) -> dict[float, int] | None:
    """How often each value occurs; None for negative ones or more than 2 * `MAX_SPIKES` different ones."""
    x = x.detach().reshape(-1)
    if not x.numel():
        return {}
    if not x.min() >= 0 or len(x[:: max(1, len(x) // 1024)].unique()) > 2 * MAX_SPIKES:
        return None
    top = x.max()
    zeros, ones = int((x == 0).sum()), int((x == top).sum())
    if top > 0 and zeros + ones == len(x):  # binary: no need to sort
        return {value: count for value, count in ((0.0, zeros), (float(top), ones)) if count}
    values, counts = x.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True)) if len(values) <= 2 * MAX_SPIKES else None


def _common_step(values: Sequence[float]) -> float | None:
    """The largest step of which all the positive `values` are multiples, at most `MAX_SPIKES` times; or None."""
    if not values or min(values) * (MAX_SPIKES + 0.5) < max(values):
        return None
    step, rounding = 0.0, 1e-5 * max(values)
    for value in values:
        while value > rounding:  # Euclid's algorithm
            step, value = value, abs(math.remainder(step, value))
    return step if step * (MAX_SPIKES + 0.5) >= max(values) else None


@torch.no_grad()
def firing_rates(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Spikes per neuron and step of every neuron layer, in evaluation mode.

    Neuron layers are `Lif` (the rate is the mean of its output), `Multispike` (up to `levels` spikes at once) and the
    `Qcfs` of a Masked Spiking Transformer that runs as an SNN, whose spikes have the height `up`.

    Args:
        x: images `(B, C, H, W)` or event frames `(T, B, C, H, W)`, as the model takes them.

    Raises:
        ValueError: if the model has no neurons.
    """
    totals: dict[str, list[float]] = {}

    def note(name: str, value: float, spikes: Tensor) -> None:
        total = totals.setdefault(name, [0.0, 0])
        total[0] += float(spikes.sum(dtype=torch.float64)) / value
        total[1] += spikes.numel()

    layers = {name: (m, value) for name, m in model.named_modules() if (value := _spike_value(m)) is not None}
    if not layers:
        raise ValueError(f"a {type(model).__name__} has no spiking neurons; pass a spiking model")
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name, value=value: note(name, value, out))
        for name, (module, value) in layers.items()
    ]
    try:
        with _evaluating(model):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / count for name, (total, count) in totals.items()}


def _spike_value(module: nn.Module) -> float | None:
    if isinstance(module, Lif):
        return 1.0
    if isinstance(module, Multispike):
        return module.step or 1 / module.levels
    return float(module.up) if isinstance(module, Qcfs) and module.spiking else None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


class Key(NamedTuple):
    """A product: the module that asks for it, its kind, and its number among those of one call of the module."""

    layer: str
    op: str
    number: int


@dataclass
class Product:
    """Multiply-accumulates of a product over all images, and the values of its factors that are no weights."""

    macs: int = 0
    factors: dict[int, Levels] = field(default_factory=dict)

    def spikes(self) -> Spikes | None:
        """Those that are counted, or None if no factor is made of spikes."""
        found = [spikes for levels in self.factors.values() if (spikes := levels.spikes())]
        return min(found, key=lambda spikes: (spikes.most, spikes.rate), default=None)


class Call(NamedTuple):
    """A running forward: its module, how many products of each kind it asked for, its neurons' outputs by storage."""

    layer: str
    numbers: Counter[str]
    spikes: dict[int, tuple[Tensor, float]]


class ProductCounter(TorchDispatchMode):
    """Notes every product that runs inside, by the module whose forward asks for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products: dict[Key, Product] = {}
        self._model = model
        self._constants = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._calls = [Call("", Counter(), {})]
        self._hooks: list[Any] = []
        self._elementwise: Any = None  # the latest product of two tensors of a shape

    def __enter__(self) -> ProductCounter:
        for name, module in self._model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, n=name: self._calls.append(Call(n, Counter(), {})))
            self._hooks += [enter, module.register_forward_hook(self._leave)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._hooks:
            self._hooks.pop().remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            op, places = _PRODUCTS[packet]
            factors = [args[i] for i in places if _storage(args[i]) not in self._constants]
            op = "linear" if len(factors) < len(places) else op
            self._note(op, flop_registry[packet](*args, **kwargs, out_val=out) // 2, factors)
        elif packet is _aten.mul and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self._elementwise = out
        elif func is _aten.sum.dim_IntList and args[0] is self._elementwise and out.is_floating_point():
            self._note("sum", args[0].numel(), args[:1])
        return out

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._calls.pop()
        if (step := _spike_value(module)) is not None:
            self._calls[-1].spikes[_storage(out)] = out, step  # kept, so that no other tensor gets this storage

    def _note(self, op: str, macs: int, factors: Sequence[Tensor]) -> None:
        call = self._calls[-1]
        call.numbers[op] += 1
        product = self.products.setdefault(Key(call.layer, op, call.numbers[op]), Product())
        product.macs += macs
        for i, factor in enumerate(factors):
            known = [call.spikes[_storage(factor)][1] for call in self._calls if _storage(factor) in call.spikes]
            product.factors.setdefault(i, Levels()).add(factor, known[-1] if known else None)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclass(frozen=True)
class LayerEnergy:
    """A row of the report: a kind of product in a layer, per image.

    Attributes:
        layer: name of the module; empty for the model itself.
        op: `conv`, `linear`, `matmul` (of two activations) or `sum`; a number tells a layer's products of spikes apart.
        kind: `MAC` if real numbers are read, `AC` if spikes.
        macs: multiply-accumulates of one step.
        steps: how often the layer runs.
        rate: spikes per neuron and step of what is read; None for real numbers.
        most_spikes: of a neuron in one step; None for real numbers.
        sops: synaptic operations, `rate * steps * macs`; 0 for real numbers.
        energy_uj: in microjoules.
    """

    layer: str
    op: str
    kind: str
    macs: int
    steps: int
    rate: float | None
    most_spikes: int | None
    sops: float
    energy_uj: float


COLUMNS = (*(item.name for item in fields(LayerEnergy)), "share")


@dataclass(frozen=True)
class EnergyReport:
    """Rows in the order in which the layers run, and what they add up to, per image."""

    rows: tuple[LayerEnergy, ...]
    images: int
    timesteps: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one step."""
        return sum(row.macs for row in self.rows)

    @property
    def sops(self) -> float:
        """Synaptic operations of all steps."""
        return sum(row.sops for row in self.rows)

    @property
    def energy_uj(self) -> float:
        """Of the model, in microjoules."""
        macs = sum(row.macs * row.steps for row in self.rows if row.kind == "MAC")
        return (E_MAC * macs + E_AC * self.sops) / 1e6

    @property
    def ann_energy_uj(self) -> float:
        """If every layer ran once and read real numbers."""
        return E_MAC * self.macs / 1e6

    @property
    def ratio(self) -> float | None:
        """How many times more the ANN takes; None if the model takes nothing."""
        return self.ann_energy_uj / self.energy_uj if self.energy_uj else None

    def table(self) -> list[dict[str, Any]]:
        """The rows with their share of the energy of the model; keys as in `COLUMNS`."""
        total = self.energy_uj or 1.0
        return [{**asdict(row), "share": row.energy_uj / total} for row in self.rows]

    def record(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        names = ("images", "timesteps", "macs", "sops", "energy_uj", "ann_energy_uj", "ratio")
        return {**{name: getattr(self, name) for name in names}, "rows": self.table()}


def profile_energy(model: nn.Module, batches: Iterable[Tensor]) -> EnergyReport:
    """Run a model on images and estimate its energy; see the head of this file for what is counted and how.

    The model runs in evaluation mode, with attention as matrix products and operators as they are defined, and is left
    as it was.

    Args:
        model: any; where it has an attribute `timesteps`, a still image is shown that often.
        batches: images `(B, C, H, W)` or event frames `(T, B, C, H, W)`, as the model takes them.

    Raises:
        ValueError: there are no images, or the model multiplies nothing.
    """
    counter, images, first = ProductCounter(model), 0, None
    with _evaluating(model):
        for x in batches:
            axis = x.ndim - 4
            first = x.narrow(axis, 0, 1) if first is None else first
            images += x.shape[axis]
            _run(model, x, counter)
        if first is None:
            raise ValueError("there are no images to profile the model on")
        macs, timesteps = _macs_of_one(model, first)
    if not macs:
        raise ValueError(f"a {type(model).__name__} has no convolution or matrix product to count")
    return EnergyReport(_rows(counter.products, macs), images, timesteps)


def _run(model: nn.Module, x: Tensor, counter: ProductCounter) -> None:
    """A forward whose products all reach the counter: no fused attention, no kernels, no inference mode."""
    with reference_path(), sdpa_kernel(SDPBackend.MATH), torch.inference_mode(False), torch.no_grad(), counter:
        model(x)


def _macs_of_one(model: nn.Module, image: Tensor) -> tuple[dict[Key, tuple[int, int]], int]:
    """MACs of each product for one image, and its steps: T for those that grow with T, else 1. And T."""
    frames, timesteps = image.ndim == 5, getattr(model, "timesteps", 1)
    once, twice = ProductCounter(model), ProductCounter(model)
    _run(model, image, once)
    if frames:
        timesteps = len(image)
        _run(model, torch.cat([image, image]), twice)
    elif hasattr(model, "timesteps"):
        try:
            model.timesteps = 2 * timesteps  # type: ignore[assignment]
            _run(model, image, twice)
        finally:
            model.timesteps = timesteps  # type: ignore[assignment]
    timed = {key for key, product in twice.products.items() if product.macs > once.products[key].macs}
    return {k: (product.macs, timesteps if k in timed else 1) for k, product in once.products.items()}, timesteps


def _rows(products: dict[Key, Product], macs: dict[Key, tuple[int, int]]) -> tuple[LayerEnergy, ...]:
    """One row per product of spikes, and one for all products of a layer and kind that are not."""
    found = {key: products[key].spikes() for key in macs}
    spiking = any(spikes.certain for spikes in found.values() if spikes)
    rows: dict[tuple[str, str, str], LayerEnergy] = {}
    for (layer, op, number), spikes in found.items():
        total, steps = macs[Key(layer, op, number)]
        if spikes and spiking:
            op = f"{op} {number}" if number > 1 else op
            sops = spikes.rate * total
            row = LayerEnergy(layer, op, "AC", total // steps, steps, *spikes[:2], sops, E_AC * sops / 1e6)
        elif op != "sum":
            row = LayerEnergy(layer, op, "MAC", total // steps, steps, None, None, 0.0, E_MAC * total / 1e6)
        else:
            continue
        if same := rows.get((layer, op, row.kind)):
            row = replace(row, macs=same.macs + row.macs, energy_uj=same.energy_uj + row.energy_uj)
        rows[layer, op, row.kind] = row
    return tuple(rows.values())


def format_report(report: EnergyReport) -> str:
    """The report as a table, with totals and what the numbers mean below."""
    lines = [("layer", "op", "kind", "MMACs", "T", "rate", "MSOPs", "uJ", "share")]
    for row in report.table():
        spikes = ("-", "-") if row["rate"] is None else (f"{row['rate']:.4f}", f"{row['sops'] / 1e6:.3f}")
        work = (f"{row['macs'] / 1e6:.3f}", str(row["steps"]), *spikes)
        energy = (f"{row['energy_uj']:.3f}", f"{row['share']:.1%}")
        lines.append((row["layer"] or "(model)", row["op"], row["kind"], *work, *energy))
    macs, sops, ann = report.macs / 1e6, report.sops / 1e6, report.ann_energy_uj
    ratio = "" if report.ratio is None else f", {report.ratio:.2f} times as much"
    text = f"""
per image, mean of {report.images}, T = {report.timesteps}: {macs:.3f} M MACs in a step, {sops:.3f} M SOPs in all
energy {report.energy_uj:.3f} uJ; as an ANN, every layer once and all of it MACs, {ann:.3f} uJ{ratio}
{E_MAC} pJ per MAC, {E_AC} pJ per AC (45 nm); SOPs = rate * T * MACs; rate: spikes per neuron and step of what is read;
T: how often the layer runs, which for the first convolution of a still image is once"""
    if silent := sum(row.rate == 0 for row in report.rows):
        text += f"\n{silent} of {len(report.rows)} rows read no spike at all: dead neurons are cheap"
    return "\n".join(align(lines, left=3)) + "\n" + text


def format_csv(report: EnergyReport) -> str:
    """The rows as CSV with a header; what real numbers do not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(report.table())
    return text.getvalue()


def draw(report: EnergyReport, title: str, path: Path) -> None:
    """Write a PNG: a bar per row with its energy, coloured by kind, and where there are spikes, one with their rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spiking = any(row.kind == "AC" for row in report.rows)
    panels, count = 1 + spiking, len(report.rows)
    figure = Figure(figsize=(5.5 * panels + 1, 1.6 + 0.19 * count), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    colours, reads = {"MAC": "#e66101", "AC": "#2166ac"}, {"MAC": "real numbers", "AC": "spikes"}
    for kind, colour in colours.items():
        if places := [i for i, row in enumerate(report.rows) if row.kind == kind]:
            energies = [report.rows[i].energy_uj for i in places]
            axes[0].barh(places, energies, color=colour, label=f"{kind}: reads {reads[kind]}")
    names = [row.layer if row.op in ("conv", "linear") else f"{row.layer} {row.op}" for row in report.rows]
    axes[0].set_yticks(range(count), names, fontsize=7)
    axes[0].set_ylim(count - 0.4, -0.6)  # the first layer on top
    axes[0].set_xlabel("energy per image (uJ)")
    figure.legend(loc="outside lower center", ncols=2)
    if spiking:
        axes[1].barh(range(count), [row.rate or 0.0 for row in report.rows], color=colours["AC"])
        axes[1].set_xlabel("spikes per neuron and step, of what is read")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    ratio = "" if report.ratio is None else f", {report.ratio:.2f} times as much"
    totals = f"{report.energy_uj:.4g} uJ per image; as an ANN {report.ann_energy_uj:.4g} uJ{ratio}"
    figure.suptitle(f"{title}, T = {report.timesteps}\n{totals}", fontsize=10)
    FigureCanvasAgg(figure).print_png(path)


def profile_parser() -> ConfigParser:
    """The parser of `striate profile`."""
    parser = ConfigParser(prog="striate profile", description="Estimate the energy of a model, layer by layer.")
    parser.add_argument("source", type=str, help="run folder, model name, local-dir:path or hf-hub:org/name")
    parser.add_argument("--energy", action="store_true", help="MACs, firing rates, SOPs and energy (required)")
    parser.add_argument("--weights", type=str, default="best", help="best or last weights of a run folder")
    parser.add_argument("--images", type=int, default=64, help="images, spread evenly over data.eval_split")
    parser.add_argument("--batch", type=int, default=8, help="images per forward pass; does not change the result")
    parser.add_argument("--checkpoint_path", type=str, default=None, help="weights of a model given by its name")
    parser.add_argument("--csv", type=str, default=None, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--png", type=str, default=None, metavar="FILE", help="draw the rows to FILE")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_keys("model", ["num_classes", "in_chans", "pretrained", "options"])
    parser.add_keys("data", [key for key in DataConfig.__dataclass_fields__ if key not in _UNUSED_DATA_KEYS])
    parser.add_keys("run", ["device"])
    parser.set_defaults({"data.name": "fashion-mnist-subset"})
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`striate profile --energy MODEL`: print the report, and write it where it is asked for.

    Raises:
        ValueError, OSError: the model, its weights or the images cannot be had, or a file cannot be written.
    """
    values, run = _parse(list(sys.argv[1:] if argv is None else argv))
    files = {key: Path(values[key]) for key in ("csv", "png") if values[key] is not None}
    _check_request(values, files, run)
    device = choose_device(values["run"]["device"])
    values["model"]["checkpoint_path"] = values["checkpoint_path"]
    model, in_chans = open_model(values, run)
    trained = run is not None or in_chans is None or any(values["model"][k] for k in ("pretrained", "checkpoint_path"))
    data = DataConfig(**values["data"], batch_size=values["batch"])
    batches = tqdm(_open_images(model, data, in_chans, values["images"], device), unit="batch", disable=None)
    report = profile_energy(model.to(device), (images.to(device) for images in batches))
    title = values["source"] if trained else f"{values['source']} (random weights)"
    if "csv" in files:
        write_whole(files["csv"], lambda path: path.write_text(format_csv(report)))
    if "png" in files:
        write_whole(files["png"], lambda path: draw(report, title, path))
    record = {"source": values["source"], "dataset": data.name, "trained": trained, **report.record()}
    print(json.dumps(record) if values["json"] else f"{title} on {data.name}\n\n{format_report(report)}")
    if files:
        print(f"written: {', '.join(map(str, files.values()))}", file=sys.stderr)
    return 0


def _parse(argv: list[str]) -> tuple[dict[str, Any], RunFolder | None]:
    """The values, and the run folder if the source is one, whose configuration then has the defaults."""
    parser = profile_parser()
    run = take_defaults(parser, parser.parse(argv)["source"])
    return parser.parse(argv), run


def _check_request(values: dict[str, Any], files: dict[str, Path], run: RunFolder | None) -> None:
    if not values["energy"]:
        raise ValueError(f"say what to profile: striate profile --energy {values['source']}")
    if run is not None and values["checkpoint_path"] is not None:
        raise ValueError(f"--checkpoint_path does not go with the run folder {run.path}, which has weights")
    for key in ("images", "batch"):
        if values[key] < 1:
            raise ValueError(f"--{key} {values[key]} must be at least 1")
    for key, path in files.items():
        check_output(f"--{key}", path)
    if "png" in files:
        check_plotting("--png")


def _open_images(
    model: nn.Module, config: DataConfig, in_chans: int | None, count: int, device: torch.device
) -> Iterator[Tensor]:
    """Batches of `count` images of the evaluation split, made as the model's `pretrained_cfg` and data.* say."""
    images = open_images(model, config, in_chans)[1]
    total = len(images)
    if count > total:
        raise ValueError(f"--images {count}: {config.name} has {total} in {config.eval_split!r}; give at most that")
    chosen: Any = torch.utils.data.Subset(images, [i * total // count for i in range(count)])
    return (batch for batch, _ in eval_loader(chosen, config.batch_size, config.workers, device))
