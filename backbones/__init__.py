"""Backbone families and the factory that creates them by name."""

from . import (
    biformer,
    binaryvit,
    bivit,
    crossformer,
    davit,
    ecoformer,
    maxvit,
    metaspikformer,
    mst,
    qsd_transformer,
    spike_driven_transformer,
    spikformer,
    spikformer_v2,
    statten,
    swin,
    vig,
)
from ._base import Backbone, FeaturePyramid
from ._checkpoint import CheckpointError, load_checkpoint
from ._inference import optimize_for_inference
from ._registry import Family, ModelInfo, create_model, list_models, model_info

__all__ = [
    "Backbone",
    "CheckpointError",
    "Family",
    "FeaturePyramid",
    "ModelInfo",
    "biformer",
    "binaryvit",
    "bivit",
    "create_model",
    "crossformer",
    "davit",
    "ecoformer",
    "list_models",
    "load_checkpoint",
    "maxvit",
    "metaspikformer",
    "model_info",
    "mst",
    "optimize_for_inference",
    "qsd_transformer",
    "spike_driven_transformer",
    "spikformer",
    "spikformer_v2",
    "statten",
    "swin",
    "vig",
]
