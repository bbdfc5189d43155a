"""Splitting maps into groups and back, against definitions by coordinates."""

from __future__ import annotations

import itertools

import pytest
import torch

from striate.ops import partition
from striate.ops.partition import (
    group_order,
    merge,
    pad_map,
    padded_size,
    read_chunk,
    scatter_groups,
    split,
    to_size,
    write_chunk,
)

CASES = [
    pytest.param((6, 8), (3, 4), (0, 0), (1, 1), id="windows"),
    pytest.param((6, 8), (3, 4), (1, 2), (1, 1), id="shifted"),
    pytest.param((6, 8), (3, 4), (0, 2), (1, 1), id="shifted-one-axis"),
    pytest.param((6, 8), (3, 2), (0, 0), (2, 4), id="grid"),
    pytest.param((12, 12), (3, 2), (0, 0), (2, 3), id="dilated"),
    pytest.param((3, 4), (3, 4), (1, 2), (1, 1), id="single-window"),
]


def coordinates(size: tuple[int, int]) -> torch.Tensor:
    """A map whose tokens hold their own row and column: `(1, H, W, 2)`."""
    rows, cols = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack((rows, cols), -1)[None].double()


@pytest.mark.parametrize(("size", "window", "shift", "interval"), CASES)
def test_split_puts_every_token_where_the_definition_says(size, window, shift, interval) -> None:
    groups = split(coordinates(size), window, shift, interval)[0]
    blocks_y, blocks_x = size[0] // (window[0] * interval[0]), size[1] // (window[1] * interval[1])
    numbers = itertools.product(range(blocks_y), range(interval[0]), range(blocks_x), range(interval[1]))
    for g, (by, iy, bx, ix) in enumerate(numbers):
        for n in range(window[0] * window[1]):
            ny, nx = divmod(n, window[1])
            y, x = (by * window[0] + ny) * interval[0] + iy, (bx * window[1] + nx) * interval[1] + ix
            assert groups[g, n].tolist() == [(y + shift[0]) % size[0], (x + shift[1]) % size[1]]


@pytest.mark.parametrize(("size", "window", "shift", "interval"), CASES)
def test_merge_undoes_split(size, window, shift, interval) -> None:
    x = torch.randn(2, *size, 5)
    assert torch.equal(merge(split(x, window, shift, interval), size, window, shift, interval), x)


def test_padding_goes_right_and_bottom_and_holds_the_value() -> None:
    x, value = torch.randn(2, 4, 5, 3), torch.randn(3)
    padded = pad_map(x, (3, 4), value)
    assert padded.shape == (2, 6, 8, 3) == (2, *padded_size((4, 5), (3, 4)), 3)
    assert torch.equal(padded[:, :4, :5], x)
    assert (padded[:, 4:] == value).all()
    assert (padded[:, :, 5:] == value).all()
    assert (pad_map(x, (3, 4))[:, 4:] == 0).all()


def test_a_map_that_fits_is_not_copied() -> None:
    x = torch.randn(1, 6, 8, 3)
    assert pad_map(x, (3, 4), torch.ones(3)) is x


@pytest.mark.parametrize("size", [(7, 9), (6, 8), (2, 3), (3, 9), (7, 4)])
@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (0, 2), (1, 0)])
def test_mask_separates_exactly_the_tokens_that_the_roll_brought_together(size, shift) -> None:
    window = (3, 4)
    padded = padded_size(size, window)
    mask = partition.group_mask(size, window, shift)
    origin = split(coordinates(padded), window, shift)[0]
    wrapped = torch.stack((origin[..., 0] < shift[0], origin[..., 1] < shift[1]), -1)
    apart = (wrapped[:, :, None] != wrapped[:, None, :]).any(-1)
    assert torch.equal(mask, torch.where(apart, -100.0, 0.0))
    assert apart.any() == (shift != (0, 0))


def read_all(x: torch.Tensor, chunks: list[partition.Chunk], heads: int, pad: torch.Tensor | None) -> torch.Tensor:
    """All matrices of a map of three parts, `(3, groups * heads, N, D)`, which nothing but the chunks may fill."""
    dim, n = x.shape[-1] // (3 * heads), len(chunks[0].sources) // (3 * _length(chunks[0]))
    out = torch.full((3, chunks[-1].matrices.stop, n, dim), float("nan"), dtype=x.dtype)
    by_part = None if pad is None else pad.view(3, heads, dim)
    for chunk in chunks:
        some = torch.empty(3, _length(chunk), n, dim, dtype=x.dtype)
        read_chunk(x.reshape(-1, dim), chunk, some, by_part)
        out[:, chunk.matrices] = some
    return out


def _length(chunk: partition.Chunk) -> int:
    return chunk.matrices.stop - chunk.matrices.start


@pytest.mark.parametrize("size", [(7, 9), (6, 8), (2, 3), (3, 4)])
@pytest.mark.parametrize(
    ("shift", "interval"), [((0, 0), (1, 1)), ((1, 2), (1, 1)), ((0, 2), (1, 1)), ((0, 0), (2, 3))]
)
@pytest.mark.parametrize("most", [1, 3, 9, 1000])
def test_chunks_are_parts_and_heads_of_the_padded_and_split_map(size, shift, interval, most) -> None:
    """Groups are compared after sorting them by their sums: those of one kind come one after the other."""
    window, batch, heads = (3, 4), 2, 4
    block = partition.block_size(window, interval)
    order = group_order(batch, size, window, shift, interval)
    chunks = order.chunks(3, heads, most)
    assert max(map(_length, chunks)) <= most
    x = torch.randn(batch, *size, 3 * heads * 5, dtype=torch.float64)
    for pad in (torch.randn(3 * heads * 5, dtype=torch.float64), None):
        matrices = read_all(x, chunks, heads, pad)
        by_group = matrices.unflatten(1, (-1, heads)).permute(1, 3, 0, 2, 4).flatten(2)
        groups = split(pad_map(x, block, pad), window, shift, interval).flatten(0, 1)
        assert torch.equal(by_group[by_group.sum((1, 2)).argsort()], groups[groups.sum((1, 2)).argsort()])

    back = torch.full((batch * size[0] * size[1], 3, heads, 5), float("nan"), dtype=x.dtype)
    for chunk in chunks:
        some = matrices[:, chunk.matrices]
        write_chunk(some.contiguous(), chunk, back, torch.empty_like(some))
    assert torch.equal(back.view_as(x), x)


def test_heads_and_kinds_of_chunks() -> None:
    order = group_order(2, (8, 9), (4, 4), (1, 2))
    for most, count in ((1, 36), (2, 24), (3, 12), (7, 6), (11, 6), (12, 4)):  # 4, 2, 4 and 2 groups of 3 heads
        chunks = order.chunks(1, 3, most)
        assert len(chunks) == count
        matrices = [(m // 3, m % 3) for m in range(sum(order.counts) * 3)]
        ends = torch.tensor(order.counts).cumsum(0)
        for chunk in chunks:
            groups, heads = (sorted(set(numbers)) for numbers in zip(*matrices[chunk.matrices], strict=True))
            assert heads == list(range(3))[chunk.heads]
            assert {int(torch.searchsorted(ends, group, right=True)) for group in groups} == {chunk.kind}
        assert [m for chunk in chunks for m in matrices[chunk.matrices]] == matrices


@pytest.mark.parametrize("size", [(7, 9), (6, 8), (3, 4)])
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_scattering_undoes_group_order_with_gradients(size, shift) -> None:
    order = group_order(2, size, (3, 4), shift)
    x = torch.randn(2, *size, 5)
    rows = x.flatten(0, 2)[order.gather].requires_grad_()
    assert torch.equal(scatter_groups(rows, order, (2, *size)), x)
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad(scatter_groups(rows, order, (2, *size)), rows, weight)
    want = weight.flatten(0, 2)[order.gather]
    if order.padding is not None:
        want[order.padding] = 0
    assert torch.equal(grad, want)


def test_masks_of_window_kinds_are_those_of_their_windows() -> None:
    window, shift, size = (3, 4), (1, 2), (7, 9)
    order = group_order(1, size, window, shift)
    mask = partition.group_mask(size, window, shift)
    assert sum(order.counts) == mask.shape[0]
    assert order.masked == order.mask.flatten(1).any(1).tolist()
    assert len(set(order.masked)) == 2
    spread = torch.cat([m.expand(n, -1, -1) for m, n in zip(order.mask, order.counts, strict=True)])
    first = torch.arange(63.0).index_select(0, order.gather)
    by_kind = first.index_fill(0, order.padding, -1.0).view(-1, 12)
    by_place = split(pad_map(torch.arange(63.0).view(1, 7, 9, 1), window, torch.tensor([-1.0])), window, shift)
    for tokens, scores in zip(by_kind, spread, strict=True):
        place = (by_place[0, :, :, 0] == tokens).all(-1).nonzero().item()
        assert torch.equal(scores, mask[place])


def test_tables_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode(), torch.device("meta"):
        order = group_order(3, (5, 11), (3, 4), (1, 2))
        chunks = order.chunks(1, 2, 3)
    for table in (order.gather, order.mask, *(chunk.sources for chunk in chunks)):
        assert not table.is_inference()
        assert table.device.type == "cpu"
    x = torch.randn(len(order.gather), 2, requires_grad=True)
    scatter_groups(x, order, (3, 5, 11)).sum().backward()
    real = torch.ones(len(order.gather)).index_fill(0, order.padding, 0.0)
    assert torch.equal(x.grad, real[:, None].expand(-1, 2))


@pytest.mark.parametrize("value", [0, -7, (7,), (7, 7, 7), (7, 0), (3.5, 2), "7"])
def test_sizes_are_checked(value) -> None:
    with pytest.raises(ValueError, match=r"window=.*give a positive integer or two of them \(height, width\)"):
        to_size(value, "window")


def test_sizes_are_pairs() -> None:
    assert to_size(7, "window") == to_size([7, 7], "window") == (7, 7)
