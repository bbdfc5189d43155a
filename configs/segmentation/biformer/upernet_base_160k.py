# UPerNet with BiFormer-B (rayleizhu/BiFormer)
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py"]
model = dict(
    backbone=dict(
        name="biformer_base",
        num_regions=8,
        drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_base_in1k.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
