"""Backbones in semantic segmentation: `.mmseg` for mmsegmentation; nothing loads unasked."""
