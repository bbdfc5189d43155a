"""Position bias by pairs of tokens, as the kernel of one tile adds it, and the way back for its gradient."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..partition import Size
from ..position import relative_index


def pair_bias(table: Tensor, window: Size, tile: int) -> Tensor:
    """Bias of every pair of the tokens of a tile, keys by queries, from the table by head: `(heads, tile, tile)`."""
    tokens = window[0] * window[1]
    pairs = table.index_select(1, _pair_index(window, table.device)).unflatten(1, (tokens, tokens))
    bias = table.new_full((table.shape[0], tile, tile), -1e30)
    for start in range(0, tile - tokens + 1, tokens):
        bias[:, start : start + tokens, start : start + tokens] = pairs
    return bias


@functools.lru_cache(maxsize=32)
def _pair_index(window: Size, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return relative_index(window, device).t().flatten()


def by_offset(scores: Tensor, window: Size) -> Tensor:
    """Sum `(heads, N, N)` over the pairs of the same offset, as rows of a bias table: `(rows, heads)`.

    Deterministic: no scattered sum.
    """
    pairs = scores.unflatten(2, window).unflatten(1, window).transpose(2, 3)  # query and key: two rows, two columns
    rows_and_columns = _diagonals(_diagonals(pairs).movedim(-1, 1))
    return rows_and_columns.permute(2, 1, 0).flatten(0, 1)


def _diagonals(x: Tensor) -> Tensor:
    """Sums of the diagonals of `(…, n, n)`, from the top right one to the bottom left one: `(…, 2 * n - 1)`.

    A row that is one shorter than the padded one moves each row of the matrix one further, so that a diagonal of the
    flipped matrix becomes a column.
    """
    n = x.shape[-1]
    flat = F.pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return flat.unflatten(-1, (n, 2 * n - 1)).sum(-2)
