"""Position biases, against their formulas written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import relative
from striate.ops.position import expand_bias, log_coordinates, relative_index, resize_bias_table

WINDOWS = [(7, 7), (2, 3), (3, 1), (1, 1)]


@pytest.mark.parametrize("window", WINDOWS)
def test_index_is_the_offset_query_minus_key_row_by_row(window) -> None:
    index = relative_index(window)
    h, w = window
    for query in range(h * w):
        for key in range(h * w):
            dy, dx = query // w - key // w, query % w - key % w
            assert index[query, key] == (dy + h - 1) * (2 * w - 1) + dx + w - 1
    assert index.max() == (2 * h - 1) * (2 * w - 1) - 1
    assert index.min() == 0


@pytest.mark.parametrize("window", WINDOWS)
def test_expanded_bias_reads_the_table_through_the_index(window) -> None:
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 5)
    bias = expand_bias(table, window)
    assert torch.equal(bias, table[relative_index(window)].permute(2, 0, 1))
    assert torch.equal(expand_bias(table, window, relative_index(window)), bias)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pretrained", [None, (12, 6)])
def test_log_coordinates(window, pretrained) -> None:
    got = log_coordinates(window, pretrained)
    divisor = [max(size - 1, 1) for size in pretrained or window]
    want = []
    for dy in range(1 - window[0], window[0]):
        for dx in range(1 - window[1], window[1]):
            scaled = [8 * d / s for d, s in zip((dy, dx), divisor, strict=True)]
            want.append([math.copysign(math.log2(abs(v) + 1) / 3, v) for v in scaled])
    assert relative(got, torch.tensor(want)) < 1e-6 or got.abs().max() == 0 == torch.tensor(want).abs().max()


def test_log_coordinates_reach_from_minus_to_plus_log_of_nine() -> None:
    table = log_coordinates((8, 8))
    edge = math.log2(9) / 3
    assert table[0].tolist() == pytest.approx([-edge, -edge])
    assert table[-1].tolist() == pytest.approx([edge, edge])


def test_resizing_to_the_same_window_changes_nothing() -> None:
    table = torch.randn(169, 3)
    assert relative(resize_bias_table(table, (7, 7), (7, 7)), table) < 1e-6


@pytest.mark.parametrize("new", [(12, 12), (5, 9)])
def test_resizing_keeps_constants_and_the_middle(new) -> None:
    ramp = torch.arange(13.0)[:, None] + 100 * torch.arange(13.0)[None, :]
    table = torch.stack((ramp.flatten(), torch.ones(169)), 1)
    resized = resize_bias_table(table, (7, 7), new)
    rows, cols = 2 * new[0] - 1, 2 * new[1] - 1
    assert resized.shape == (rows * cols, 2)
    assert relative(resized[:, 1], torch.ones(rows * cols)) < 1e-6
    assert resized[rows * cols // 2, 0].item() == pytest.approx(606, rel=1e-5)  # offset (0, 0) stays offset (0, 0)


def test_resizing_keeps_the_dtype() -> None:
    assert resize_bias_table(torch.randn(169, 3).half(), (7, 7), (8, 8)).dtype == torch.half


def test_resizing_names_a_table_that_is_not_of_the_window() -> None:
    with pytest.raises(
        ValueError, match=r"170 rows is not one of window \(7, 7\); pass the window it was trained with"
    ):
        resize_bias_table(torch.randn(170, 3), (7, 7), (8, 8))
