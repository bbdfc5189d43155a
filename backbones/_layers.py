"""Layers that several families share; maps are `(B, H, W, C)`."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, NormMlpClassifierHead, trunc_normal_
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.partition import pad_map


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as most papers here do: truncated normal of 0.02, bias 0. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Mlp(nn.Module):
    """Linear, GELU, linear on the last axis; training keeps the input of the GELU and recomputes its output.

    `approximate` is that of `torch.nn.functional.gelu`: `none` (erf) or `tanh`.
    """

    def __init__(self, dim: int, hidden_dim: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if torch.is_grad_enabled() and x.requires_grad and _plain_eager(x):
            return _GeluLinear.apply(x, self.fc2.weight, self.fc2.bias, self.approximate)
        return self.fc2(gelu(x, self.approximate))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU; in place where no gradient will need the input, which must be the caller's own."""
    if torch.is_grad_enabled():
        return F.gelu(x, approximate=approximate)
    return torch.ops.aten.gelu_(x, approximate=approximate)


def _plain_eager(x: Tensor) -> bool:
    """Whether nothing traces or transforms the computation, so that a hand-written backward serves."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


class _GeluLinear(torch.autograd.Function):
    """`linear(gelu(x))` that saves `x` alone: a third of an MLP's activations."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.approximate = approximate
        return F.linear(F.gelu(x, approximate=approximate), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_weight = torch.mm(grad.t(), F.gelu(x, approximate=ctx.approximate).flatten(0, -2).to(grad.dtype))
        grad_hidden = torch.mm(grad, weight.to(grad.dtype)).view_as(x).to(x.dtype)
        return torch.ops.aten.gelu_backward(grad_hidden, x, approximate=ctx.approximate), grad_weight, grad.sum(0), None


def channels_last_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-d convolution (or pooling, or batch norm) to `(B, H, W, C)` without copying the map."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def image_to_map(x: Tensor, multiple: int = 1) -> Tensor:
    """Image `(B, C, H, W)` -> `(B, H, W, C)`, padded on the right and bottom with zeros to multiples of `multiple`."""
    if torch._C._are_functorch_transforms_active():  # vmap knows no other memory format
        x = x.permute(0, 2, 3, 1).contiguous()
    else:
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return x if multiple == 1 else pad_map(x, (multiple, multiple))


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of `(B, H, W, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Factor and offset `(C,)` that a batch norm applies in eval mode."""
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()  # type: ignore[operator, union-attr]
    return factor, norm.bias - norm.running_mean * factor  # type: ignore[operator]


class ConvNorm(nn.Module):
    """Convolution and batch norm of `(B, H, W, C)`, in that order or the other."""

    def __init__(self, conv: nn.Conv2d, norm: BatchNorm, norm_first: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.norm_first = conv, norm, norm_first

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            return channels_last_conv(self.conv, self.norm(x))
        return self.norm(channels_last_conv(self.conv, x))


class PooledNormHead(NormMlpClassifierHead):
    """Pool, layer norm, optional linear and tanh, classifier, for maps `(B, H, W, C)`; timm's head and its names."""

    def __init__(self, dim: int, num_classes: int, hidden_dim: int | None, global_pool: str, drop_rate: float) -> None:
        norm = functools.partial(LayerNorm2d, eps=1e-5)
        super().__init__(dim, num_classes, hidden_dim, global_pool, drop_rate, norm_layer=norm)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2), pre_logits)
