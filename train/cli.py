"""The `striate` command: finds the sub-command and imports only what that one needs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .errors import CommandFailedError


@dataclass(frozen=True)
class Command:
    """A sub-command: `module:function(argv) -> exit code`, relative to this package, and one line of help."""

    target: str
    help: str


COMMANDS = {
    "train": Command(".cli:train", "train a model, or go on with a run: --config RECIPE --run.output DIR"),
    "validate": Command(".evaluate:main", "evaluate a run folder or a model on a data set"),
    "predict": Command(".predict:main", "classify images and folders of images"),
    "detect": Command("..detection.cli:main", "train or test a detector of mmdetection: detect train CONFIG"),
    "segment": Command("..segmentation.cli:main", "train or test a segmenter of mmsegmentation: segment train CONFIG"),
    "visualize": Command(".visualize:main", "draw where a model looks: routing of a BiFormer, else Grad-CAM"),
    "average": Command(".average:main", "average the weights of several checkpoints of one model"),
    "report": Command(".report:main", "show a run on one HTML page: curves, configuration, confusion matrix"),
    "list": Command(".cli:list_models", "list the models whose names match a pattern"),
    "info": Command(".cli:info", "show what is known about a model"),
    "convert": Command("..hub.convert:main", "recognise a file of weights, and write it as safetensors with our keys"),
    "weights": Command(".weights:main", "show where weights are published, and which ones pretrained=True fetches"),
    "benchmark": Command(".benchmark:main", "measure speed and memory of a model"),
    "profile": Command(".profile:main", "estimate the energy of a model, layer by layer, from spikes on real images"),
    "push": Command(".publish:main", "publish a model on the Hugging Face Hub, or to a folder"),
    "pull": Command(".publish:pull_command", "fetch a published model"),
    "export": Command(".export:main", "write a model for inference: a folder, packed to bits if binary, .pt2 or .onnx"),
    "kernels": Command(".kernels:main", "compile the Triton kernels for a GPU and show what each needs"),
    "zoo": Command(".zoo:main", "show all models on one HTML page: table, search, accuracy against cost or speed"),
    "demo": Command(".demo:main", "train, publish and look into a small BiFormer on the embedded images"),
}

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


def main(argv: Sequence[str] | None = None) -> int:
    """Run `striate ARGV` and return the exit code.

    0 done, 1 failed in the middle, 2 a wrong request, 75 or 130 stopped and resumable.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    name, *rest = words
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.5) or list(COMMANDS)
        return _fail("striate", f"unknown command {name!r}; did you mean {' or '.join(close)}?")
    module, _, function = COMMANDS[name].target.partition(":")
    command = getattr(importlib.import_module(module, __package__), function)
    try:
        return int(command(rest) or 0)
    except (ValueError, OSError) as error:
        return _fail(f"striate {name}", " ".join(str(error).split()))
    except CommandFailedError as error:
        print(f"striate {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def train(argv: Sequence[str]) -> int:
    """`striate train`: read the configuration before anything heavy is imported, then train."""
    from .config import parse_config

    config = parse_config(argv)
    if "--dry-run" in argv:
        from .plan import describe_plan

        print(describe_plan(config))
        return 0
    if not config.run.output:
        raise ValueError("run.output is missing; give the folder of the run, --run.output DIR")
    from .data import BrokenDataError
    from .loop import NonFiniteLossError, RunStoppedError, Trainer, finished_summary

    summary = finished_summary(config)
    if summary is not None:
        print(f"{config.run.output} is finished: {_result(summary)}")
        return 0
    with Trainer(config) as trainer:
        say = print if trainer.processes.is_first else _say_nothing
        say(_describe(trainer.config.run.output, trainer.step, trainer.total_steps), file=sys.stderr)
        try:
            summary = trainer.fit()
        except RunStoppedError as stop:
            say(f"striate train: {stop}; the same command goes on from there", file=sys.stderr)
            return 128 + signal.SIGINT if stop.signal_number == signal.SIGINT else EXIT_RESUMABLE
        except (NonFiniteLossError, BrokenDataError, OSError) as error:
            rank = f", process {trainer.processes.rank}" if trainer.processes.size > 1 else ""
            print(f"striate train: stopped after step {trainer.step}{rank}: {error}", file=sys.stderr)
            return EXIT_FAILED
        except ValueError as error:
            # `main` takes it for a wrong request; here it is an accident in the middle of the work.
            raise RuntimeError(f"training failed after step {trainer.step}") from error
        say(f"{config.run.output}: {_result(summary)}, {summary['seconds']:.0f} s")
    return 0


def _say_nothing(*_: object, **__: object) -> None:
    """What processes other than the first have to say."""


def list_models(argv: Sequence[str]) -> int:
    """`striate list`: print the names of our models, one a line."""
    parser = argparse.ArgumentParser(prog="striate list", description="List our models by name.")
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. '*former*'")
    parser.add_argument("--family", help="only models of this family")
    parser.add_argument("--json", action="store_true", help="print one JSON document: a list of names")
    args = parser.parse_args(argv)
    from ..backbones import list_models

    names = list_models(args.pattern, family=args.family)
    if not names:
        raise ValueError(f"no model matches {args.pattern!r}; try a pattern with *, or none for all")
    print(json.dumps(names) if args.json else "\n".join(names))
    return 0


def info(argv: Sequence[str]) -> int:
    """`striate info`: print what is known about one of our models."""
    parser = argparse.ArgumentParser(prog="striate info", description="Show what is known about one of our models.")
    parser.add_argument("name", help="a name from `striate list`")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    from ..backbones import model_info

    known = model_info(args.name)
    if args.json:
        print(json.dumps({key: value for key, value in asdict(known).items() if key != "entry"}))
        return 0
    channels, height, width = known.input_size
    print(f"{known.name} ({known.family.title})")
    print(f"  input       {channels} x {height} x {width}, crop {known.crop_pct}")
    print(f"  parameters  {known.params} M")
    print(f"  GMACs       {known.gmacs}")
    if known.top1 is not None:
        pretraining = f" after {known.pretraining}" if known.pretraining else ""
        print(f"  top-1       {known.top1} % on ImageNet-1k{pretraining}, as the paper gives it")
    print(f"  paper       {known.family.paper}")
    print(f"  source      {known.family.source} ({known.family.licence})")
    return 0


def _usage() -> str:
    lines = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    commands = "\n".join(lines)
    return (
        "usage: striate COMMAND [ARGUMENTS]\n\nVision backbones for PyTorch and timm.\n\ncommands:\n"
        f"{commands}\n\n`striate COMMAND --help` tells the arguments; `striate --version` the version."
    )


def _describe(folder: str | None, step: int, total: int) -> str:
    return f"{folder}: resuming after step {step} of {total}" if step else f"{folder}: {total} steps"


def _result(summary: dict[str, Any]) -> str:
    best = summary["best"]
    return f"best top-1 {best['top1']:.2f} % ({best['correct']}/{best['total']}) in epoch {best['epoch']}"


def _fail(program: str, message: str) -> int:
    print(f"{program}: error: {message}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
