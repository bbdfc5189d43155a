"""The definition of window attention (Swin, arXiv 2103.14030 and 2111.09883), on dilated groups too."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..partition import Size, block_size, crop, group_mask, merge, pad_map, padded_size, split
from ..position import expand_bias


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    scale: float | Tensor,
    cosine: bool,
    pad: Tensor | None,
) -> Tensor:
    """See `striate.ops.window_attention`."""
    _, h, w, _ = qkv.shape
    block = block_size(window, interval)
    padded = padded_size((h, w), block)
    groups = split(pad_map(qkv, block, pad), window, shift, interval)
    q, k, v = groups.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    if cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scores = (q * (scale.view(-1, 1, 1).to(q.dtype) if isinstance(scale, Tensor) else scale)) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + expand_bias(bias, window).to(scores.dtype)
    if shift != (0, 0) or mask_padding:
        mask = group_mask((h, w), window, shift, interval, mask_padding, qkv.device)
        scores = scores + mask[:, None].to(scores.dtype)
    out = (scores.softmax(-1).to(v.dtype) @ v).transpose(2, 3).flatten(3)
    return crop(merge(out, padded, window, shift, interval), (h, w))
