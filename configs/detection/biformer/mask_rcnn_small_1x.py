# Mask R-CNN with BiFormer-S, 1x (rayleizhu/BiFormer)
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_instance.py"]
model = dict(
    backbone=dict(
        name="biformer_small",
        num_regions=16,
        norm_eval=True,
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_small_in1k.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
