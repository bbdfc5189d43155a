# Semantic FPN with Meta-SpikeFormer-15M in one time step (BICLab/Spike-Driven-Transformer-V2)
_base_ = ["../_base_/spiking_fpn.py", "../_base_/ade20k_spiking.py"]
model = dict(
    backbone=dict(
        name="metaspikformer_15m",
        timesteps=1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/metaspikformer_15m_t1.pth"),
    ),
    neck=dict(in_channels=[32, 64, 128, 360], out_channels=128),
    decode_head=dict(in_channels=[128, 128, 128, 128], channels=128),
)
train_dataloader = dict(batch_size=1)
