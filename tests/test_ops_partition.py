"""Splitting maps into groups and back, against definitions by coordinates."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import relative, run, worst
from striate.ops import partition
from striate.ops.partition import (
    gather_groups,
    group_order,
    merge,
    pad_map,
    padded_size,
    scatter_groups,
    split,
    to_size,
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


@pytest.mark.parametrize("size", [(7, 9), (6, 8), (2, 3)])
@pytest.mark.parametrize(
    ("shift", "interval"), [((0, 0), (1, 1)), ((1, 2), (1, 1)), ((0, 2), (1, 1)), ((0, 0), (2, 3))]
)
@pytest.mark.parametrize("padded_value", [True, False])
def test_gathering_equals_pad_and_split_with_gradients(size, shift, interval, padded_value) -> None:
    """Groups are compared after sorting them by their sums: those of one kind come one after the other."""
    window, batch = (3, 4), 2
    block = partition.block_size(window, interval)
    order = group_order(batch, size, window, shift, interval)
    x = torch.randn(batch, *size, 5, dtype=torch.float64)
    pad = torch.randn(5, dtype=torch.float64) if padded_value else None

    def mix(groups: torch.Tensor) -> torch.Tensor:
        return groups * groups.mean(-2, keepdim=True)

    def gathered(x: torch.Tensor, pad: torch.Tensor | None) -> torch.Tensor:
        rows = mix(gather_groups(x, order, pad).view(-1, 12, 5)).flatten(0, 1)
        return scatter_groups(rows, order, (batch, *size))

    def composed(x: torch.Tensor, pad: torch.Tensor | None) -> torch.Tensor:
        groups = mix(split(pad_map(x, block, pad), window, shift, interval))
        return merge(groups, padded_size(size, block), window, shift, interval)[:, : size[0], : size[1]]

    rows = gather_groups(x, order, pad).view(-1, 12, 5)
    groups = split(pad_map(x, block, pad), window, shift, interval).flatten(0, 1)
    assert rows.shape == groups.shape
    assert torch.equal(rows[rows.sum((1, 2)).argsort()], groups[groups.sum((1, 2)).argsort()])
    assert worst(run(gathered, [x, pad]), run(composed, [x, pad])) < 1e-14


def test_masks_of_window_kinds_are_those_of_their_windows() -> None:
    window, shift, size = (3, 4), (1, 2), (7, 9)
    order = group_order(1, size, window, shift)
    mask = partition.group_mask(size, window, shift)
    assert sum(order.counts) == mask.shape[0]
    spread = torch.cat([m.expand(n, -1, -1) for m, n in zip(order.mask, order.counts, strict=True)])
    first = torch.arange(63.0).view(1, 7, 9, 1)
    by_kind = gather_groups(first, order, torch.tensor([-1.0])).view(-1, 12)
    by_place = split(pad_map(first, window, torch.tensor([-1.0])), window, shift)[0, :, :, 0]
    for tokens, scores in zip(by_kind, spread, strict=True):
        place = (by_place == tokens).all(-1).nonzero().item()
        assert torch.equal(scores, mask[place])


def test_tables_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        order = group_order(3, (5, 11), (3, 4), (1, 2))
    assert not order.gather.is_inference()
    assert not order.mask.is_inference()
    x = torch.randn(3, 5, 11, 2, requires_grad=True)
    scatter_groups(gather_groups(x, order), order, (3, 5, 11)).sum().backward()
    assert relative(x.grad, torch.ones_like(x)) == 0


@pytest.mark.parametrize("value", [0, -7, (7,), (7, 7, 7), (7, 0), (3.5, 2), "7"])
def test_sizes_are_checked(value) -> None:
    with pytest.raises(ValueError, match=r"window=.*give a positive integer or two of them \(height, width\)"):
        to_size(value, "window")


def test_sizes_are_pairs() -> None:
    assert to_size(7, "window") == to_size([7, 7], "window") == (7, 7)
