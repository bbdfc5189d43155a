"""The order of training images: a function of (seed, epoch), readable from any step, the same for any world size."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from striate.train.sampler import SampleKey, TrainingOrder
from striate.train.seeding import derive_seed, seed_all


def order(num_samples: int = 103, batch_size: int = 10, **options: int) -> TrainingOrder:
    return TrainingOrder(num_samples, batch_size, **{"seed": 3, "stop_step": 30, **options})


def test_an_epoch_has_no_image_twice_and_the_left_over_ones_change() -> None:
    batches = list(order())
    assert order().steps_per_epoch == 10
    missing = []
    for epoch in range(3):
        keys = [key for batch in batches[10 * epoch : 10 * epoch + 10] for key in batch]
        assert {key.epoch for key in keys} == {epoch}
        images = {key.image for key in keys}
        assert len(images) == 100
        missing.append(set(range(103)) - images)
    assert missing[0] != missing[1] != missing[2]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    assert not np.array_equal(order().epoch_order(0), order().epoch_order(1))
    assert not np.array_equal(order().epoch_order(0), order(seed=4).epoch_order(0))
    assert not np.array_equal(order().epoch_order(0), np.arange(103))


@pytest.mark.parametrize("start", [0, 1, 9, 10, 17, 29, 30])
def test_a_later_start_gives_the_same_rest(start: int) -> None:
    late = order(start_step=start)
    assert list(late) == list(order())[start:]
    assert len(late) == 30 - start


def test_processes_and_accumulation_share_one_global_order() -> None:
    whole = [sorted(batch) for batch in order(batch_size=12, num_samples=100, stop_step=16)]
    ranks = [list(order(batch_size=4, num_samples=100, stop_step=16, rank=rank, world_size=3)) for rank in range(3)]
    assert [sorted(chain(*batches)) for batches in zip(*ranks, strict=True)] == whole
    passes = list(order(batch_size=4, num_samples=100, stop_step=16, accumulation=3))
    assert [sorted(chain(*passes[i : i + 3])) for i in range(0, len(passes), 3)] == whole


def test_repeats_spread_over_processes() -> None:
    ranks = [
        list(order(batch_size=5, num_samples=60, stop_step=4, repeats=3, rank=rank, world_size=3)) for rank in range(3)
    ]
    for step in range(4):
        batches = [batches[step] for batches in ranks]
        for images in zip(*batches, strict=True):
            assert len({key.image for key in images}) == 1
            assert {key.copy for key in images} == {0, 1, 2}
    counts = Counter(key.image for batches in ranks for batch in batches for key in batch)
    assert len(counts) == 20
    assert set(counts.values()) == {3}


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"103 training images are fewer than one step takes.*104 x"):
        order(batch_size=104)
    with pytest.raises(ValueError, match="rank 2 is not in 0 … 1"):
        order(rank=2, world_size=2)


def test_keys_are_plain_numbers() -> None:
    (batch,) = order(stop_step=1)
    assert all(type(value) is int for key in batch for value in key)
    assert isinstance(batch[0], SampleKey)


def test_seeds_depend_on_every_part_and_are_pinned() -> None:
    seeds = {derive_seed(*parts) for parts in ((0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a", 1, 0))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "sample", 1, 2, 0) == 7321381746896334066


def test_seed_all_covers_three_generators() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_all(2**62 + 5)
    first = draw()
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    seed_all(2**62 + 5)
    assert draw() == first
