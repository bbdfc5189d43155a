# RetinaNet with BiFormer-S, 1x (rayleizhu/BiFormer)
_base_ = ["../_base_/retinanet.py", "../_base_/coco_boxes.py"]
model = dict(
    backbone=dict(
        name="biformer_small",
        num_regions=16,
        norm_eval=True,
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_small_in1k.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4), paramwise_cfg=None)
