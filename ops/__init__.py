"""The shared operators, each with one definition (`reference.py`) and the same result on every path."""

from ._backend import explain
from .binary import (
    binary_linear,
    binary_projection,
    binary_sign,
    pack_signs,
    packed_matmul,
    softmax_aware,
    unpack_signs,
)
from .channel_attention import channel_attention
from .gated_linear_attention import gated_linear_attention
from .lif import lif, multispike
from .roofline import roofline
from .routing_attention import route_regions, routing_attention
from .window_attention import window_attention

__all__ = [
    "binary_linear",
    "binary_projection",
    "binary_sign",
    "channel_attention",
    "explain",
    "gated_linear_attention",
    "lif",
    "multispike",
    "pack_signs",
    "packed_matmul",
    "roofline",
    "route_regions",
    "routing_attention",
    "softmax_aware",
    "unpack_signs",
    "window_attention",
]
