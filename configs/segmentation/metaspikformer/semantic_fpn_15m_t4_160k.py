# Semantic FPN with Meta-SpikeFormer-15M in 4 time steps, trained in one before (BICLab/Spike-Driven-Transformer-V2)
_base_ = "./semantic_fpn_15m_160k.py"
model = dict(backbone=dict(timesteps=4, init_cfg=dict(checkpoint="work_dirs/semantic_fpn_15m_160k/iter_160000.pth")))
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"neck": dict(lr_mult=2.0)}))
