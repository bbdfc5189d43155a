# Mask R-CNN with CrossFormer-S, 1x (cheerss/CrossFormer)
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_instance.py"]
model = dict(
    backbone=dict(
        name="crossformer_small",
        feature_norms=False,
        group_size=(7, 7, 7, 7),
        interval=(8, 4, 2, 1),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/crossformer-s.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4), paramwise_cfg=None)
