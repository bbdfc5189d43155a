"""What a training run can be told: dataclasses in seven groups, read from YAML and the command line.

Every key is a field here and nowhere else: `--optim.lr 1e-3` and

    optim:
      lr: 1e-3

set the same field. Keys on the command line win over the file. Nothing here imports torch, so that a wrong key is
reported at once.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml


def _key(default: Any, help: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": help})


def _options(help: str) -> Any:
    return field(default_factory=dict, metadata={"help": help})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class ModelConfig:
    """The network."""

    name: str = _required("name for striate.create_model: ours, timm's, hf-hub:org/name or local-dir:path")
    pretrained: bool = _key(False, "start from the published weights of that name")
    checkpoint_path: str | None = _key(None, "start from this checkpoint file")
    num_classes: int | None = _key(None, "outputs of the head; null = as many as the data set has classes")
    in_chans: int = _key(3, "image channels: 3 (RGB) or 1 (grey)")
    grad_checkpointing: bool = _key(False, "recompute activations in the backward pass: less memory, more time")
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "parameters not to train: names, prefixes of names (stages.0) or shell patterns (*.norm*)"},
    )
    drop_rate: float = _key(0.0, "dropout before the head, in [0, 1)")
    drop_path_rate: float = _key(0.0, "stochastic depth of the last block, in [0, 1); earlier blocks less, linearly")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further arguments of the model, e.g. {num_regions: 8}"}
    )


@dataclass(kw_only=True)
class DataConfig:
    """The images."""

    name: str = _required(
        "fashion-mnist-subset (embedded), fashion-mnist (idx files in root), npz (root is the file), folder (images in "
        "root/split/class/), tar (root/split.tar), wds (shards root/split-*.tar), or one of timm's: torch/cifar10, "
        "hfds/name, …"
    )
    root: str | None = _key(None, "folder or file of the data set")
    train_split: str = _key("train", "split or sub-folder to train on")
    eval_split: str = _key("validation", "split or sub-folder to evaluate on")
    image_size: int | tuple[int, int] | None = _key(None, "side, or [height, width], in pixels; null = the model's own")
    batch_size: int = _key(128, "images per forward pass and process")
    workers: int = _key(2, "loader processes; 0 = load in the training process. Does not change the result")
    broken_limit: float = _key(
        0.001, "part of the training images that may be unreadable, in [0, 1]: they are logged and replaced by others"
    )
    preprocess: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "mean, std, interpolation, crop_pct, crop_mode instead of the model's own"},
    )
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further arguments of timm.data.create_dataset, e.g. {download: true}"}
    )


@dataclass(kw_only=True)
class AugmentConfig:
    """What happens to training images and labels."""

    scale: tuple[float, float] = _key((0.08, 1.0), "random resized crop: smallest and largest part of the image area")
    hflip: float = _key(0.5, "probability of a horizontal flip")
    color_jitter: float = _key(0.0, "strength of brightness, contrast, saturation changes (off with auto_augment)")
    auto_augment: str | None = _key(None, "timm policy, e.g. rand-m9-mstd0.5-inc1 (RandAugment), augmix-m3, 3a")
    erasing: float = _key(0.0, "probability of erasing a random rectangle (filled with noise)")
    mixup: float = _key(0.0, "alpha of mixup; 0 = off")
    cutmix: float = _key(0.0, "alpha of CutMix; 0 = off")
    mix_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further arguments of timm's Mixup: prob, switch_prob, mode, cutmix_minmax"},
    )
    mix_off_epoch: int = _key(0, "epochs after which mixup and CutMix stop; 0 = never")
    label_smoothing: float = _key(0.0, "probability mass spread over all classes, in [0, 1)")
    repeats: int = _key(1, "repeated augmentation: times that an image occurs in the epochs it is drawn for")
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further arguments of timm's create_transform: ratio, vflip, re_mode, …"},
    )


@dataclass(kw_only=True)
class LossConfig:
    """What is minimised, beyond the cross entropy with the labels that `augment` makes."""

    name: Literal["cross_entropy", "binary_cross_entropy"] = _key(
        "cross_entropy", "over the classes, or of each class for itself (arXiv 2110.00476)"
    )
    tet: float | None = _key(
        None,
        "temporal efficient training of a spiking model: each time step learns the labels, and this much of the loss, "
        "in [0, 1), is the mean squared distance of the logits to 1; null = the mean of the steps learns",
    )
    teacher: str | None = _key(
        None, "learn from this model too: a run folder, or a name for striate.create_model, with its published weights"
    )
    teacher_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further arguments of the teacher; checkpoint_path: FILE instead of the published weights"},
    )
    distillation_weight: float = _key(
        0.5,
        "part of the loss that comes from the teacher, in [0, 1], through the model's own head for it if it has one",
    )
    feature_weight: float = _key(
        0.0, "how much to learn where in its last map the teacher is active (attention transfer, arXiv 1612.03928)"
    )
    temperature: float = _key(1.0, "of the teacher's and the model's probabilities; 0 = learn the teacher's decisions")


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer."""

    name: str = _key("adamw", "any optimizer of timm (timm.optim.list_optimizers())")
    lr: float = _key(1e-3, "peak learning rate")
    reference_batch: int | None = _key(
        None, "the batch per step that lr, warmup_lr and min_lr are meant for: they are scaled linearly to the real one"
    )
    weight_decay: float = _key(0.05, "not applied to biases, norms and what the model's no_weight_decay() names")
    layer_decay: float | None = _key(None, "learning rate factor from layer to layer towards the input, in (0, 1]")
    clip_grad: float | None = _key(None, "limit of the gradient (see clip_mode); null = none")
    clip_mode: Literal["norm", "value", "agc"] = _key("norm", "clip the global norm, each value, or adaptively")
    accumulation: int = _key(1, "forward passes per step")
    ema_decay: float | None = _key(None, "decay of the moving average of the weights, which is then what is evaluated")
    ema_warmup: bool = _key(False, "let the decay grow from 0 over the first steps")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further arguments of the optimizer: betas, eps, momentum, …"}
    )


@dataclass(kw_only=True)
class ScheduleConfig:
    """How long, and the learning rate on the way."""

    name: Literal["cosine", "tanh", "step", "multistep", "poly"] = _key(
        "cosine", "schedule of timm, stepped once per optimizer step"
    )
    epochs: int = _key(100, "passes over the training images")
    warmup_epochs: float = _key(0.0, "epochs of linear warm-up, part of epochs")
    warmup_lr: float = _key(1e-6, "learning rate at the first step of the warm-up")
    min_lr: float = _key(0.0, "learning rate at the end")
    image_sizes: dict[int, int] = field(
        default_factory=dict,
        metadata={"help": "side of the training images from an epoch on, e.g. {0: 160, 30: 192}; before: image_size"},
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further arguments of timm's create_scheduler_v2: decay_rate, decay_epochs, …"},
    )


@dataclass(kw_only=True)
class RunConfig:
    """Where the run lives and how it is carried out."""

    output: str | None = _key(None, "folder of the run (required); the same command on it resumes it")
    seed: int = _key(0, "order, augmentation, initialisation and dropout are functions of it")
    device: str = _key("auto", "cpu, cuda, cuda:1, …; auto = cuda where there is one")
    precision: Literal["float32", "bfloat16", "float16"] = _key(
        "float32", "bfloat16, float16 = autocast, weights stay float32; float16 scales the loss"
    )
    parallel: Literal["ddp", "fsdp"] = _key(
        "ddp", "how the processes of torchrun share the work: whole copies, or parameters and optimizer in shards"
    )
    sync_batchnorm: bool = _key(False, "batch norms take the statistics of all processes (CUDA only)")
    compile: str | None = _key(None, "backend for torch.compile, e.g. inductor; null = do not compile")
    channels_last: bool = _key(False, "store images and convolution weights channels last")
    max_skipped: int = _key(10, "steps in a row whose loss or gradient may be infinite or NaN: they change no weight")
    checkpoint_steps: int = _key(0, "save the training state every so many steps; 0 = after evaluations only")
    log_steps: int = _key(10, "write a line to log.jsonl every so many steps")
    eval_epochs: int = _key(1, "evaluate every so many epochs, and after the last one")
    tensorboard: bool = _key(False, "also write TensorBoard event files (needs the tensorboard package)")
    allow_config_change: bool = _key(False, "resume although keys differ from the ones the run was started with")


@dataclass(kw_only=True)
class TrainConfig:
    """All keys of a run. See the seven groups."""

    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "augment": AugmentConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "run": RunConfig,
}

# These may differ when a run is resumed: they change neither the weights nor which weights are best.
FREE_KEYS = {
    "data.workers",
    "run.output",
    "run.checkpoint_steps",
    "run.log_steps",
    "run.tensorboard",
    "run.allow_config_change",
}


class ConfigParser(jsonargparse.ArgumentParser):
    """An argument parser whose errors are a `ValueError` of one line instead of a usage text."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(exit_on_error=False, allow_abbrev=False, **kwargs)

    def add_keys(self, group: str, names: Sequence[str] | None = None) -> None:
        """Add the keys of one group (all, or those in `names`) as `--group.name`."""
        cls = GROUPS[group]
        hints = typing.get_type_hints(cls)
        section = self.add_argument_group(group, (cls.__doc__ or "").strip())
        for item in fields(cls):
            if names is not None and item.name not in names:
                continue
            flag = f"--{group}.{item.name}"
            text = item.metadata["help"].replace("%", "%%")
            if _has_default(item):
                section.add_argument(flag, type=hints[item.name], default=_default(item), help=text)
            else:
                section.add_argument(flag, type=hints[item.name], required=True, help=text)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Parse to a nested dict of plain values.

        Raises:
            ValueError: an unknown key, a wrong type or an unreadable file, in one line.
        """
        try:
            return self.parse_args(list(argv)).as_dict()
        except Exception as error:
            # jsonargparse lets errors of the YAML loader and of the type parsers through as they are.
            message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split()))
            raise ValueError(self._explain(message)) from error

    def _explain(self, message: str) -> str:
        known = [action.dest for action in self._actions]
        for word in message.replace("'", " ").replace('"', " ").replace("--", " ").replace(",", " ").split():
            close = difflib.get_close_matches(word, known, n=2, cutoff=0.75)
            if "." in word and word not in known and close:
                return f"{message}; did you mean {' or '.join(close)}?"
        return message


def check_output(option: str, path: str | Path | None, suffixes: Sequence[str] = ()) -> Path | None:
    """The file that an option names, None for none.

    Raises:
        ValueError: it cannot be written, or has none of the `suffixes`.
    """
    if path is None:
        return None
    file = Path(path)
    if suffixes and file.suffix not in suffixes:
        raise ValueError(f"{option} {file} must end in {' or '.join(suffixes)}")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"{option} {file} cannot be written; give a file in a folder that exists and is yours")
    return file


def train_parser() -> ConfigParser:
    """The parser of `striate train`: `--config`, `--recipe` and every key of the seven groups."""
    parser = ConfigParser(
        prog="striate train",
        usage="striate train (--recipe NAME | --config FILE) --run.output DIR [--GROUP.KEY VALUE …]",
        description="Train a model. The same command on an existing run folder resumes it.",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file, or the name of a packaged recipe such as biformer/nano_fashion"
    )
    parser.add_argument(
        "--recipe", type=str, help="the same for packaged recipes only: biformer/small_in1k or biformer_small_in1k"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the run would do and take, and do nothing")
    for group in GROUPS:
        parser.add_keys(group)
    return parser


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Read a configuration from command line arguments.

    Raises:
        ValueError: an unknown key, a wrong type, an impossible value or an unknown file, in one line.
    """
    values = train_parser().parse(_resolve_config_options(argv))
    config = TrainConfig(**{group: cls(**values[group]) for group, cls in GROUPS.items()})
    check_config(config)
    return config


def load_config(source: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a YAML file, or a packaged recipe by name, with overrides such as `{"optim.lr": 1e-3}`.

    Raises:
        ValueError: an unknown key, a wrong type, an impossible value or an unknown file, in one line.
    """
    argv = ["--config", str(source)]
    for key, value in (overrides or {}).items():
        argv += [f"--{key}", value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)]
    return parse_config(argv)


def recipe_path(name: str | Path) -> Path:
    """The file behind `--config name`: a path, or `family/recipe` among the packaged ones.

    Raises:
        ValueError: there is neither; the message lists the packaged recipes that come close.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = _recipe_root() / f"{str(name).removesuffix('.yaml').removeprefix('configs/')}.yaml"
    if packaged.is_file():
        return packaged
    raise ValueError(f"no configuration file {name}, and no packaged recipe of that name; there is {_close(str(name))}")


def packaged_recipe(name: str) -> Path:
    """The file behind `--recipe name`: a packaged recipe as family/recipe, or as family_recipe.

    Raises:
        ValueError: no packaged recipe has this name, or more than one; the message lists those that come close.
    """
    known = recipe_names()
    found = [recipe for recipe in known if name in (recipe, recipe.replace("/", "_"))]
    if len(found) == 1:
        return _recipe_root() / f"{found[0]}.yaml"
    if found:
        raise ValueError(f"--recipe {name} stands for {' and '.join(found)}; write the one you mean with its /")
    fix = "give a file with --config" if Path(name).is_file() else f"there is {_close(name)}"
    raise ValueError(f"no packaged recipe is called {name}; {fix}")


def recipe_names() -> list[str]:
    """Names of the packaged recipes, e.g. "biformer/nano_fashion"."""
    root = _recipe_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def _recipe_root() -> Path:
    return Path(str(importlib.resources.files(f"{__package__.rpartition('.')[0]}.configs")))


def _close(name: str) -> str:
    known = recipe_names()
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known)


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML with every key, readable by `--config`."""
    return yaml.safe_dump(_plain(config), sort_keys=False)


def config_changes(old: dict[str, Any], new: TrainConfig) -> list[str]:
    """Differences that would change a run, as "optim.lr: 0.001 -> 0.002". A key that `old` lacks has its default."""
    changes = []
    for group, cls in GROUPS.items():
        before, after = old.get(group, {}), _plain(new)[group]
        for item in fields(cls):
            default = _plain_value(_default(item)) if _has_default(item) else None
            was, now = before.get(item.name, default), after[item.name]
            if was != now and f"{group}.{item.name}" not in FREE_KEYS:
                changes.append(f"{group}.{item.name}: {was} -> {now}")
    return changes


def check_config(config: TrainConfig) -> None:
    """Refuse values that no run can have.

    Raises:
        ValueError: names the key, the value and the rule.
    """
    model, data, augment, loss, optim, schedule, run = (getattr(config, group) for group in GROUPS)
    sizes = data.image_size if isinstance(data.image_size, tuple) else (data.image_size,)
    mixes = augment.mixup > 0 or augment.cutmix > 0 or augment.mix_options.get("cutmix_minmax") is not None
    rules: list[tuple[str, Any, Any, str]] = [
        ("model.name", model.name, bool(model.name), "a model name"),
        ("model.num_classes", model.num_classes, model.num_classes is None or model.num_classes >= 1, ">= 1"),
        ("model.in_chans", model.in_chans, model.in_chans in (1, 3), "3 or 1"),
        ("model.drop_rate", model.drop_rate, 0 <= model.drop_rate < 1, "in [0, 1)"),
        ("model.drop_path_rate", model.drop_path_rate, 0 <= model.drop_path_rate < 1, "in [0, 1)"),
        ("data.name", data.name, bool(data.name), "the name of a data set"),
        ("data.image_size", data.image_size, all(size is None or size >= 1 for size in sizes), ">= 1"),
        ("data.batch_size", data.batch_size, data.batch_size >= 1, ">= 1"),
        ("data.batch_size", data.batch_size, not (mixes and data.batch_size % 2), "even with mixup or CutMix"),
        ("data.workers", data.workers, data.workers >= 0, ">= 0"),
        ("data.broken_limit", data.broken_limit, 0 <= data.broken_limit <= 1, "in [0, 1]"),
        ("augment.scale", augment.scale, 0 < augment.scale[0] <= augment.scale[1] <= 1, "0 < smallest <= largest <= 1"),
        ("augment.hflip", augment.hflip, 0 <= augment.hflip <= 1, "in [0, 1]"),
        ("augment.color_jitter", augment.color_jitter, augment.color_jitter >= 0, ">= 0"),
        ("augment.erasing", augment.erasing, 0 <= augment.erasing <= 1, "in [0, 1]"),
        ("augment.mixup", augment.mixup, augment.mixup >= 0, ">= 0"),
        ("augment.cutmix", augment.cutmix, augment.cutmix >= 0, ">= 0"),
        ("augment.mix_off_epoch", augment.mix_off_epoch, augment.mix_off_epoch >= 0, ">= 0"),
        ("augment.label_smoothing", augment.label_smoothing, 0 <= augment.label_smoothing < 1, "in [0, 1)"),
        ("augment.repeats", augment.repeats, augment.repeats >= 1, ">= 1"),
        ("loss.tet", loss.tet, loss.tet is None or 0 <= loss.tet < 1, "in [0, 1), or null"),
        (
            "loss.teacher_options",
            loss.teacher_options,
            not loss.teacher_options or loss.teacher,
            "{} without a teacher",
        ),
        ("loss.distillation_weight", loss.distillation_weight, 0 <= loss.distillation_weight <= 1, "in [0, 1]"),
        ("loss.feature_weight", loss.feature_weight, 0 <= loss.feature_weight < math.inf, ">= 0"),
        ("loss.feature_weight", loss.feature_weight, not loss.feature_weight or loss.teacher, "0 without a teacher"),
        (
            "loss.feature_weight",
            loss.feature_weight,
            not loss.feature_weight or loss.tet is None,
            "0 with loss.tet: maps of single time steps are not compared",
        ),
        ("loss.temperature", loss.temperature, 0 <= loss.temperature < math.inf, ">= 0"),
        ("optim.lr", optim.lr, 0 < optim.lr < math.inf, "> 0"),
        ("optim.reference_batch", optim.reference_batch, (optim.reference_batch or 1) >= 1, ">= 1"),
        ("optim.reference_batch", optim.reference_batch, optim.reference_batch != 0, ">= 1"),
        ("optim.weight_decay", optim.weight_decay, 0 <= optim.weight_decay < math.inf, ">= 0"),
        ("optim.layer_decay", optim.layer_decay, optim.layer_decay is None or 0 < optim.layer_decay <= 1, "in (0, 1]"),
        ("optim.clip_grad", optim.clip_grad, optim.clip_grad is None or optim.clip_grad > 0, "> 0, or null"),
        ("optim.accumulation", optim.accumulation, optim.accumulation >= 1, ">= 1"),
        ("optim.ema_decay", optim.ema_decay, optim.ema_decay is None or 0 < optim.ema_decay < 1, "in (0, 1), or null"),
        ("schedule.epochs", schedule.epochs, schedule.epochs >= 1, ">= 1"),
        (
            "schedule.warmup_epochs",
            schedule.warmup_epochs,
            0 <= schedule.warmup_epochs < schedule.epochs,
            f">= 0 and less than schedule.epochs ({schedule.epochs})",
        ),
        ("schedule.warmup_lr", schedule.warmup_lr, schedule.warmup_lr >= 0, ">= 0"),
        ("schedule.min_lr", schedule.min_lr, 0 <= schedule.min_lr <= optim.lr, f"in [0, optim.lr = {optim.lr}]"),
        (
            "schedule.image_sizes",
            schedule.image_sizes,
            all(epoch >= 0 and side >= 1 for epoch, side in schedule.image_sizes.items()),
            "epochs >= 0 mapped to sides >= 1",
        ),
        ("run.seed", run.seed, 0 <= run.seed < 2**63, "in [0, 2**63)"),
        ("run.checkpoint_steps", run.checkpoint_steps, run.checkpoint_steps >= 0, ">= 0"),
        (
            "run.precision",
            run.precision,
            run.parallel != "fsdp" or run.precision != "float16",
            "bfloat16 or float32 with run.parallel fsdp",
        ),
        (
            "optim.clip_mode",
            optim.clip_mode,
            run.parallel != "fsdp" or optim.clip_grad is None or optim.clip_mode != "agc",
            "norm or value with run.parallel fsdp",
        ),
        ("run.max_skipped", run.max_skipped, run.max_skipped >= 0, ">= 0"),
        ("run.log_steps", run.log_steps, run.log_steps >= 1, ">= 1"),
        ("run.eval_epochs", run.eval_epochs, run.eval_epochs >= 1, ">= 1"),
    ]
    for key, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{key} is {value}, but must be {rule}")


def read_config_file(path: Path) -> dict[str, Any]:
    """The nested dict in a YAML file. jsonargparse checks keys and types, but passes over a group that is no mapping.

    Raises:
        ValueError: the file is not YAML, or not a mapping of groups to mappings.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, but must map the groups {', '.join(GROUPS)} to keys")
    for group, keys in values.items():
        if group not in GROUPS:
            raise ValueError(f"{path} has the unknown group {group!r}; the groups are {', '.join(GROUPS)}")
        if not isinstance(keys, dict):
            raise ValueError(f"{path}: group {group!r} holds {keys!r}, but must map keys to values")
    return values


def _resolve_config_options(argv: Sequence[str]) -> list[str]:
    """Replace the names after `--config` and `--recipe` by `--config=FILE`, once they are seen to be in order."""
    finders = {"--config": recipe_path, "--recipe": packaged_recipe}
    resolved, words = [], iter(argv)
    for word in words:
        option, has_value, name = word.partition("=")
        if option not in finders:
            resolved.append(word)
            continue
        value = name if has_value else next(words, None)
        if value is None:
            raise ValueError(f"{option} needs a name; there is {', '.join(recipe_names())}")
        path = finders[option](value)
        read_config_file(path)
        resolved.append(f"--config={path}")
    return resolved


def _has_default(item: Field[Any]) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _plain(config: TrainConfig) -> dict[str, Any]:
    return _plain_value(asdict(config))


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_value(item) for key, item in value.items()}
    return [_plain_value(item) for item in value] if isinstance(value, (list, tuple)) else value
