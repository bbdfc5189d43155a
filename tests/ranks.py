"""What test_train_distributed.py lets torchrun start: one step and one evaluation in float64, written to a file.

Arguments: file to write, `.npz` with images, folder for runs, images per pass, passes per step, strategies …
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from striate.train import loop
from striate.train.data import Batch
from train_helpers import small_config

CHANGES: dict[str, Any] = {
    "model__name": "test_vit",
    "model__options": {"img_size": 32},
    "model__drop_rate": 0.0,
    "model__drop_path_rate": 0.0,
    "augment__mixup": 0.0,  # drawn for each pass of each rank
    "augment__cutmix": 0.0,
}


def in_double(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield batch._replace(images=batch.images.double())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()  # type: ignore[no-any-return]


def measure(root: Path, folder: Path, batch: int, passes: int, strategy: str) -> dict[str, Any]:
    """The gradient and the loss of the first step, the weights after it, and what evaluation counts."""
    changes = {**CHANGES, "data__batch_size": batch, "optim__accumulation": passes, "run__parallel": strategy}
    with loop.Trainer(small_config(root, folder / strategy, **changes)) as trainer:
        gradients = {}
        step = trainer.optimizer.step

        def look_and_step(*args: Any, **kwargs: Any) -> Any:
            gradients.update({n: whole(p.grad) for n, p in trainer.model.named_parameters() if p.grad is not None})
            return step(*args, **kwargs)

        trainer.optimizer.step = look_and_step
        batches = loop.train_loader(trainer.train_images, trainer._order(0, 1), 0, trainer.device)
        trainer._train_step(in_double(batches))
        trainer.eval_images.transform = remember(trainer.eval_images.transform)
        result = trainer._results(lambda: False)
        seen = trainer.processes.gather(result.predictions.tolist())
        return {
            "gradients": gradients,
            "loss": (trainer.processes.sum(trainer.loss_sum) / trainer.processes.size / passes).tolist()[0],
            "weights": {n: whole(p.detach()) for n, p in trainer.model.named_parameters()},
            "counts": (result.correct, result.correct5, result.total),
            "eval_loss": result.loss,
            "predictions": sum(map(len, seen)),
            "sharded": trainer.replica.sharded,
        }


def remember(transform: Any) -> Any:
    return lambda image: transform(image).double()


def main() -> None:
    out, root, folder, batch, passes, *strategies = sys.argv[1:]
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    build = loop.build_model
    loop.build_model = lambda *args: build(*args).double()  # type: ignore[assignment]
    results = {name: measure(Path(root), Path(folder), int(batch), int(passes), name) for name in strategies}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(results, out)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
