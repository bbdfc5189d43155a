# Mask R-CNN with Meta-SpikeFormer-55M in one time step, 3x: the schedule of the authors' Cascade R-CNN, as they came to
# this one in several short runs (BICLab/Spike-Driven-Transformer-V2)
_base_ = ["../_base_/spiking_mask_rcnn.py", "../_base_/coco_instance_3x.py"]
custom_imports = dict(imports=["striate.detection.mmdet", "striate.detection.spiking"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        name="metaspikformer_8_512",
        timesteps=1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/metaspikformer_55m_t1.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 640]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
