"""Backbones in object detectors: `.mmdet` for mmdetection, `.torchvision` for torchvision's; nothing loads unasked."""
