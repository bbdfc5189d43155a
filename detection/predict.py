"""Drawing boxes and masks onto images with a trained detector or segmentation model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .runner import Task, check_installed, read_config

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def main(task: Task, argv: Sequence[str]) -> int:
    """`striate predict --task detect|segment CONFIG CHECKPOINT IMAGE_OR_FOLDER … --output DIR`.

    Writes `vis/`, the images with what was found drawn on them, and `preds/`, the same as numbers.

    Raises:
        ValueError: a file is missing, a folder holds no images, or the package is not installed.
    """
    parser = argparse.ArgumentParser(
        prog=f"striate predict --task {task.command}", description="Draw what a model finds onto images."
    )
    parser.add_argument("config", metavar="CONFIG", help="a file, or a name in striate's configs")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run of that config")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--output", required=True, metavar="DIR", help="where vis/ and preds/ are written")
    parser.add_argument("--device", default=None, help="cpu, cuda:0, …; by itself if not given")
    if task.command == "detect":
        parser.add_argument("--score", type=float, default=0.3, help="draw boxes with at least this score")
    args = parser.parse_args(argv)
    check_installed(task)
    paths = [str(path) for path in find_images(args.images)]
    if not Path(args.checkpoint).is_file():
        raise ValueError(f"no checkpoint {args.checkpoint}")
    config = read_config(task, args.config)
    if task.command == "detect":
        from mmdet.apis import DetInferencer

        detector = DetInferencer(config, args.checkpoint, device=args.device, show_progress=False)
        detector(paths, out_dir=args.output, pred_score_thr=args.score, no_save_pred=False)
    else:
        from mmseg.apis import MMSegInferencer

        segmenter = MMSegInferencer(config, args.checkpoint, device=args.device)
        segmenter.show_progress = False
        segmenter(paths, out_dir=args.output, img_out_dir="vis", pred_out_dir="preds")
    print(f"{len(paths)} images drawn into {Path(args.output) / 'vis'}")
    return 0


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files in `paths`, and the images in its folders, sorted.

    Raises:
        ValueError: there is no such file, or a folder holds no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES) if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise ValueError(f"{path} is no image and no folder of images ({', '.join(IMAGES)})")
        found += inside
    return found
