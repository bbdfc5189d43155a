"""Whole jobs on drawn images through mmengine's Runner: train, checkpoint, resume, test; two of them until they see."""

from __future__ import annotations

import math

import pytest
import torch

import striate
from mm import jobs

JOBS = {
    "retinanet_biformer": ("detection/biformer/retinanet_small_1x", None, 2e-3, 220),
    "mask_rcnn_biformer": ("detection/biformer/mask_rcnn_small_1x", None, 1e-3, 6),
    "semantic_fpn_swin": ("segmentation/crossformer/semantic_fpn_small_80k", "swin", 1e-3, 120),
    "upernet_vig_h": ("segmentation/vig/upernet_h_tiny_160k", None, 1e-3, 6),
}
METRIC = {"detection": "coco/bbox_mAP_50", "segmentation": "mIoU"}
LEARNED = {"retinanet_biformer": 0.40, "semantic_fpn_swin": 50.0}


@pytest.mark.parametrize("job", list(JOBS))
def test_train_resume_test(job, drawn, tmp_path) -> None:
    name, family, lr, iterations = JOBS[job]
    config = jobs.shrink(name, drawn, tmp_path / job, lr=lr, family=family)
    if "norm_eval" in config.model.backbone:
        config.model.backbone.norm_eval = False  # statistics of a fresh model are not worth keeping
    if "bbox_head" in config.model or "roi_head" in config.model:
        jobs.change(config.model.test_cfg, {"score_thr": lambda old: 0.0})  # a few iterations give low scores
    half = iterations // 2
    first = jobs.runner(jobs.last_for(config, half, iterations))
    first.train()
    saved = torch.load(tmp_path / job / f"iter_{half}.pth", weights_only=False)["state_dict"]
    assert saved.keys() == first.model.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in first.model.state_dict().items())

    rest = jobs.last_for(config, iterations, iterations)
    rest.resume = True
    second = jobs.runner(rest)
    second.train()
    assert second.iter == iterations
    steps = [int(state["step"]) for state in second.optim_wrapper.optimizer.state_dict()["state"].values()]
    assert max(steps) == iterations

    test = jobs.last_for(config, iterations)
    test.load_from = str(tmp_path / job / f"iter_{iterations}.pth")
    third = jobs.runner(test)
    metrics = third.test()
    assert all(torch.equal(a, b) for a, b in zip(third.model.parameters(), second.model.parameters(), strict=True))
    score = float(metrics[METRIC[name.split("/")[0]]])
    assert math.isfinite(score)
    assert score >= LEARNED.get(job, 0.0)
    if job == "mask_rcnn_biformer":
        assert math.isfinite(metrics["coco/segm_mAP_50"])


def test_the_backbone_of_a_run_is_a_model_of_ours(drawn, tmp_path) -> None:
    config = jobs.shrink("segmentation/swin/upernet_tiny_160k", drawn, tmp_path / "run")
    trained = jobs.runner(jobs.last_for(config, 1))
    trained.train()
    arch = {key: value for key, value in jobs.SMALL["swin"].items() if key != "name"}
    model = striate.create_model("swin_tiny", features_only=True, feature_norms=True, **arch)
    striate.load_checkpoint(model, {"state_dict": trained.model.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    trained.model.eval()
    for ours, theirs in zip(model.eval()(x), trained.model.backbone(x), strict=True):
        assert torch.equal(ours, theirs)
