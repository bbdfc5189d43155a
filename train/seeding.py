"""Random numbers as functions of (seed, what for, where), so that a run can be continued at any step.

Nothing in training reads a random state that earlier work has left behind: the sample order is drawn from
(seed, epoch), a sample's augmentation from (seed, epoch, image, copy), and mixup, dropout and stochastic depth of a
forward pass from (seed, step, pass, rank).
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all `parts` and on nothing else, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    # torch.manual_seed would also queue a call (with a stack trace) for devices that this process never uses.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
