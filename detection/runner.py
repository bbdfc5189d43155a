"""Running mmdetection and mmsegmentation from the command line: what `tools/train.py` and `test.py` do there."""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Task:
    """What a command works on: its name, the package that does it and the folder of its configs."""

    command: str
    package: str
    configs: str


DETECT = Task("detect", "mmdet", "detection")
SEGMENT = Task("segment", "mmseg", "segmentation")


def main(task: Task, argv: Sequence[str]) -> int:
    """`striate detect` and `striate segment`.

    Raises:
        ValueError: a wrong request, or the package is not installed.
    """
    args = _parser(task).parse_args(argv)
    check_installed(task)
    from mmengine.runner import Runner

    config = read_config(task, args.config, args.cfg_options)
    config.launcher = args.launcher or ("pytorch" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "none")
    if config.launcher == "pytorch":
        _join_without_gpu(config)
    if args.work_dir:
        config.work_dir = args.work_dir
    elif not config.get("work_dir"):
        config.work_dir = f"work_dirs/{Path(args.config).stem}"
    if args.action == "test":
        config.load_from = _existing(args.checkpoint)
        Runner.from_cfg(config).test()
        return 0
    if args.amp:
        _use_amp(config)
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == "auto" else _existing(args.resume)
    Runner.from_cfg(config).train()
    return 0


def _parser(task: Task) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"striate {task.command}", description=f"Train or test a config of {task.package} with mmengine's Runner."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train, or go on with a run")
    test = actions.add_parser("test", help="evaluate a checkpoint")
    for action in (train, test):
        action.add_argument("config", metavar="CONFIG", help="a file, or a name in striate's configs: swin/NAME")
    test.add_argument("checkpoint", metavar="CHECKPOINT")
    train.add_argument(
        "--resume", nargs="?", const="auto", metavar="CHECKPOINT", help="go on from this, or from the latest of the run"
    )
    train.add_argument("--amp", action="store_true", help="mixed precision")
    for action in (train, test):
        action.add_argument("--work-dir", metavar="DIR", help="folder of the run; work_dirs/CONFIG by default")
        action.add_argument(
            "--launcher",
            choices=("none", "pytorch", "slurm", "mpi"),
            help="of several processes; found out by itself under torchrun",
        )
        action.add_argument(
            "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change the config: model.a.b=1"
        )
    return parser


def check_installed(task: Task) -> None:
    """Say how to install what is missing.

    Raises:
        ValueError: the task's package cannot be imported.
    """
    for package in ("mmengine", "mmcv", task.package):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{package} is not installed, and `striate {task.command}` runs it; configs/detection/README.md says"
                " how to install it: mmcv is compiled, so plain pip does not do"
            )


def config_path(task: Task, name: str) -> Path:
    """The file that `name` means: itself, or one of striate's own configs (`swin/mask_rcnn_tiny_1x`).

    Raises:
        ValueError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(importlib.resources.files("striate.configs"))) / task.configs
    own = (folder / name).with_suffix(".py")
    if own.is_file():
        return own
    known = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.glob("[!_]*/*.py"))
    raise ValueError(f"no config {name}; give a file, or one of {', '.join(known)}")


def read_config(task: Task, name: str, changes: Sequence[str] = ()) -> Any:
    """The config of that name, with `key=value` changes.

    Raises:
        ValueError: there is no such config, or a change is not of that form.
    """
    from mmengine.config import Config, DictAction
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE.update(mmdet="mmdet", mmseg="mmseg")  # the maintained fork's packages have other names on PyPI
    config = Config.fromfile(config_path(task, name))
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--options", nargs="+", action=DictAction)
    for change in changes:
        if "=" not in change:
            raise ValueError(f"--cfg-options {change}: write key=value")
    if changes:
        config.merge_from_dict(parser.parse_args(["--options", *changes]).options)
    return config


def _join_without_gpu(config: Any) -> None:
    """Of torchrun on CPUs: mmengine itself would ask for a GPU per process."""
    from mmengine.device import get_device

    if get_device() == "cpu":
        torch.distributed.init_process_group("gloo")
        unused = config.get("find_unused_parameters", False)
        wrapper = dict(type="MMDistributedDataParallel", broadcast_buffers=False, find_unused_parameters=unused)
        config.setdefault("model_wrapper_cfg", dict(wrapper, device_ids=None))


def _existing(checkpoint: str) -> str:
    if "://" not in checkpoint and not Path(checkpoint).is_file():
        raise ValueError(f"no checkpoint {checkpoint}")
    return checkpoint


def _use_amp(config: Any) -> None:
    from mmengine.device import get_device

    if get_device() == "cpu":
        raise ValueError(
            "--amp: mmengine trains in mixed precision on accelerators alone, and here is none; leave it out"
        )
    kind = config.optim_wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(f"--amp: the config's optim_wrapper is {kind}; mixed precision needs OptimWrapper")
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.setdefault("loss_scale", "dynamic")
