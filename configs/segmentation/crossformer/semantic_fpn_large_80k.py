# Semantic FPN with CrossFormer-L (cheerss/CrossFormer)
_base_ = ["../_base_/semantic_fpn.py", "../_base_/ade20k_80k.py"]
model = dict(
    backbone=dict(
        name="crossformer_large",
        feature_norms=False,
        group_size=(14, 14, 7, 7),
        interval=(16, 8, 2, 1),
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/crossformer-l.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
