"""The adapter on the packages as OpenMMLab left them: the same file, the same config."""

from __future__ import annotations

from importlib.metadata import version

from mm import jobs


def test_mask_rcnn(drawn, tmp_path) -> None:
    assert version("mmdet") == "3.3.0"
    config = jobs.shrink("detection/swin/mask_rcnn_tiny_1x", drawn, tmp_path / "run")
    config.model.test_cfg.rcnn.score_thr = 0.0
    first = jobs.runner(jobs.last_for(config, 2, 4))
    first.train()
    rest = jobs.last_for(config, 4)
    rest.resume = True
    second = jobs.runner(rest)
    second.train()
    assert second.iter == 4
    test = jobs.last_for(config, 4)
    test.load_from = str(tmp_path / "run" / "iter_4.pth")
    metrics = jobs.runner(test).test()
    assert {"coco/bbox_mAP_50", "coco/segm_mAP_50"} <= metrics.keys()


def test_upernet(drawn, tmp_path) -> None:
    assert version("mmsegmentation") == "1.2.2"
    config = jobs.shrink("segmentation/swin/upernet_tiny_160k", drawn, tmp_path / "run")
    jobs.runner(jobs.last_for(config, 2)).train()
    test = jobs.last_for(config, 2)
    test.load_from = str(tmp_path / "run" / "iter_2.pth")
    assert jobs.runner(test).test()["mIoU"] > 0
