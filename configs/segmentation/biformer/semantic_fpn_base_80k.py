# Semantic FPN with BiFormer-B (rayleizhu/BiFormer)
_base_ = ["../_base_/semantic_fpn.py", "../_base_/ade20k_80k.py"]
model = dict(
    backbone=dict(
        name="biformer_base",
        num_regions=8,
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_base_in1k.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
train_dataloader = dict(batch_size=4)  # of 8 processes
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, by_epoch=False, begin=0, end=80000),
]
