"""Attention inside windows or grids of a feature map."""

from __future__ import annotations

from torch import Tensor

from .. import _backend
from ..partition import grid_interval, to_size
from . import cpu, reference, triton

_PATHS = {"reference": reference, "cpu": cpu, "triton": triton}


def window_attention(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    grid: bool = False,
    interval: int | tuple[int, int] = 1,
    scale: float | Tensor | None = None,
    cosine: bool = False,
    pad: Tensor | None = None,
    mask_padding: bool = False,
) -> Tensor:
    """Multi-head attention within the windows, dilated groups or grids of a map of any height and width.

    The map is padded on the right and bottom to multiples of the window (times `interval`), then shifted cyclically,
    then split; tokens that only the shift has brought together are masked with -100; the padding is cut off at the
    end. Padded tokens take part in the attention unless they are masked.

    Args:
        qkv: `(B, H, W, 3 * C)`, channels ordered q, k, v and within each by head.
        bias: relative position bias `((2 * window_h - 1) * (2 * window_w - 1), num_heads)`, or None.
        num_heads: heads; divides C.
        window: tokens per window, one number or (height, width).
        shift: cyclic shift, smaller than the window; 0 for none.
        interval: distance between the tokens of a group, one number or (height, width); 1 for windows of neighbours.
        grid: groups of tokens spaced evenly over the whole map (MaxViT), whatever its size.
        scale: factor of the scores, a number or `(num_heads,)`; default `(C / num_heads) ** -0.5`, or 1 with `cosine`.
        cosine: normalise queries and keys (Swin v2).
        pad: `(3 * C,)` q, k, v of padded tokens; default zeros. A projection with a bias gives its bias here.
        mask_padding: add -1e6 to the scores of padded keys (CrossFormer).

    Returns:
        `(B, H, W, C)` in the dtype of `qkv`.

    Raises:
        ValueError: if shapes do not fit together.
    """
    size, steps = to_size(window, "window"), to_size(interval, "interval")
    offset = (shift, shift) if isinstance(shift, int) else shift
    _check(qkv, bias, num_heads, size, offset, grid, steps, pad)
    if grid:
        steps = grid_interval((qkv.shape[1], qkv.shape[2]), size)
    if scale is None:
        scale = 1.0 if cosine else (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    arguments = (qkv, bias, num_heads, size, offset, steps, mask_padding, scale, cosine, pad)
    path = _backend.choose("window_attention", qkv, lambda: triton.obstacle(*arguments))
    return _PATHS[path].window_attention(*arguments)


def _check(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, ...],
    grid: bool,
    interval: tuple[int, int],
    pad: Tensor | None,
) -> None:
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv {tuple(qkv.shape)} must be (B, H, W, 3 * C) with C a multiple of num_heads={num_heads}")
    if len(shift) != 2 or not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift={shift} must be at least 0 and smaller than window={window}")
    if grid and interval != (1, 1):
        raise ValueError(f"interval={interval} with grid=True: a grid chooses the interval that spans the map")
    if shift != (0, 0) and (grid or interval != (1, 1)):
        raise ValueError(f"shift={shift} with grid={grid}, interval={interval}: only windows of neighbours shift")
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    if bias is not None and bias.shape != (rows, num_heads):
        raise ValueError(
            f"bias {tuple(bias.shape)} must be ({rows}, {num_heads}) for window {window}: resize the table"
        )
    if pad is not None and pad.shape != qkv.shape[-1:]:
        raise ValueError(f"pad {tuple(pad.shape)} must be ({qkv.shape[-1]},), the q, k, v of one padded token")
