# Semantic FPN with BiFormer-S (rayleizhu/BiFormer)
_base_ = ["../_base_/semantic_fpn.py", "../_base_/ade20k_80k.py"]
model = dict(
    backbone=dict(
        name="biformer_small",
        num_regions=8,
        drop_path_rate=0.15,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_small_in1k.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
train_dataloader = dict(batch_size=4)  # of 8 processes
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, by_epoch=False, begin=0, end=80000),
]
