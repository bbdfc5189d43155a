# Mask R-CNN with DaViT-S, 1x (dingmyu/davit)
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_instance_multi_scale.py"]
model = dict(
    backbone=dict(
        name="davit_small",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/davit_small.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=None)
