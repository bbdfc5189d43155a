# Cascade Mask R-CNN with Swin-B, 3x (SwinTransformer/Swin-Transformer-Object-Detection)
_base_ = ["../_base_/cascade_mask_rcnn.py", "../_base_/coco_instance_3x.py"]
model = dict(
    backbone=dict(
        name="swin_base",
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth",
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
