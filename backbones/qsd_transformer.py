"""QSD-Transformer (arXiv 2501.13492): Meta-SpikeFormer with weights of 4 bits and integer neurons.

`convert` reads the authors' files (https://github.com/bollossom/QSD-Transformer, MIT by its model card), of
classification, detection and segmentation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import metaspikformer
from ._quantize import quantize_weights
from ._registry import Family, build, register
from ._spiking import Lif, Multispike
from .metaspikformer import MetaSpikformer

QSD_TRANSFORMER = Family(
    "qsd_transformer",
    "QSD-Transformer",
    "https://arxiv.org/abs/2501.13492",
    "https://github.com/bollossom/QSD-Transformer",
    "MIT",
)
BITS = 4


class QSDTransformer(MetaSpikformer):
    """QSD-Transformer: Meta-SpikeFormer, whose pyramid it has, trained for few bits.

    Every linear layer and convolution has weights of 4 bits with learned steps (see `quantize`), the classifier too.
    Neurons have no memory: they fire 0 to 4 spikes at once (`Multispike`), which hardware sends one after the other;
    those of the attention count double. The attention's scale is 1/4, and its blocks have layer scales.

    Args:
        timesteps: for which an image is shown; 1 in the authors' code.
        **kwargs: those of `MetaSpikformer`.
    """

    attn_scale = 0.25
    layer_scale = 1e-6

    def __init__(self, timesteps: int = 1, **kwargs: Any) -> None:
        super().__init__(timesteps=timesteps, **kwargs)
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, Lif):
                    setattr(parent, name, Multispike(step=0.5 if name == "attn_lif" else None))
        quantize_weights(self, BITS)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """See `Backbone.reset_classifier`; the fresh classifier is quantised."""
        super().reset_classifier(num_classes, global_pool)
        quantize_weights(self.head, BITS)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys, which are Meta-SpikeFormer's -> ours.

    Left out is the state of quantisers of activations (`*.act.*`), which pass everything on unchanged.
    """
    kept = {key: value for key, value in state.items() if ".act." not in key}
    return {_rename_scale(key): value for key, value in metaspikformer.convert(kept).items()}


def _rename_scale(key: str) -> str:
    return key.replace(".layer_scale1", ".ls1.gamma").replace(".layer_scale2", ".ls2.gamma")


@register(QSD_TRANSFORMER, params=15.2, gmacs=6.5, first_conv="stem.conv.conv")
def qsd_transformer_15m(**kwargs: Any) -> nn.Module:
    """QSD-Transformer with 15 M parameters, 1.8 M in the paper's count of bytes."""
    return build(QSDTransformer, dict(), kwargs)


@register(QSD_TRANSFORMER, params=8.4, gmacs=3.6, first_conv="stem.conv.conv")
def qsd_transformer_8_256(**kwargs: Any) -> nn.Module:
    """QSD-Transformer-8-256."""
    return build(QSDTransformer, dict(dims=(48, 96, 192, 256)), kwargs)


@register(QSD_TRANSFORMER, params=31.4, gmacs=14.0, first_conv="stem.conv.conv")
def qsd_transformer_8_384(**kwargs: Any) -> nn.Module:
    """QSD-Transformer-8-384."""
    return build(QSDTransformer, dict(dims=(96, 192, 384, 480)), kwargs)


@register(QSD_TRANSFORMER, params=55.4, gmacs=24.8, top1=80.3, first_conv="stem.conv.conv")
def qsd_transformer_8_512(**kwargs: Any) -> nn.Module:
    """QSD-Transformer-8-512, 6.8 M parameters in the paper's count of bytes."""
    return build(QSDTransformer, dict(dims=(128, 256, 512, 640)), kwargs)
