"""Splitting a feature map into groups of tokens and putting it together again: the only copy of this idea.

The order is always pad (right and bottom) -> shift (cyclic) -> split; merging undoes it. A map `(B, H, W, C)` becomes
groups `(B, G, N, C)` of `N = window_h * window_w` tokens each:

* windows: neighbouring tokens, Swin (arXiv 2103.14030);
* dilated groups: tokens `interval` apart inside blocks of `window * interval` tokens, CrossFormer (arXiv 2108.00154);
* grids: the widest interval, one block that spans the map, MaxViT (arXiv 2204.01697).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

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


class Chunk(NamedTuple):
    """Some groups of one kind with all heads, or some heads of one group: matrices `(N, D)`, one per group and head."""

    kind: int
    heads: slice
    matrices: slice  # of all groups * heads
    sources: Tensor  # (parts * matrices * N,) row of the map `(B * H * W * parts * heads, D)` for each row of the parts
    tokens: Tensor  # (real,) row of the map `(B * H * W, C)` for each token that is no padding
    run: slice | None  # the same rows, where they are one after the other: a window per image
    real: Tensor | None  # (real,) which tokens of the groups these are; None for all
    padding: tuple[Tensor, Tensor] | None  # rows of a part that hold padding, and their heads


class GroupOrder:
    """Token indices of one batch in group order, for paths that gather rows instead of permuting maps.

    Groups are sorted by kind, those that share a mask: in a shifted map all windows but those of the last row and
    column need none, and the others share three.

    Attributes:
        gather: `(B * G * N,)` row of the `(B * H * W, C)` map for each token; a padded token points at row 0.
        scatter: `(B * H * W,)` position in group order of every row of the map: its inverse.
        padding: positions in group order that hold padding, or None.
        unchanged: whether this is the order that the rows already have: one unshifted window per image.
        group_tokens: N.
        counts: number of groups of each kind, over the whole batch.
        mask: `(kinds, N, N)` scores to add per kind, or None if no kind needs one.
        masked: whether a kind needs one.
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
        self.group_tokens = groups.shape[1]
        mask = label_scores(labels)
        self.masked = mask.flatten(1).any(1).tolist()
        self.mask = mask if any(self.masked) else None
        self._chunks: dict[tuple[int, int, int], list[Chunk]] = {}

    @staticmethod
    def _batched(groups: Tensor, batch: int, tokens: int) -> Tensor:
        offset = torch.arange(batch)[:, None, None] * tokens
        return torch.where(groups >= 0, groups + offset, -1).flatten()

    def chunks(self, parts: int, heads: int, most: int) -> list[Chunk]:
        """All groups in (kept) chunks of at most `most` matrices of each part.

        The channels of a map are split into `parts` and `heads`, q, k and v of every head, say. They become outer
        dimensions, so that what a head needs of a group is one block of memory.
        """
        if (parts, heads, most) not in self._chunks:
            with torch.inference_mode(False), torch.device("cpu"):
                self._chunks[parts, heads, most] = list(self._cut(parts, heads, most))
        return self._chunks[parts, heads, most]

    def _cut(self, parts: int, heads: int, most: int) -> Iterator[Chunk]:
        padded = torch.zeros_like(self.gather, dtype=torch.bool)
        if self.padding is not None:
            padded[self.padding] = True
        start = 0
        for kind, count in enumerate(self.counts):
            for groups in _even_parts(start, count, max(1, most // heads)):
                for some in _even_parts(0, heads, max(1, most)):
                    yield self._chunk(kind, groups, some, parts, heads, padded)
            start += count

    def _chunk(self, kind: int, groups: slice, some: slice, parts: int, heads: int, padded: Tensor) -> Chunk:
        n, part, head = self.group_tokens, torch.arange(parts)[:, None, None, None], torch.arange(heads)[some, None]
        matrices = slice(groups.start * heads + some.start, (groups.stop - 1) * heads + some.stop)
        tokens, padded = (each[groups.start * n : groups.stop * n] for each in (self.gather, padded))
        sources = ((tokens.view(-1, 1, n) * parts + part) * heads + head).flatten()
        if int(sources.max()) < 2**31:  # a gather of short rows reads nearly as much of its index as of the rows
            sources = sources.int()
        if not padded.any():
            run = slice(int(tokens[0]), int(tokens[-1]) + 1) if bool((tokens.diff() == 1).all()) else None
            return Chunk(kind, some, matrices, sources, tokens, run, None, None)
        real = (~padded).nonzero().flatten()
        padding = padded.view(-1, 1, n).expand(-1, len(head), n).flatten().nonzero().flatten()
        return Chunk(
            kind, some, matrices, sources, tokens[real], None, real, (padding, head[padding // n % len(head), 0])
        )


def _even_parts(start: int, count: int, most: int) -> list[slice]:
    """`count` numbers from `start` on in as few parts of at most `most` as it takes, all nearly as long."""
    parts = -(-count // most)
    bounds = [start + count * part // max(1, parts) for part in range(parts + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]


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


def scatter_groups(rows: Tensor, order: GroupOrder, shape: tuple[int, int, int]) -> Tensor:
    """Rows in group order `(B * G * N, C)` -> the map `(B, H, W, C)`; padded tokens are dropped."""
    if order.unchanged:
        return rows.unflatten(0, shape)
    return _Reorder.apply(rows, order.scatter, order.gather, order.padding).unflatten(0, shape)


def read_chunk(x: Tensor, chunk: Chunk, out: Tensor, pad: Tensor | None = None) -> None:
    """Gather the matrices of a chunk, `(parts, matrices, N, D)`, from a map `(B * H * W * parts * heads, D)`.

    Padded tokens get `pad` `(parts, heads, D)` or zeros.
    """
    rows = out.view(-1, out.shape[-1])
    torch.index_select(x, 0, chunk.sources, out=rows)
    if chunk.padding is not None:
        padding, head = chunk.padding
        rows.view(len(out), -1, out.shape[-1])[:, padding] = 0 if pad is None else pad[:, head]


def write_chunk(x: Tensor, chunk: Chunk, out: Tensor, room: Tensor) -> None:
    """Undo `read_chunk`: from `(parts, matrices, N, D)` into a map `(B * H * W, parts, heads, D)`, without padding.

    `room` holds as much as the chunk, in the dtype of the map.
    """
    parts, _, n, dim = x.shape
    heads = chunk.heads.stop - chunk.heads.start
    by_token = x.view(parts, -1, heads, n, dim).permute(1, 3, 0, 2, 4)
    if chunk.run is not None and heads == out.shape[2]:
        out[chunk.run].view(by_token.shape).copy_(by_token)
        return
    rows = room.view(by_token.shape).copy_(by_token).view(-1, parts, heads, dim)
    if chunk.real is not None:
        rows = rows.index_select(0, chunk.real)
    if heads == out.shape[2]:
        _in_long_words(out.flatten(1)).index_copy_(0, chunk.tokens, _in_long_words(rows.flatten(1)))
    else:
        out[:, :, chunk.heads].index_copy_(0, chunk.tokens, rows)


def _in_long_words(x: Tensor) -> Tensor:
    """The same bytes as fewer, longer numbers: a copy by index goes number by number."""
    return x.view(torch.complex128) if x.shape[-1] * x.element_size() % 16 == 0 else x
