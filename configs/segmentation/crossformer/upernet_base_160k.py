# UPerNet with CrossFormer-B (cheerss/CrossFormer)
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py"]
model = dict(
    backbone=dict(
        name="crossformer_base",
        feature_norms=False,
        group_size=(7, 7, 7, 7),
        interval=(8, 4, 2, 1),
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/crossformer-b.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
