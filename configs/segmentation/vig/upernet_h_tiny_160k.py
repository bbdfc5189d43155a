# UPerNet with ViG-H-T: Swin Transformer's recipe, the authors publish none
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py"]
model = dict(
    backbone=dict(
        name="vig_h_tiny",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vig_h_tiny.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
