"""The shared operators, each with one definition (`reference.py`) and the same result on every path."""

from ._backend import explain
from .channel_attention import channel_attention
from .gated_linear_attention import gated_linear_attention
from .lif import lif, multispike
from .roofline import roofline
from .routing_attention import route_regions, routing_attention
from .window_attention import window_attention

__all__ = [
    "channel_attention",
    "explain",
    "gated_linear_attention",
    "lif",
    "multispike",
    "roofline",
    "route_regions",
    "routing_attention",
    "window_attention",
]
