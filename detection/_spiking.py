"""Layers behind spiking neurons, of necks and heads that see one time step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..ops import lif


class Spikes(nn.Module):
    """Leaky integrate-and-fire neurons in one time step: any map -> zeros and ones; a 1 wants an input of 2."""

    def forward(self, x: Tensor) -> Tensor:
        return lif(x[None])[0]


def behind_spikes(*layers: nn.Module, neuron: nn.Module | None = None) -> nn.Sequential:
    """Neurons, by default `Spikes`, and the layers that read what they fire, with the authors' keys: `1.0.…`."""
    return nn.Sequential(neuron or Spikes(), nn.Sequential(*layers))


def put_behind_spikes(layers: nn.ModuleList, neuron: Callable[[], nn.Module] = Spikes) -> None:
    """Let each of `layers` read spikes."""
    for i, layer in enumerate(layers):
        layers[i] = behind_spikes(layer, neuron=neuron())
