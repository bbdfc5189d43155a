# UPerNet with CrossFormer-L (cheerss/CrossFormer)
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py"]
model = dict(
    backbone=dict(
        name="crossformer_large",
        feature_norms=False,
        group_size=(7, 7, 7, 7),
        interval=(8, 4, 2, 1),
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/crossformer-l.pth"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
