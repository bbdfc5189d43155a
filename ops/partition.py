"""Splitting a feature map into groups of tokens and putting it together again: the only copy of this idea.

The order is always pad (right and bottom) -> shift (cyclic) -> split; merging undoes it. A map `(B, H, W, C)` becomes
groups `(B, G, N, C)` of `N = window_h * window_w` tokens each:

* windows: neighbouring tokens, Swin (arXiv 2103.14030);
* dilated groups: tokens `interval` apart inside blocks of `window * interval` tokens, CrossFormer (arXiv 2108.00154);
* grids: the widest interval, one block that spans the map, MaxViT (arXiv 2204.01697).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

MASKED = -100.0  # added to the scores of tokens that only the cyclic shift has brought together, as published
PADDED = -1e6  # added to the scores of padded keys where these are masked: finite, as published, for groups of padding


def to_size(value: int | tuple[int, ...] | list[int], name: str) -> Size:
    """Turn `7` or `(7, 9)` into a pair of positive integers.

    Raises:
        ValueError: if it is neither.
    """
    pair: Any = (value, value) if hasattr(value, "__index__") else tuple(value)
    if len(pair) != 2 or not all(hasattr(v, "__index__") and v > 0 for v in pair):  # an exported size is a symbol
        raise ValueError(f"{name}={value!r}; give a positive integer or two of them (height, width)")
    return pair


def padded_size(size: Size, window: Size) -> Size:
    """The smallest multiples of `window` that hold `size`."""
    # written as multiples of the window, which symbolic sizes can divide by it again
    return -(-size[0] // window[0]) * window[0], -(-size[1] // window[1]) * window[1]


def pad_map(x: Tensor, window: Size, value: Tensor | None = None) -> Tensor:
    """Pad `(B, H, W, C)` on the right and bottom to multiples of `window` with `value` `(C,)`, or zeros."""
    _, h, w, _ = x.shape
    ph, pw = padded_size((h, w), window)
    tracing = torch.compiler.is_compiling()  # a traced size may be any: no branch, and no tensor of zero rows
    if not tracing and (ph, pw) == (h, w):
        return x
    if value is not None and not tracing:
        return _extend(_extend(x, 2, pw - w, value.to(x.dtype)), 1, ph - h, value.to(x.dtype))
    padded = F.pad(x, (0, 0, 0, pw - w, 0, ph - h))
    if value is None:
        return padded
    rows, cols = torch.arange(ph, device=x.device), torch.arange(pw, device=x.device)
    return torch.where(((rows < h)[:, None] & (cols < w))[..., None], padded, value.to(x.dtype))


def _extend(x: Tensor, dim: int, count: int, value: Tensor) -> Tensor:
    """Append `count` rows or columns that hold `value`: by joining, since torch.func cannot write into a slice."""
    return torch.cat((x, value.expand(*x.shape[:dim], count, *x.shape[dim + 1 :])), dim) if count else x


def crop(x: Tensor, size: Size) -> Tensor:
    """Undo padding: the first `size` rows and columns of `(B, H, W, C)`."""
    if not torch.compiler.is_compiling():
        return x[:, : size[0], : size[1]]
    # a slice is contiguous or not depending on the size, and a traced graph would serve one of the two cases only
    rows, cols = (torch.arange(length, device=x.device) for length in size)
    return x.index_select(1, rows).index_select(2, cols)


def grid_interval(size: Size, window: Size) -> Size:
    """The interval at which one block of groups of `window` tokens spans a map of `size`."""
    return (size[0] + window[0] - 1) // window[0], (size[1] + window[1] - 1) // window[1]


def block_size(window: Size, interval: Size) -> Size:
    """Tokens per side of the block that groups of `window` tokens at `interval` fill."""
    return window[0] * interval[0], window[1] * interval[1]


def split(x: Tensor, window: Size, shift: Size = (0, 0), interval: Size = (1, 1)) -> Tensor:
    """Split `(B, H, W, C)`, H and W multiples of the block, into `(B, G, N, C)`."""
    b, h, w, c = x.shape
    (wh, ww), (ih, iw) = window, interval
    if shift != (0, 0):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    rows, cols = h // (wh * ih), w // (ww * iw)
    x = x.reshape(b, rows, wh, ih, cols, ww, iw, c).permute(0, 1, 3, 4, 6, 2, 5, 7)
    return x.reshape(b, rows * ih * cols * iw, wh * ww, c)


def merge(groups: Tensor, size: Size, window: Size, shift: Size = (0, 0), interval: Size = (1, 1)) -> Tensor:
    """Undo `split` for a padded map of `size`: `(B, G, N, C)` -> `(B, H, W, C)`."""
    b, c = groups.shape[0], groups.shape[-1]
    (h, w), (wh, ww), (ih, iw) = size, window, interval
    x = groups.reshape(b, h // (wh * ih), ih, w // (ww * iw), iw, wh, ww, c)
    x = x.permute(0, 1, 5, 2, 3, 6, 4, 7).reshape(b, h, w, c)
    return x.roll(shift, (1, 2)) if shift != (0, 0) else x


def group_labels(
    size: Size, window: Size, shift: Size, interval: Size, mask_padding: bool, device: torch.device | None = None
) -> Tensor:
    """What decides the mask of a group: for every token of a map of `size` padded to whole blocks, `(G, N)` int64.

    Odd labels are padding that is masked; labels whose halves differ lie on different sides of the seam of a shift.
    """
    h, w = padded_size(size, block_size(window, interval))
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    labels = (_sides(y, h, window[0], shift[0])[:, None] * 3 + _sides(x, w, window[1], shift[1])) * 2
    if mask_padding:
        padding = (y >= size[0])[:, None] | (x >= size[1])
        labels = labels + padding.roll((-shift[0], -shift[1]), (0, 1))
    return split(labels[None, :, :, None], window, (0, 0), interval)[0, :, :, 0]


def _sides(position: Tensor, length: int, window: int, shift: int) -> Tensor:
    """Along one shifted axis: 0 inside, 1 before the seam in the last window, 2 wrapped around."""
    return (position >= length - window).long() + (position >= length - shift) if shift else position * 0


def label_scores(labels: Tensor) -> Tensor:
    """Scores to add in groups with these labels `(…, N)`: `(…, N, N)` float32, rows are queries."""
    seam = (labels[..., :, None] // 2 != labels[..., None, :] // 2) * MASKED
    return seam + (labels[..., None, :] % 2) * PADDED


def group_mask(
    size: Size,
    window: Size,
    shift: Size,
    interval: Size = (1, 1),
    mask_padding: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Scores to add in every group of a map of `size`: `(G, N, N)` float32, rows are queries."""
    return label_scores(group_labels(size, window, shift, interval, mask_padding, device))


class GroupOrder:
    """Token indices of one batch in group order, for paths that gather rows instead of permuting maps.

    Groups are sorted by kind, those that share a mask: in a shifted map all windows but those of the last row and
    column need none, and the others share three. Every kind is one attention call with one `(N, N)` mask.

    Attributes:
        gather: `(B * G * N,)` row of the `(B * H * W, C)` map for each token; a padded token points at row 0.
        scatter: `(B * H * W,)` position in group order of every row of the map: its inverse.
        padding: positions in group order that hold padding, or None.
        unchanged: whether this is the order that the rows already have: one unshifted window per image.
        counts: number of groups of each kind, over the whole batch.
        mask: `(kinds, N, N)` scores to add per kind, or None if no kind needs one.
    """

    def __init__(self, batch: int, size: Size, window: Size, shift: Size, interval: Size, mask_padding: bool) -> None:
        h, w = size
        tokens = torch.full(padded_size(size, block_size(window, interval)), -1)
        tokens[:h, :w] = torch.arange(h * w).view(h, w)
        groups = split(tokens[None, :, :, None], window, shift, interval)[0, :, :, 0]
        labels, kind_of_group = group_labels(size, window, shift, interval, mask_padding).unique(
            dim=0, return_inverse=True
        )
        kinds = [groups[kind_of_group == kind] for kind in range(labels.shape[0])]
        order = torch.cat([self._batched(kind, batch, h * w) for kind in kinds])
        padding = (order < 0).nonzero().flatten()
        self.padding = padding if padding.numel() else None
        self.gather = order.clamp_min(0)
        self.unchanged = torch.equal(order, torch.arange(batch * h * w))
        self.scatter = torch.empty(batch * h * w, dtype=torch.long)
        real = (order >= 0).nonzero().flatten()
        self.scatter[order[real]] = real
        self.counts = [batch * kind.shape[0] for kind in kinds]
        mask = label_scores(labels)
        self.mask = mask if mask.any() else None

    @staticmethod
    def _batched(groups: Tensor, batch: int, tokens: int) -> Tensor:
        offset = torch.arange(batch)[:, None, None] * tokens
        return torch.where(groups >= 0, groups + offset, -1).flatten()


@functools.lru_cache(maxsize=64)
def group_order(
    batch: int,
    size: Size,
    window: Size,
    shift: Size = (0, 0),
    interval: Size = (1, 1),
    mask_padding: bool = False,
) -> GroupOrder:
    """The (cached) `GroupOrder` of a batch of maps; tables live on the CPU."""
    with torch.inference_mode(False), torch.device("cpu"):  # a table born in inference mode could not serve training
        return GroupOrder(batch, size, window, shift, interval, mask_padding)


class _Reorder(torch.autograd.Function):
    """Rows by index, with the inverse order as the gradient instead of a scattered sum."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse, padding)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        inverse, padding = ctx.saved_tensors
        rows = grad.contiguous().index_select(0, inverse)
        return rows if padding is None else rows.index_fill_(0, padding, 0.0), None, None, None


def gather_groups(x: Tensor, order: GroupOrder, pad: Tensor | None = None) -> Tensor:
    """Rows `(B * G * N, C)` of the map `(B, H, W, C)` in group order; padded tokens hold `pad` `(C,)` or zeros."""
    if order.unchanged:
        return x.flatten(0, 2)
    rows = _Reorder.apply(x.flatten(0, 2), order.gather, order.scatter, None)
    if order.padding is None:
        return rows
    fill = x.new_zeros(1, x.shape[-1]) if pad is None else pad.to(x.dtype)[None]
    return rows.index_copy(0, order.padding, fill.expand(order.padding.numel(), -1))


def scatter_groups(rows: Tensor, order: GroupOrder, shape: tuple[int, int, int]) -> Tensor:
    """Undo `gather_groups`: rows in group order -> the map `(B, H, W, C)`; padded tokens are dropped."""
    if order.unchanged:
        return rows.unflatten(0, shape)
    return _Reorder.apply(rows, order.scatter, order.gather, order.padding).unflatten(0, shape)
