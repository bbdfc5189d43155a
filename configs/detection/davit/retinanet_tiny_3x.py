# RetinaNet with DaViT-T, 3x (dingmyu/davit)
_base_ = ["../_base_/retinanet.py", "../_base_/coco_boxes_3x.py"]
model = dict(
    backbone=dict(
        name="davit_tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/davit_tiny.pth"),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=None)
