# Mask R-CNN with QSD-Transformer-15M, 15 epochs (bollossom/QSD-Transformer); neck and heads are Meta-SpikeFormer's
_base_ = ["../_base_/spiking_mask_rcnn.py", "../_base_/coco_instance_multi_scale.py"]
custom_imports = dict(imports=["striate.detection.mmdet", "striate.detection.spiking"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        name="qsd_transformer_15m",
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/qsd_transformer_15m_w4.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 360]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
train_cfg = dict(max_epochs=15)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=15, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
