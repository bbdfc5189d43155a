# Mask R-CNN with Swin-T, 1x (SwinTransformer/Swin-Transformer-Object-Detection)
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_instance_multi_scale.py"]
model = dict(
    backbone=dict(
        name="swin_tiny",
        drop_path_rate=0.1,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
