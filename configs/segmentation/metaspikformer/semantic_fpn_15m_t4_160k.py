# Semantic FPN with Meta-SpikeFormer-15M in 4 time steps, trained in one before (BICLab/Spike-Driven-Transformer-V2)
_base_ = ["../_base_/spiking_fpn.py", "../_base_/ade20k_spiking.py"]
model = dict(
    backbone=dict(
        name="metaspikformer_15m",
        timesteps=4,
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/semantic_fpn_15m_160k/iter_160000.pth"),
    ),
    neck=dict(in_channels=[32, 64, 128, 360], out_channels=128),
    decode_head=dict(in_channels=[128, 128, 128, 128], channels=128),
)
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"neck": dict(lr_mult=2.0)}))
