# Cascade Mask R-CNN with Swin-S, 3x (SwinTransformer/Swin-Transformer-Object-Detection)
_base_ = ["../_base_/cascade_mask_rcnn.py", "../_base_/coco_instance_3x.py"]
model = dict(
    backbone=dict(
        name="swin_small",
        drop_path_rate=0.2,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
