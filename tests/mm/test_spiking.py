"""Necks and heads of spiking neurons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS as DETECTION
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS as SEGMENTATION
from torch import Tensor, nn

import striate.detection.spiking
import striate.segmentation.spiking  # noqa: F401
from mm import jobs

WIDTHS, SIDES = [8, 16, 24, 32], (16, 8, 4, 4)


def fire(x: Tensor) -> Tensor:
    """Half of the input charges a neuron, whose threshold is 1."""
    return (x >= 2).to(x.dtype)


def count(x: Tensor) -> Tensor:
    """Of the integer neurons of four spikes."""
    return x.clamp(0, 4).round() / 4


def maps(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(2, c, side, side, generator=generator) for c, side in zip(WIDTHS, SIDES, strict=True)]


def conv(state: dict[str, Tensor], key: str, x: Tensor, padding: int = 0) -> Tensor:
    return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), padding=padding)


def pyramid(state: dict[str, Tensor], inputs: list[Tensor], neuron: Any) -> list[Tensor]:
    """What the paper's pyramid computes, by the names of its parameters."""
    laterals = [conv(state, f"lateral_convs.{i}.1.0.conv", neuron(x)) for i, x in enumerate(inputs)]
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], laterals[i - 1].shape[2:])
    return [conv(state, f"fpn_convs.{i}.1.0.conv", neuron(x), 1) for i, x in enumerate(laterals)]


def strong(model: nn.Module) -> nn.Module:
    """Weights large enough for neurons to fire."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_pyramid_of_a_detector() -> None:
    neck = strong(DETECTION.build(dict(type="SpikeFPN", in_channels=WIDTHS, out_channels=8, num_outs=5)))
    got, want = neck(maps()), pyramid(neck.state_dict(), maps(), fire)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=False))
    assert torch.equal(got[4], got[3][:, :, ::2, ::2])
    assert max(float(m.abs().max()) for m in got) > 1


@pytest.mark.parametrize(("levels", "neuron"), [(1, fire), (4, count)])
def test_pyramid_of_a_segmenter(levels, neuron) -> None:
    settings = dict(type="SpikeFPN", in_channels=WIDTHS, out_channels=8, num_outs=4, levels=levels)
    neck = strong(SEGMENTATION.build(settings))
    want = pyramid(neck.state_dict(), maps(), neuron)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(neck(maps()), want, strict=True))


@pytest.mark.parametrize(("levels", "neuron"), [(1, fire), (4, count)])
def test_head_of_a_segmenter(levels, neuron) -> None:
    init_default_scope("mmseg")
    settings = dict(in_channels=[8] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32], channels=8)
    settings.update(
        num_classes=3, act_cfg=None, dropout_ratio=0.0, levels=levels, loss_decode=dict(type="mmseg.CrossEntropyLoss")
    )
    head = strong(SEGMENTATION.build(dict(type="SpikeFPNHead", **settings)))
    inputs = [3 * torch.randn(2, 8, side, side) for side in (32, 16, 8, 4)]
    state = head.state_dict()
    total = conv(state, "scale_heads.0.0.1.0.conv", neuron(inputs[0]), 1)
    for i in (1, 2, 3):
        x = inputs[i]
        for k in range(i):
            x = conv(state, f"scale_heads.{i}.{k}.1.0.conv", neuron(x), 1)
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        total = total + x
    want = conv(state, "conv_seg", neuron(total))
    assert torch.allclose(head(inputs), want, atol=1e-4)
    assert want.abs().max() > 1


def test_heads_of_a_detector_read_spikes() -> None:
    """All but the last layers of the boxes, and the keys are the authors'."""
    config = jobs.read("detection/metaspikformer/mask_rcnn_15m_3x")
    jobs.use_scope(config)
    model = strong(DETECTION.build(config.model))
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and not name.startswith("backbone"):
            layer.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0]}))
    with torch.no_grad():
        pyramid = model.neck([3 * torch.randn(1, c, s, s) for c, s in zip((64, 128, 256, 360), SIDES, strict=True)])
        scores, boxes = model.rpn_head(pyramid)
        classes, _ = model.roi_head.bbox_head(torch.randn(5, 256, 7, 7))
        masks = model.roi_head.mask_head(torch.randn(5, 256, 14, 14))
    assert [tuple(m.shape) for m in (scores[0], boxes[0], classes, masks)] == [
        (1, 3, 16, 16),
        (1, 12, 16, 16),
        (5, 81),
        (5, 80, 28, 28),
    ]
    real = {name for name, x in seen.items() if not ((x == 0) | (x == 1)).all()}
    assert real == {"roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"}
    assert {
        "neck.lateral_convs.0.1.0.conv",
        "neck.fpn_convs.3.1.0.conv",
        "rpn_head.rpn_conv.1.0",
        "rpn_head.rpn_cls.1.0",
        "rpn_head.rpn_reg.1.0",
        "roi_head.bbox_head.shared_fcs.1.1.0",
        "roi_head.mask_head.convs.3.1.0.conv",
        "roi_head.mask_head.upsample.1.0",
        "roi_head.mask_head.conv_logits.1.0",
    } <= seen.keys()
    assert len(seen) == 8 + 3 + 4 + 6


def test_gradients_pass_the_neurons() -> None:
    neck = strong(DETECTION.build(dict(type="SpikeFPN", in_channels=WIDTHS, out_channels=8, num_outs=4)))
    inputs = [m.requires_grad_() for m in maps()]
    sum(m.square().sum() for m in neck(inputs)).backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in inputs)
