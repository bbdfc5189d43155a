# Mask R-CNN with Meta-SpikeFormer-55M in one time step, 3x (BICLab/Spike-Driven-Transformer-V2)
_base_ = "./mask_rcnn_15m_3x.py"
model = dict(
    backbone=dict(
        name="metaspikformer_8_512",
        init_cfg=dict(checkpoint="checkpoints/metaspikformer_55m_t1.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 640]),
)
