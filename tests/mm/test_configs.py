"""Every published config builds the detector that its paper describes, and trains."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner

from mm import jobs
from mm.jobs import CONFIGS

NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for folder in ("detection", "segmentation")
    for path in (CONFIGS / folder).glob("[!_]*/*.py")
)
# millions of the whole detector, as the papers' repositories give them
PARAMETERS = {
    "detection/swin/mask_rcnn_tiny": 48,
    "detection/swin/mask_rcnn_small": 69,
    "detection/swin/cascade_mask_rcnn_tiny": 86,
    "detection/swin/cascade_mask_rcnn_small": 107,
    "detection/swin/cascade_mask_rcnn_base": 145,
    "detection/davit/mask_rcnn_tiny": 47.8,
    "detection/davit/mask_rcnn_small": 69.2,
    "detection/davit/mask_rcnn_base": 107.3,
    "detection/davit/retinanet_tiny": 38.5,
    "detection/davit/retinanet_small": 59.9,
    "detection/davit/retinanet_base": 98.5,
    "detection/crossformer/retinanet_small": 40.8,
    "detection/crossformer/retinanet_base": 62.1,
    "detection/crossformer/mask_rcnn_small": 50.2,
    "detection/crossformer/mask_rcnn_base": 71.5,
    "detection/metaspikformer/mask_rcnn_15m": 34.9,
    "detection/metaspikformer/mask_rcnn_8_512": 75.0,
    "segmentation/swin/upernet_tiny": 60,
    "segmentation/swin/upernet_small": 81,
    "segmentation/swin/upernet_base": 121,
    "segmentation/davit/upernet_tiny": 60,
    "segmentation/davit/upernet_small": 81,
    "segmentation/davit/upernet_base": 121,
    "segmentation/crossformer/semantic_fpn_small": 34.3,
    "segmentation/crossformer/semantic_fpn_base": 55.6,
    "segmentation/crossformer/semantic_fpn_large": 95.4,
    "segmentation/crossformer/upernet_small": 62.3,
    "segmentation/crossformer/upernet_base": 83.6,
    "segmentation/crossformer/upernet_large": 125.5,
    "segmentation/metaspikformer/semantic_fpn_15m": 16.5,
    "segmentation/metaspikformer/semantic_fpn_15m_t4": 16.5,
}
SCHEDULES = {"segmentation/metaspikformer/semantic_fpn_8_512_t4_80k": 160000}  # that end before the rate is 0
SPIKING = tuple(f"{task}/{family}" for task in ("detection", "segmentation") for family in ("metasp", "qsd"))
STEPS = (
    "detection/biformer/mask_rcnn_base_1x",
    "detection/crossformer/retinanet_small_1x",
    "detection/crossformer_pp/mask_rcnn_small_1x",
    "detection/davit/retinanet_tiny_3x",
    "detection/davit/cascade_mask_rcnn_tiny_3x",
    "detection/metaspikformer/mask_rcnn_15m_3x",
    "detection/qsd_transformer/mask_rcnn_15m_15e",
    "detection/swin/mask_rcnn_tiny_1x",
    "segmentation/biformer/semantic_fpn_small_80k",
    "segmentation/crossformer/upernet_small_160k",
    "segmentation/crossformer_pp/semantic_fpn_small_80k",
    "segmentation/davit/upernet_tiny_160k",
    "segmentation/metaspikformer/semantic_fpn_15m_t4_160k",
    "segmentation/qsd_transformer/semantic_fpn_15m_160k",
    "segmentation/swin/upernet_tiny_160k",
    "segmentation/vig/upernet_h_tiny_160k",
)


@pytest.mark.parametrize("name", NAMES)
def test_builds(name, monkeypatch) -> None:
    monkeypatch.setattr("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor)  # slow without numbers
    config = jobs.read(name)
    jobs.use_scope(config)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    if hasattr(model, "neck"):
        assert list(model.backbone.out_channels) == config.model.neck.in_channels
    else:
        assert list(model.backbone.out_channels) == config.model.decode_head.in_channels
        assert model.backbone.out_channels[2] == config.model.auxiliary_head.in_channels
    if name.startswith(SPIKING):
        strides: tuple[int, ...] = (4, 8, 16, 16) if "mask_rcnn" in name else (2, 4, 8, 16)
    else:
        strides = (8, 16, 32) if "retinanet" in name else (4, 8, 16, 32)
    assert model.backbone.strides == strides
    published = PARAMETERS.get(re.sub(r"_[^_]*$", "", name))
    if published is not None:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        digit = 0.1 if isinstance(published, float) else 1.0  # of the last digit, which some authors cut off
        assert published - digit / 2 <= millions < published + digit
    epochs = {"1x": 12, "15e": 15, "3x": 36}.get(name.rpartition("_")[2])
    if epochs:
        assert config.train_cfg.max_epochs == epochs
        assert config.param_scheduler[-1].end == epochs
        assert config.param_scheduler[-1].milestones[0] < epochs
    else:
        steps = 1000 * int(name.rpartition("_")[2].removesuffix("k"))
        assert config.train_cfg.max_iters == steps
        assert config.param_scheduler[-1].end == SCHEDULES.get(name, steps)
    assert config.optim_wrapper.optimizer.type == "AdamW"


def test_every_published_count_belongs_to_a_config() -> None:
    known = {re.sub(r"_[^_]*$", "", name) for name in NAMES}
    assert PARAMETERS.keys() <= known


@pytest.mark.parametrize("name", STEPS)
def test_one_training_step(name, drawn, tmp_path) -> None:
    config = jobs.shrink(name, drawn, tmp_path, batch=2)
    jobs.use_scope(config)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    before = {key: value.clone() for key, value in model.named_parameters()}
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    losses: dict[str, Any] = model.train().train_step(next(iter(loader)), wrapper)
    assert torch.isfinite(losses["loss"])
    still = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    # a logit of no box keeps what depends on it: masks, and boxes, of images without a match
    still = [key for key in still if key.startswith("backbone.") and not key.endswith(".bias")]
    if name.startswith(SPIKING):  # norms behind neurons that keep silent have nothing to scale
        still = [key for key in still if not key.endswith("norm.weight")]
    assert still == []


def test_steps_cover_every_family() -> None:
    families = {name.rpartition("/")[0] for name in NAMES}
    assert {name.rpartition("/")[0] for name in STEPS} == families


def test_readmes_name_every_config() -> None:
    for task in ("detection", "segmentation"):
        text = (CONFIGS / task / "README.md").read_text()
        named = set(re.findall(r"\(((?!_)\w+/\w+)\.py\)", text))
        assert named == {name.partition("/")[2] for name in NAMES if name.startswith(task)}
