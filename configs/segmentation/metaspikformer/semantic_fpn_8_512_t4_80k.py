# Semantic FPN with Meta-SpikeFormer-55M in 4 time steps, trained in one before; it stops half way through its schedule
# (BICLab/Spike-Driven-Transformer-V2)
_base_ = "./semantic_fpn_8_512_160k.py"
model = dict(backbone=dict(timesteps=4, init_cfg=dict(checkpoint="work_dirs/semantic_fpn_8_512_160k/iter_160000.pth")))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05), paramwise_cfg=dict(custom_keys={"neck": dict(lr_mult=2.0)}))
train_cfg = dict(max_iters=80000)
