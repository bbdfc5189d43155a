# Cascade Mask R-CNN with DaViT-T, 3x: Swin Transformer's detector, no numbers are published
_base_ = ["../_base_/cascade_mask_rcnn.py", "../_base_/coco_instance_3x.py"]
model = dict(
    backbone=dict(
        name="davit_tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/davit_tiny.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=None)
