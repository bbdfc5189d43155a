# RetinaNet with DaViT-B, 1x (dingmyu/davit)
_base_ = ["../_base_/retinanet.py", "../_base_/coco_boxes_multi_scale.py"]
model = dict(
    backbone=dict(
        name="davit_base",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/davit_base.pth"),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
optim_wrapper = dict(paramwise_cfg=None)
