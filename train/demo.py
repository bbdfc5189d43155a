"""`striate demo`: everything a stranger can do with this package, once and for real, on the embedded images.

Trains `biformer_nano` with its packaged recipe, evaluates it, publishes it to a local hub folder, creates it again from
there, checks that it answers exactly as before, classifies a few test images and draws where its regions look.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from .. import create_model, push
from ..hub.folders import write_whole
from .config import load_config
from .data import LabelledImages, open_source
from .evaluate import choose_device, validate
from .evaluate import main as validate_command
from .model import load_trained
from .publish import FASHION_MNIST
from .visualize import RoutingRow, draw_routing, routed_stages

RECIPE = "biformer/nano_fashion"
EXPECTED_TOP1 = 82.0  # per cent, of the whole recipe
NUM_CLASSIFIED = 8
DRAWN_CLASSES = ("Ankle boot", "Dress", "Bag")


def main(argv: Sequence[str]) -> int:
    """Run the demo; 0 if every step did what it should. A folder that an earlier demo left unfinished is finished.

    Raises:
        ValueError: the training could not start, or the published model answers differently.
    """
    parser = argparse.ArgumentParser(
        prog="striate demo",
        usage="striate demo [--output DIR] [--epochs N] [--GROUP.KEY VALUE …]",
        description=(__doc__ or "").split("\n\n")[1],
        epilog="Other arguments go to `striate train`, e.g. --run.seed 1.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything it makes (demo)")
    parser.add_argument("--epochs", type=int, help="train for another number of epochs than the recipe")
    args, changes = parser.parse_known_args(list(argv))
    began = time.monotonic()
    run, hub, picture = args.output / "run", args.output / "hub" / "biformer_nano", args.output / "routing.png"

    if args.epochs is not None:
        changes += ["--schedule.epochs", str(args.epochs)]
    words = ["train", "--config", RECIPE, "--run.output", str(run), *changes]
    _say("Train", f"striate {' '.join(words)}")
    code = _run_command(words)
    if code == 2:
        raise ValueError(f"the training cannot start, see above; remove {args.output} or give another --output")
    if code != 0:
        return code

    _say("Evaluate", f"striate validate {run}")
    trained = _validate_run(run)
    _tell(f"{trained['correct']} of {trained['total']} held-out images right: top-1 {trained['top1']:.2f} %")

    _say("Publish", f'striate.push(model, "local-dir:{hub}", …)')
    address = _publish(run, hub, trained, " ".join(words[:3] + changes))

    _say("Create again", f'striate.create_model("{address}")')
    config = load_config(run / "config.yaml")
    device = choose_device(config.run.device)
    model = create_model(address).eval().to(device)
    again = validate(model, config.data, device, config.run.precision, progress=True)
    if (again.correct, again.total) != (trained["correct"], trained["total"]):
        raise ValueError(f"{address} has {again.correct} of {again.total} right, {run} {trained['correct']}")
    _tell(f"{again.correct} of {again.total} right: the same to the last image")

    source = open_source(config.data, config.data.eval_split, config.model.in_chans)
    names = source.classes or []
    _say("Classify", f"{NUM_CLASSIFIED} of the held-out images")
    _classify(model, source.images, names)

    _say("Look inside", str(picture))
    _draw(model, source.images, names, picture)
    _summarise(args.output, run, hub, picture, again.top1, again.total, time.monotonic() - began)
    if not changes and again.top1 < EXPECTED_TOP1:
        raise ValueError(f"top-1 {again.top1:.2f} % is below the {EXPECTED_TOP1} % that the recipe should reach")
    return 0


def _run_command(words: list[str]) -> int:
    """Run `striate WORDS` as a user would; its progress bar goes to the same terminal."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # finds what this process found
    with subprocess.Popen([sys.executable, "-m", "striate.train.cli", *words], env=environment) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal told the child too, which now saves its state
                continue


def _validate_run(run: Path) -> dict[str, Any]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        validate_command([str(run), "--json"])
    return dict(json.loads(output.getvalue().splitlines()[-1]))


def _publish(run: Path, hub: Path, trained: dict[str, Any], command: str) -> str:
    summary = json.loads((run / "summary.json").read_text())
    address = push(
        load_trained(run),
        f"local-dir:{hub}",
        metrics={"top1": trained["top1"], "top5": trained["top5"]},
        dataset=FASHION_MNIST,
        description=(
            f"A small BiFormer, trained on {summary['train_images']} photos of Fashion-MNIST (28 x 28, grey, enlarged)"
            f" and evaluated on {summary['eval_images']} others from its test split."
        ),
        recipe=f"striate {command}\n\n{(run / 'config.yaml').read_text()}",
        licence="mit",
    )
    for path in sorted(hub.iterdir()):
        _tell(f"{path}  {path.stat().st_size:,} bytes")
    return address


@torch.no_grad()
def _classify(model: nn.Module, images: LabelledImages, names: list[str]) -> None:
    chosen = [i * len(images) // NUM_CLASSIFIED for i in range(NUM_CLASSIFIED)]
    probabilities = model(_inputs(model, [images[index][0] for index in chosen])).softmax(-1).cpu()
    width = max(map(len, names))
    _tell(f"{'image':>5}  {'is':<{width}}  {'taken for':<{width}}  probability")
    for index, row in zip(chosen, probabilities, strict=True):
        best, label = int(row.argmax()), images[index][1]
        _tell(f"{index:>5}  {names[label]:<{width}}  {names[best]:<{width}}  {row[best]:>11.1%}")


@torch.no_grad()
def _draw(model: nn.Module, images: LabelledImages, names: list[str], picture: Path) -> None:
    labels = [images[index][1] for index in range(len(images))]
    photos = [images[labels.index(names.index(name))][0] for name in DRAWN_CLASSES]
    inputs = _inputs(model, photos)
    rows = []
    for index, best in enumerate(model(inputs).argmax(-1).tolist()):
        title = f"{DRAWN_CLASSES[index]}\n(taken for {names[best]})"
        for what, point in zip(("the object", "background"), extreme_points(photos[index]), strict=True):
            rows.append(RoutingRow(photos[index], f"{title}\nquery: {what}", index, point))
    drawing = draw_routing(rows, routed_stages(model, inputs), (inputs.shape[2], inputs.shape[3]))
    write_whole(picture, lambda path: drawing.save(path, "png"))


def _inputs(model: nn.Module, images: Sequence[Image.Image]) -> Tensor:
    """Images as `(B, C, H, W)` on the model's device, made as its own description says."""
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings, is_training=False)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    return torch.stack([transform(image.convert(mode)) for image in images]).to(next(model.parameters()).device)


def extreme_points(image: Image.Image, cells: int = 4) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres (y, x), in fractions, of the brightest and the darkest of `cells` x `cells` parts of the image."""
    means = np.asarray(image.convert("L").resize((cells, cells), Image.Resampling.BOX)).ravel()
    centres = [((i // cells + 0.5) / cells, (i % cells + 0.5) / cells) for i in range(cells * cells)]
    return centres[int(means.argmax())], centres[int(means.argmin())]


def _summarise(output: Path, run: Path, hub: Path, picture: Path, top1: float, total: int, seconds: float) -> None:
    minutes, rest = divmod(round(seconds), 60)
    _say("Done", f"in {minutes} min {rest} s: top-1 {top1:.2f} % on {total} held-out images")
    _tell(f"{run}: the training: config.yaml, log.jsonl, best.safetensors, last.safetensors, summary.json")
    _tell(f"{hub}: the published model: config.json, model.safetensors, README.md")
    _tell(f"{picture}: where regions of the image look, stage by stage")
    _tell(f"Run it again to repeat the checks, or remove {output} to train anew.")


def _say(step: str, text: str) -> None:
    print(f"\n== {step}: {text}", flush=True)


def _tell(text: str) -> None:
    print(f"   {text}", flush=True)
