# Semantic FPN with Meta-SpikeFormer-55M in one time step (BICLab/Spike-Driven-Transformer-V2)
_base_ = ["../_base_/spiking_fpn.py", "../_base_/ade20k_spiking.py"]
model = dict(
    backbone=dict(
        name="metaspikformer_8_512",
        timesteps=1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/metaspikformer_55m_t1.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 640], out_channels=256),
    decode_head=dict(in_channels=[256, 256, 256, 256], channels=256),
)
train_dataloader = dict(batch_size=5)
