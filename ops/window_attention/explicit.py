"""What the Triton kernels compute in plain PyTorch, for tensors on a CPU.

An operator that PyTorch does not see into must not use autograd, so the backward is written out. Exported graphs of GPU
models run here when they are loaded on a machine without one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..partition import Size, block_size, crop, group_mask, merge, pad_map, padded_size, split
from ..position import expand_bias, relative_index


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    factor: float,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """See `triton.launch_forward`."""
    size = qkv.shape[1], qkv.shape[2]
    q, k, v = _split(qkv, pad, num_heads, window, shift, interval).unbind(3)
    if cosine:
        q, k = q * _inverse_norm(q), k * _inverse_norm(k)
    scores = _scores(q, k, bias, _factors(scale, factor), size, window, shift, interval, mask_padding)
    lse = scores.logsumexp(-1)
    groups = ((scores - lse[..., None]).exp() @ v).transpose(2, 3).flatten(3)
    out = crop(merge(groups, padded_size(size, block_size(window, interval)), window, shift, interval), size)
    return out.to(qkv.dtype).contiguous(), lse.flatten(0, 1)


def backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    factor: float,
    num_heads: int,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
    cosine: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `triton.launch_backward`."""
    size = qkv.shape[1], qkv.shape[2]
    q, k, v = _split(qkv, pad, num_heads, window, shift, interval).unbind(3)
    if cosine:
        inverse_q, inverse_k = _inverse_norm(q), _inverse_norm(k)
        q, k = q * inverse_q, k * inverse_k
    factors = _factors(scale, factor)
    scores = _scores(q, k, bias, factors, size, window, shift, interval, mask_padding)
    do = _groups(grad, window, shift, interval).unflatten(-1, (num_heads, -1)).transpose(2, 3)
    prob = (scores - lse.view(scores.shape[:-1])[..., None]).exp()
    dprob = do @ v.transpose(-2, -1)
    dscores = prob * (dprob - (prob * dprob).sum(-1, keepdim=True))
    dq, dk = dscores @ k, dscores.transpose(-2, -1) @ q
    grad_scale = (dq * q).sum((0, 1, 3, 4))
    dq, dk = dq * factors, dk * factors
    if cosine:
        dq, dk = (
            (dq - q * (dq * q).sum(-1, keepdim=True)) * inverse_q,
            (dk - k * (dk * k).sum(-1, keepdim=True)) * inverse_k,
        )
    groups = torch.stack((dq, dk, prob.transpose(-2, -1) @ do), 3).permute(0, 1, 4, 3, 2, 5).flatten(3)
    full = merge(groups, padded_size(size, block_size(window, interval)), window, shift, interval)
    grad_qkv = crop(full, size)
    results = [grad_qkv.to(qkv.dtype).contiguous(), *(qkv.new_empty(0) for _ in range(3))]
    if wanted[0] and bias is not None:
        table = torch.zeros(bias.shape, dtype=torch.float32).t()
        table = table.index_add(1, relative_index(window).flatten(), dscores.sum((0, 1)).flatten(1))
        results[1] = table.t().to(bias.dtype).contiguous()
    if wanted[1] and pad is not None:
        outside = torch.ones(full.shape[1:3])
        outside[: size[0], : size[1]] = 0
        results[2] = torch.einsum("bhwc,hw->c", full, outside).to(pad.dtype)
    if wanted[2] and scale is not None:
        results[3] = grad_scale.to(scale.dtype)
    return results[0], results[1], results[2], results[3]


def _groups(x: Tensor, window: Size, shift: Size, interval: Size, pad: Tensor | None = None) -> Tensor:
    """`(B, G, N, C)` float32 of a map `(B, H, W, C)`."""
    return split(pad_map(x, block_size(window, interval), pad), window, shift, interval).float()


def _split(qkv: Tensor, pad: Tensor | None, num_heads: int, window: Size, shift: Size, interval: Size) -> Tensor:
    """`(B, G, heads, 3, N, D)` float32."""
    groups = _groups(qkv, window, shift, interval, pad)
    return groups.unflatten(-1, (3, num_heads, -1)).permute(0, 1, 4, 3, 2, 5)


def _inverse_norm(x: Tensor) -> Tensor:
    return 1 / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _factors(scale: Tensor | None, factor: float) -> Tensor:
    """Factors of the scores that broadcast to `(B, G, heads, N, N)`."""
    return torch.tensor(factor) if scale is None else scale.float()[:, None, None]


def _scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    factors: Tensor,
    size: Size,
    window: Size,
    shift: Size,
    interval: Size,
    mask_padding: bool,
) -> Tensor:
    """`(B, G, heads, N, N)` float32."""
    scores = (q * factors) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + expand_bias(bias.float(), window)
    return scores + group_mask(size, window, shift, interval, mask_padding)[:, None]
