# UPerNet with CrossFormer++-S (cheerss/CrossFormer)
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py"]
model = dict(
    backbone=dict(
        name="crossformer_pp_small",
        feature_norms=False,
        group_size=(7, 7, 7, 7),
        interval=(8, 4, 2, 1),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/crossformer-pp-s.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
