# UPerNet with DaViT-S (dingmyu/davit)
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py"]
model = dict(
    backbone=dict(
        name="davit_small",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/davit_small.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=None)
