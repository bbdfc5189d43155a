"""Every backbone for mmsegmentation: the module of `striate.detection.mmdet`, which serves both."""

from ..detection.mmdet import LayerDecayConstructor, StriateBackbone

__all__ = ["LayerDecayConstructor", "StriateBackbone"]
