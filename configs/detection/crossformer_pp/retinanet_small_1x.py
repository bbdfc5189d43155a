# RetinaNet with CrossFormer++-S, 1x (cheerss/CrossFormer)
_base_ = ["../_base_/retinanet.py", "../_base_/coco_boxes.py"]
model = dict(
    backbone=dict(
        name="crossformer_pp_small",
        feature_norms=False,
        group_size=(7, 7, 7, 7),
        interval=(8, 4, 2, 1),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/crossformer-pp-s.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4), paramwise_cfg=None)
