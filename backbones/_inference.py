"""`optimize_for_inference`: the same outputs, faster, for a model that is not trained any more.

Layers are replaced by subclasses of themselves that keep the same parameters under the same names and derive faster
forms from them: oneDNN's packed weights for linear layers (with the GELU fused into the first of an MLP), batch norms
folded into their convolutions and linear layers, position biases and quantised weights computed once. A derived form
remembers the versions of the parameters it came from and is made anew when one of them changes; in training mode, or
where a gradient is wanted, the layers compute what they always did.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import BatchNorm, ConvNorm, Mlp, affine, gelu
from ._quantize import QuantizedConv2d, QuantizedLinear, effective_weight, weight_sources
from ._spiking import LinearNorm
from .crossformer import GroupAttention
from .davit import ConvPosEnc
from .maxvit import Conv1x1, MBConv
from .metaspikformer import RepConv
from .swin import CosineWindowAttention
from .vig import GatedMlp

logger = logging.getLogger("striate")


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Make `model` faster in eval mode without changing its outputs (to 1e-5 of their size) or its state dict.

    Works in place and returns the model. Opt-in because it holds a second copy of the weights in oneDNN's layout.

    Of a spiking model the potentials keep to that, the outputs do not: folding rounds differently, and a neuron whose
    potential comes to lie on the other side of its threshold changes everything after it. In float32 a few spikes do,
    as they do between two numbers of threads or two batch sizes, and single logits then differ visibly; in float64
    the outputs agree as those of other models.

    Args:
        model: a model in eval mode. Linear layers of any model are packed; the rest concerns our own.

    Raises:
        ValueError: if the model is in training mode.
    """
    if model.training:
        raise ValueError("optimize_for_inference(model) got a model in training mode; call model.eval() first")
    onednn = _has_onednn()
    if not onednn:
        logger.warning("this build of torch has no oneDNN: linear layers stay as they are")
    for module in list(model.modules()):
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is not None and (onednn or not issubclass(replacement, _NeedsOneDNN)):
            module.__class__ = replacement
    return model


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Derived(nn.Module):
    """A module with values derived from its parameters and buffers, made on first use and whenever one changes."""

    def derived(self, name: str, sources: Iterable[Tensor | None], make: Callable[[], Any]) -> Any:
        """The value of `make()` for the present content of `sources`."""
        state = tuple((id(t), t._version) for t in sources if t is not None)
        values = self.__dict__.setdefault("_derived", {})
        if name not in values or values[name][0] != state:
            with torch.no_grad():
                values[name] = state, make()
        return values[name][1]

    def __getstate__(self) -> dict[str, Any]:  # packed tensors can be neither copied nor pickled
        return {k: v for k, v in self.__dict__.items() if k != "_derived"}


def _serves(module: nn.Module, *tensors: Tensor) -> bool:
    """Whether the derived form may stand in: nothing trains, differentiates, traces or casts."""
    if module.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


class _NeedsOneDNN(Derived):
    """A derived module that is worth nothing without packed linear layers."""


def packable(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes this product: float32 on a CPU, outside autocast, which has its own bfloat16 path."""
    cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and type(x) is Tensor
    return cpu and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


def _pack(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` `(out, in)` in oneDNN's blocked layout for inputs with as many rows as `x`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), x.numel() // x.shape[-1])


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: str = "") -> Tensor:
    """Linear layer with a packed weight, and a GELU (`none` or `tanh`) on its output while it is still in cache."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu" if gelu else "none", [], gelu)


def _gated_linear(x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
    """`silu(gate x) * (value x)` for two packed weights, without a pass over either product."""
    gate = torch.ops.mkldnn._linear_pointwise(x, gate, None, "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gate, value, None, "mul")


class PackedLinear(_NeedsOneDNN, nn.Linear):
    """`nn.Linear` with its weight in oneDNN's blocked layout."""

    def forward(self, x: Tensor) -> Tensor:
        return self.with_gelu(x, "")

    def with_gelu(self, x: Tensor, gelu: str) -> Tensor:
        """The layer, and a GELU of that approximation unless it is empty."""
        if not (_serves(self, x, self.weight) and packable(x, self.weight)):
            x = super().forward(x)
            return F.gelu(x, approximate=gelu) if gelu else x
        packed = self.derived("weight", (self.weight,), lambda: _pack(self.weight, x))
        return _linear(x, packed, self.bias, gelu)


class FusedMlp(_NeedsOneDNN, Mlp):
    """`Mlp` with the GELU applied while the first product is still in cache."""

    fc1: PackedLinear

    def forward(self, x: Tensor) -> Tensor:
        if not _serves(self, x, self.fc1.weight):
            return super().forward(x)
        return self.fc2(self.fc1.with_gelu(x, self.approximate))


class FusedGatedMlp(_NeedsOneDNN, GatedMlp):
    """`GatedMlp` with SiLU and product applied while the first products are still in cache."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc1.weight
        if not (_serves(self, x, weight) and packable(x, weight)):
            return super().forward(x)
        packed = self.derived("gated", (weight,), lambda: [_pack(half, x) for half in weight.chunk(2)])
        return self.fc2(_gated_linear(x, *packed))


class PackedConv1x1(_NeedsOneDNN, Conv1x1):
    """`Conv1x1` with its weight in oneDNN's blocked layout."""

    def forward(self, x: Tensor) -> Tensor:
        if not (_serves(self, x, self.weight) and packable(x, self.weight)):
            return super().forward(x)
        return _linear(x, self.derived("weight", (self.weight,), lambda: _pack(self.weight.flatten(1), x)), self.bias)


def _norm_tensors(*norms: BatchNorm) -> list[Tensor]:
    tensors = (t for n in norms for t in (n.weight, n.bias, n.running_mean, n.running_var))
    return [t for t in tensors if t is not None]


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


class FoldedConvNorm(Derived, ConvNorm):
    """`ConvNorm` as one convolution."""

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if not _serves(self, x, conv.weight):
            return super().forward(x)
        sources = (*weight_sources(conv), conv.bias, *_norm_tensors(self.norm))
        weight, bias = self.derived("conv", sources, self._fold)
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, conv.stride, conv.padding)
        return x.permute(0, 2, 3, 1)

    def _fold(self) -> tuple[Tensor, Tensor]:
        weight, bias = effective_weight(self.conv), _bias(self.conv)
        factor, offset = affine(self.norm)
        if self.norm_first:  # such convolutions have no padding, which would see the offset
            return weight * factor[:, None, None], bias + weight.sum((2, 3)) @ offset
        return weight * factor[:, None, None, None], bias * factor + offset


class FoldedLinearNorm(Derived, LinearNorm):
    """`LinearNorm` as one linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear
        if not _serves(self, x, linear.weight):
            return super().forward(x)
        return _folded_linear(self, "linear", x, linear, self.norm)


def _folded_linear(module: Derived, name: str, x: Tensor, linear: nn.Linear, *norms: BatchNorm) -> Tensor:
    """`linear` and the norms after it as one layer, packed where that is possible."""

    def fold() -> tuple[Tensor, Tensor]:
        weight, bias = effective_weight(linear), _bias(linear)
        for norm in norms:
            factor, offset = affine(norm)
            weight, bias = weight * factor[:, None], bias * factor + offset
        return weight, bias

    def pack() -> tuple[Tensor, Tensor]:
        weight, bias = fold()
        return _pack(weight, x), bias

    sources = (*weight_sources(linear), linear.bias, *_norm_tensors(*norms))
    if packable(x, linear.weight) and _has_onednn():
        return _linear(x, *module.derived(f"packed {name}", sources, pack))
    return F.linear(x, *module.derived(name, sources, fold))


class FoldedRepConv(Derived, RepConv):
    """`RepConv` without its norms: linear, depthwise convolution padded with zeros, linear.

    One dense convolution (`RepConv.fold`) has 4.5 times the multiply-adds and takes 3 to 7 times as long on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.expand.weight
        if not _serves(self, x, weight):
            return super().forward(x)
        x = _folded_linear(self, "expand", x, self.expand)
        sources = (*weight_sources(self.depthwise), *_norm_tensors(self.pad_norm))
        weight, bias = self.derived("depthwise", sources, self._fold_depthwise)
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)
        return _folded_linear(self, "project", x, self.project.linear, self.project.norm, self.norm)

    def _fold_depthwise(self) -> tuple[Tensor, Tensor]:
        """The norm before the convolution has padded its map with its offset, which makes that a constant."""
        weight = effective_weight(self.depthwise)
        factor, offset = affine(self.pad_norm)
        return weight * factor[:, None, None, None], weight.sum((1, 2, 3)) * offset


class CachedQuantizedLinear(Derived, QuantizedLinear):
    """`QuantizedLinear` that rounds its weights once."""

    def quantized_weight(self) -> Tensor:
        if not _serves(self, self.weight):
            return super().quantized_weight()
        return self.derived("weight", weight_sources(self), super().quantized_weight)


class CachedQuantizedConv2d(Derived, QuantizedConv2d):
    """`QuantizedConv2d` that rounds its weights once."""

    def quantized_weight(self) -> Tensor:
        if not _serves(self, self.weight):
            return super().quantized_weight()
        return self.derived("weight", weight_sources(self), super().quantized_weight)


class FoldedConvPosEnc(Derived, ConvPosEnc):
    """`ConvPosEnc` with the residual added to the centre of the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        conv = self.proj
        if not _serves(self, x, conv.weight):
            return super().forward(x)
        weight = self.derived("conv", (conv.weight,), self._fold)
        return F.conv2d(x.permute(0, 3, 1, 2), weight, conv.bias, 1, conv.padding, 1, conv.groups).permute(0, 2, 3, 1)

    def _fold(self) -> Tensor:
        weight = self.proj.weight.clone()
        weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] += 1
        return weight


class FoldedMBConv(_NeedsOneDNN, MBConv):
    """`MBConv` with its three batch norms folded into the convolutions and the first GELU fused."""

    def forward(self, x: Tensor) -> Tensor:
        expand, depthwise = self.conv1_1x1, self.conv2_kxk
        if not (_serves(self, x, expand.weight) and packable(x, expand.weight)):
            return super().forward(x)
        sources = (expand.weight, *_norm_tensors(self.pre_norm, self.norm1))
        weight, bias = self.derived("expand", sources, lambda: self._fold_expand(x))
        hidden = _linear(x, weight, bias, "tanh")
        sources = (depthwise.weight, *_norm_tensors(self.norm2))
        weight, bias = self.derived("depthwise", sources, self._fold_depthwise)
        hidden = gelu(depthwise.convolve(hidden, weight, bias), "tanh")
        return self.shortcut(x) + self.conv3_1x1(self.se(hidden))

    def _fold_expand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.conv1_1x1.weight.flatten(1)
        (before, shift), (after, offset) = affine(self.pre_norm), affine(self.norm1)
        return _pack(weight * before * after[:, None], x), (weight @ shift) * after + offset

    def _fold_depthwise(self) -> tuple[Tensor, Tensor]:
        factor, offset = affine(self.norm2)
        return self.conv2_kxk.weight * factor[:, None, None, None], offset


class CachedCosineWindowAttention(Derived, CosineWindowAttention):
    """`CosineWindowAttention` that runs its bias network once."""

    def bias_table(self) -> Tensor:
        sources = (*self.cpb_mlp.parameters(), self.relative_coords_table)
        return self.derived("bias", sources, super().bias_table) if _serves(self, *sources) else super().bias_table()


class CachedGroupAttention(Derived, GroupAttention):
    """`GroupAttention` that runs its bias network once for each group size."""

    def bias_table(self, group: int) -> Tensor:
        sources = tuple(self.pos.parameters())
        if not _serves(self, *sources):
            return super().bias_table(group)
        return self.derived(f"bias{group}", sources, lambda: self.pos((group, group)))


_REPLACEMENTS: dict[type[nn.Module], type[Derived]] = {
    nn.Linear: PackedLinear,
    Mlp: FusedMlp,
    GatedMlp: FusedGatedMlp,
    Conv1x1: PackedConv1x1,
    MBConv: FoldedMBConv,
    ConvNorm: FoldedConvNorm,
    LinearNorm: FoldedLinearNorm,
    RepConv: FoldedRepConv,
    QuantizedLinear: CachedQuantizedLinear,
    QuantizedConv2d: CachedQuantizedConv2d,
    ConvPosEnc: FoldedConvPosEnc,
    CosineWindowAttention: CachedCosineWindowAttention,
    GroupAttention: CachedGroupAttention,
}
