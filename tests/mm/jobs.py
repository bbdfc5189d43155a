"""Published configs at a size for tests: drawn images, a small backbone, one process without workers."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mmengine.config.utils
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

import synthetic
from striate.detection.runner import DETECT, SEGMENT, Task, read_config


def _without_metafile(package_path: str, config: str) -> dict[str, Any]:
    raise ValueError(f"{config} is a base, which no metafile names")


# mmengine reads a hundred files for every external base before it finds that out
mmengine.config.utils._get_cfg_metainfo = _without_metafile

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SMALL: dict[str, dict[str, Any]] = {  # of every family with configs
    "biformer": dict(name="biformer_nano"),
    "swin": dict(name="swin_tiny", dim=32, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8)),
    "davit": dict(name="davit_tiny", dims=(32, 64, 128, 256), num_heads=(1, 2, 4, 8)),
    "crossformer": dict(name="crossformer_small", dim=32, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8)),
    "crossformer_pp": dict(name="crossformer_pp_small", dim=32, depths=(1, 4, 2, 1), num_heads=(1, 2, 4, 8)),
    "vig": dict(name="vig_h_tiny", dims=(32, 64, 128, 256), depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8)),
    "metaspikformer": dict(name="metaspikformer_15m", dims=(32, 64, 128, 256), depths=(1, 1, 1, 1)),
    "qsd_transformer": dict(name="qsd_transformer_15m", dims=(32, 64, 128, 256), depths=(1, 1, 1, 1)),
}
_numbers = itertools.count()


def task_of(name: str) -> Task:
    return DETECT if name.startswith("detection/") else SEGMENT


def read(name: str) -> Config:
    """One of our configs, `detection/swin/mask_rcnn_tiny_1x`."""
    return read_config(task_of(name), str(CONFIGS / f"{name}.py"))


def use_scope(config: Config) -> None:
    """Let registries find what `config` names, whatever ran before."""
    for module in config.custom_imports["imports"]:
        importlib.import_module(module)
    init_default_scope(config.default_scope)


def change(node: Any, rules: Mapping[str, Callable[[Any], Any]]) -> None:
    """Apply `rules`, key -> function of the old value, everywhere in a config."""
    if isinstance(node, Mapping):
        for key in list(node):
            if key in rules:
                node[key] = rules[key](node[key])
            else:
                change(node[key], rules)
    elif isinstance(node, (list, tuple)):
        for part in node:
            change(part, rules)


def smaller(size: Any, factor: float) -> Any:
    """A size, or a list of them, times `factor`."""
    if isinstance(size, (list, tuple)):
        return type(size)(smaller(part, factor) for part in size)
    return max(1, round(size * factor))


def shrink(name: str, data: Path, work: Path, batch: int = 4, lr: float = 1e-3, family: str | None = None) -> Config:
    """The config `name` on the sets `train` and `val` in `data`, with a backbone of `SMALL`; it lasts no iteration yet.

    With `family`, another backbone than the config's.

    Sides of images are a fraction of the config's, so that they are 128 in training.
    """
    config = read(name)
    boxes = task_of(name) is DETECT
    factor = 128 / (800 if boxes else 512)
    backbone = config.model.backbone
    backbone.pop("init_cfg")
    if "num_regions" in backbone:
        backbone.num_regions = 4  # of 32 pixels
    if family:
        config.model.backbone = dict(type="StriateBackbone", feature_norms=True)
        backbone = config.model.backbone
    backbone.update(copy.deepcopy(SMALL[family or name.split("/")[1]]), drop_path_rate=0.0)
    use_scope(config)
    with torch.device("meta"):
        widths = list(MODELS.build(backbone).out_channels)
    if "neck" in config.model:
        change(config.model, {"in_channels": _narrow, "feat_channels": _narrow, "conv_out_channels": _narrow})
        change(config.model, {"fc_out_channels": lambda old: 128, "out_channels": _narrow})
        config.model.neck.in_channels = widths
    else:
        config.model.decode_head.update(in_channels=widths, channels=64)
        config.model.auxiliary_head.update(in_channels=widths[2], channels=32)
    classes = len(synthetic.CLASSES) + (not boxes)
    change(config.model, {"num_classes": lambda old: classes, "norm_cfg": lambda old: dict(type="BN")})
    change(config._cfg_dict, {"reduce_zero_label": lambda old: False})
    sizes = dict.fromkeys(("scale", "scales", "crop_size"), lambda old: smaller(old, factor))
    # fewer regions, whose pooling takes most of a CPU's time
    fewer = {key: functools.partial(min, most) for key, most in (("num", 64), ("nms_pre", 200), ("max_per_img", 50))}
    for settings in (config.model.train_cfg, config.model.test_cfg):
        change(settings, fewer)
    for part, loader in (("train", config.train_dataloader), ("val", config.val_dataloader)):
        change(loader, sizes)
        _use_drawn(loader, data / part, boxes)
    config.train_dataloader.batch_size = batch
    config.test_dataloader = config.val_dataloader
    if boxes:
        config.val_evaluator.ann_file = str(data / "val/annotations.json")
    else:
        config.model.data_preprocessor.size = smaller((512, 512), factor)
        change(config.train_dataloader, {"ratio_range": lambda old: (1.0, 1.0)})
    config.test_evaluator = config.val_evaluator
    config.optim_wrapper.optimizer.lr = lr
    config.optim_wrapper.clip_grad = dict(max_norm=5.0)
    config.default_hooks.logger.interval = 10
    config.default_hooks.pop("visualization")
    config.visualizer.vis_backends = []
    config.env_cfg = dict(dist_cfg=dict(backend="gloo"), mp_cfg=dict(opencv_num_threads=1))
    config.log_level = "WARNING"
    config.work_dir = str(work)
    config.randomness = dict(seed=0)
    return config


def _narrow(width: Any) -> Any:
    return {256: 64}.get(width, width) if isinstance(width, int) else [_narrow(one) for one in width]


def _use_drawn(loader: Any, folder: Path, boxes: bool) -> None:
    loader.update(num_workers=0, persistent_workers=False)
    pipeline = loader.dataset.pipeline
    if boxes:
        loader.dataset.update(
            data_root=str(folder),
            ann_file="annotations.json",
            data_prefix=dict(img="images"),
            metainfo=dict(classes=synthetic.CLASSES),
        )
        return
    loader.dataset = dict(
        type="BaseSegDataset",
        data_prefix=dict(img_path=str(folder / "images"), seg_map_path=str(folder / "labels")),
        metainfo=dict(classes=("ground", *synthetic.CLASSES), palette=[[0, 0, 0], *map(list, synthetic.COLOURS)]),
        img_suffix=".png",
        pipeline=pipeline,
    )


def last_for(config: Config, iterations: int, total: int | None = None) -> Config:
    """Train for so many iterations, out of a schedule of `total`, with a checkpoint and an evaluation at the end."""
    config = copy.deepcopy(config)
    total, warmup = total or iterations, 20
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations)
    config.train_dataloader.sampler = dict(type="InfiniteSampler", shuffle=True)
    config.train_dataloader.pop("batch_sampler", None)
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup),
        dict(type="CosineAnnealingLR", eta_min_ratio=0.05, by_epoch=False, begin=warmup, end=max(total, warmup + 1)),
    ]
    config.default_hooks.checkpoint = dict(type="CheckpointHook", interval=iterations, by_epoch=False)
    config.log_processor = dict(by_epoch=False, window_size=10)
    return config


def runner(config: Config) -> Runner:
    """A runner of its own name: mmengine gives one name to one thing for the life of the process."""
    config = copy.deepcopy(config)
    config.experiment_name = f"{Path(config.work_dir).name}_{next(_numbers)}"
    use_scope(config)
    return Runner.from_cfg(config)
