# Mask R-CNN with BiFormer-B, 1x (rayleizhu/BiFormer)
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_instance.py"]
model = dict(
    backbone=dict(
        name="biformer_base",
        num_regions=16,
        norm_eval=True,
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_base_in1k.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
