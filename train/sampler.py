"""The order of training images as a function of (seed, epoch), readable from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from .seeding import derive_seed


class SampleKey(NamedTuple):
    """One image of one epoch, by its number in the data set; `copy` counts its repeats in that epoch."""

    image: int
    epoch: int
    copy: int


class TrainingOrder(Sampler[list[SampleKey]]):
    """Batches of sample keys for the steps `start_step` … `stop_step - 1` of a run, without a break between epochs.

    A step is `accumulation` batches of `batch_size` on each of `world_size` processes. An epoch is as many whole
    steps as fit into the data set; the images left over are other ones in every epoch. Which images a step sees does
    not depend on `rank`, so processes may be exchanged for accumulation.

    With `repeats` > 1 an epoch draws 1/repeats of the images and uses each that many times, neighbouring positions on
    different processes (repeated augmentation, arXiv 1901.09335, as in DeiT).

    Raises:
        ValueError: the data set is smaller than one step, or the rank is not in the world.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        stop_step: int,
        start_step: int = 0,
        accumulation: int = 1,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0 … {world_size - 1}")
        self.num_samples, self.batch_size, self.accumulation = num_samples, batch_size, accumulation
        self.seed, self.repeats, self.rank, self.world_size = seed, repeats, rank, world_size
        self.start_step, self.stop_step = start_step, stop_step
        self.steps_per_epoch = num_samples // (batch_size * accumulation * world_size)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{num_samples} training images are fewer than one step takes: data.batch_size {batch_size} x "
                f"optim.accumulation {accumulation} x {world_size} processes; lower data.batch_size"
            )

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(self.start_step, self.stop_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.epoch_order(epoch), epoch
            for forward_pass in range(self.accumulation):
                batch = step_in_epoch * self.accumulation + forward_pass
                first = batch * self.batch_size * self.world_size
                positions = range(first + self.rank, first + self.batch_size * self.world_size, self.world_size)
                yield [SampleKey(int(order[p]), epoch, p % self.repeats) for p in positions]

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The indices `(num_samples,)` of one epoch in order, repeats included."""
        generator = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        shuffled = generator.permutation(self.num_samples)
        return np.repeat(shuffled, self.repeats)[: self.num_samples]
