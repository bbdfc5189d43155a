"""Layers with weights of +1 and -1, and packing them to bits.

A binary linear layer computes `sign(x) sign(C)^T * scale + bias`, with `C` the weight less the mean of its row. The
products of signs are whole numbers, exact in float32, so a packed layer gives the bits of the layer it came from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import binary_linear, binary_sign, pack_signs
from ._base import Backbone
from ._checkpoint import logger


class _DirectSign(torch.autograd.Function):
    """Sign of a weight whose gradient is that of the scaled sign, unscaled, where `|weight| <= 1` (BinaryViT)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor) -> Tensor:
        return torch.sign(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, scale = ctx.saved_tensors
        inverse = torch.where(scale > 0, 1 / scale, 0)[:, None]
        return grad * inverse * (weight.abs() <= 1), None


class BinaryLinear(nn.Linear):
    """Linear layer of binary weights.

    Args:
        binary_input: take the signs of the input, too.
        estimator: of their gradient; see `striate.ops.binary_sign`.
        learned_scale: learn `scaling_factor` `(out, 1)`, which begins as the mean of the row's magnitudes; otherwise
            the scale is this mean, a constant for the gradient.
        direct: let the gradient of the scaled signs pass to the weights as it is, not times the scale.
        centred: take the signs of what is left after the mean of each row.
    """

    def __init__(
        self, in_dim: int, out_dim: int, bias: bool = True, *, binary_input: bool = True, estimator: str = "clip",
        learned_scale: bool = False, direct: bool = False, centred: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_dim, out_dim, bias)
        self.binary_input, self.estimator = binary_input, estimator
        self.direct, self.centred = direct, centred
        self.register_parameter("scaling_factor", None)
        if learned_scale:
            nn.init.uniform_(self.weight, -0.015, 0.015)
            self.scaling_factor = nn.Parameter(self.weight.detach().abs().mean(1, keepdim=True))

    def weight_scale(self) -> Tensor:
        """Scale of the signs `(out,)`."""
        return self.weight.detach().abs().mean(1) if self.scaling_factor is None else self.scaling_factor[:, 0]

    def binary_weight(self) -> tuple[Tensor, Tensor]:
        """Signs `(out, in)` and their scale `(out,)`."""
        weight, scale = self.weight, self.weight_scale()
        if self.centred:
            weight = weight - weight.mean(1, keepdim=True)
        return (_DirectSign.apply(weight, scale.detach()) if self.direct else binary_sign(weight)), scale

    def forward(self, x: Tensor) -> Tensor:
        signs, scale = self.binary_weight()
        x = binary_sign(x, self.estimator) if self.binary_input else x
        x = F.linear(x, signs) * scale
        return x if self.bias is None else x + self.bias

    @property
    def binary_products(self) -> bool:
        """Whether both factors of its products are binary."""
        return self.binary_input

    @torch.no_grad()
    def words(self, name: str) -> Tensor:
        """The signs as 64-bit words.

        Raises:
            ValueError: if a weight of this layer, called `name`, has no sign.
        """
        signs, _ = self.binary_weight()
        if zeros := int((signs == 0).sum()):
            raise ValueError(
                f"{name} cannot be packed: {zeros} weights have no sign (they equal the mean of their row, if that is "
                "taken off), and a bit is +1 or -1; move them by the smallest amount, or train a step further"
            )
        return pack_signs(signs)

    def packed(self, name: str) -> PackedLinear:
        """The same layer of packed weights; see `words` for `name` and errors."""
        return PackedLinear(self.words(name), self.weight_scale(), self.bias, self.in_features, self.binary_input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, binary_input={self.binary_input}"


class PackedLinear(nn.Module):
    """A `BinaryLinear` for inference: bits of the weights `(out, words)`, scale `(out,)` and bias `(out,)`."""

    words: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, words: Tensor, scale: Tensor, bias: Tensor | None, in_features: int, binary_input: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.binary_input = in_features, len(words), binary_input
        self.register_buffer("words", words)
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return binary_linear(x, self.words, self.scale.to(x.dtype), bias, binary_input=self.binary_input)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, binary_input={self.binary_input}"


def pack(model: nn.Module) -> None:
    """Replace every module of `model` that has a method `packed` by what that returns, in place.

    Raises:
        ValueError: if a weight has no sign; the model stays as it is.
    """
    replaced: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "packed") and not any(name.startswith(f"{outer}.") for outer in replaced):
            replaced[name] = module.packed(name).train(module.training)
    for name, module in replaced.items():
        model.set_submodule(name, module)


class BinaryBackbone(Backbone):
    """A backbone of binary layers, which can be packed."""

    def finish(self, packed: bool) -> None:
        """End construction."""
        if packed:
            pack(self)

    def pack(self) -> None:
        """Pack the binary layers to bits, for inference: the same outputs from a fraction of the memory, in place.

        In float32, logits in eval mode are the same to the last bit. A saved packed model comes back packed.

        Raises:
            ValueError: if a weight equals the mean of its row, and so has no sign; the model stays as it is.
        """
        pack(self)
        if hasattr(self, "model_args"):
            self.model_args = {**self.model_args, "packed": True}

    def complete(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Learned scales that a checkpoint lacks, or has as 0, are the mean magnitudes; others are left out.

        So a model in full precision, or one of fewer binary layers, is where another can start.
        """
        state, started, dropped = dict(state), 0, 0
        for name, layer in self.named_modules():
            key, weight = f"{name}.scaling_factor", state.get(f"{name}.weight")
            if not isinstance(layer, BinaryLinear) or weight is None:
                continue
            if layer.scaling_factor is None:
                dropped += state.pop(key, None) is not None
            elif key not in state or not state[key].any():
                state[key] = weight.abs().mean(1, keepdim=True)
                started += 1
        if started:
            logger.warning("%d learned scales of binary weights start as the mean magnitudes of their rows", started)
        if dropped:
            logger.warning("left out %d learned scales: these layers of the model have none", dropped)
        return state

    def no_weight_decay(self) -> set[str]:
        """Learned scales and positions."""
        words = ("scaling_factor", "pos_embed", "cls_token")
        return super().no_weight_decay() | {
            name for name, _ in self.named_parameters() if any(word in name for word in words)
        }
