"""Position biases: index tables, the coordinates of continuous biases, and resizing learned tables on load."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .partition import Size


def relative_index(window: Size, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: `(N, N)` int64, `N = window_h * window_w`.

    The table has `(2 * window_h - 1) * (2 * window_w - 1)` rows, one for each offset query - key, row-major
    (Swin, arXiv 2103.14030).
    """
    y = torch.arange(window[0], device=device).repeat_interleave(window[1])
    x = torch.arange(window[1], device=device).repeat(window[0])
    dy = y[:, None] - y[None, :] + window[0] - 1
    dx = x[:, None] - x[None, :] + window[1] - 1
    return dy * (2 * window[1] - 1) + dx


def expand_bias(table: Tensor, window: Size, index: Tensor | None = None) -> Tensor:
    """Spread a bias table `(rows, heads)` over all pairs of tokens: `(heads, N, N)`."""
    n = window[0] * window[1]
    if index is None:
        index = relative_index(window, table.device)
    return table[index.flatten()].view(n, n, -1).permute(2, 0, 1)


def offsets(window: Size, device: torch.device | None = None) -> Tensor:
    """The offset (vertical, horizontal) that each row of the bias table stands for: `(rows, 2)` float32."""
    axes = [torch.arange(1 - w, w, dtype=torch.float32, device=device) for w in window]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def log_coordinates(window: Size, pretrained_window: Size | None = None) -> Tensor:
    """Log-spaced relative offsets of Swin v2 (arXiv 2111.09883, eq. 4): `(rows, 2)` float32, rows as in the table.

    Offsets are divided by `pretrained_window - 1` (default: `window - 1`), so that a model moved to another window
    reads the bias network where it was trained.
    """
    scale = pretrained_window or window
    grid = offsets(window) / torch.tensor([max(side - 1, 1) for side in scale]) * 8
    return grid.sign() * torch.log2(grid.abs() + 1.0) / math.log2(8)


class DynamicPositionBias(nn.Module):
    """A bias table from a small network of the offsets, for any window (CrossFormer, arXiv 2108.00154)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(2, dim)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, out)) for out in (dim, dim, num_heads)
        )

    def forward(self, window: Size) -> Tensor:
        """The bias table `((2 * window_h - 1) * (2 * window_w - 1), heads)`."""
        weight = self.pos_proj.weight
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets(window, weight.device).to(weight.dtype)))))


def resize_bias_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """Resize a learned table `(rows, heads)` from window `old` to window `new`: bicubic, as the Swin authors do.

    Raises:
        ValueError: if `table` has not the rows of window `old`.
    """
    rows, heads = table.shape
    if rows != (2 * old[0] - 1) * (2 * old[1] - 1):
        raise ValueError(f"a bias table of {rows} rows is not one of window {old}; pass the window it was trained with")
    grid = table.float().T.reshape(1, heads, 2 * old[0] - 1, 2 * old[1] - 1)
    grid = F.interpolate(grid, size=(2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.contiguous().to(table.dtype)


def resize_grid(embedding: Tensor, old: Size, new: Size) -> Tensor:
    """Resize a position embedding `(1, h * w, C)` from grid `old` to grid `new`: bicubic."""
    if old == new:
        return embedding
    grid = embedding.unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(embedding.dtype)
