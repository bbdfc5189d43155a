# Semantic FPN with Meta-SpikeFormer-55M in 4 time steps, trained in one before; it stops half way through its schedule
# (BICLab/Spike-Driven-Transformer-V2)
_base_ = ["../_base_/spiking_fpn.py", "../_base_/ade20k_spiking.py"]
model = dict(
    backbone=dict(
        name="metaspikformer_8_512",
        timesteps=4,
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/semantic_fpn_8_512_160k/iter_160000.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 640], out_channels=256),
    decode_head=dict(in_channels=[256, 256, 256, 256], channels=256),
)
train_dataloader = dict(batch_size=5)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05), paramwise_cfg=dict(custom_keys={"neck": dict(lr_mult=2.0)}))
train_cfg = dict(max_iters=80000)
