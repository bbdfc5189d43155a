# Semantic FPN with QSD-Transformer-15M (bollossom/QSD-Transformer); integer neurons and batch norms in the neck
_base_ = ["../_base_/spiking_fpn.py", "../_base_/ade20k_spiking.py"]
model = dict(
    backbone=dict(
        name="qsd_transformer_15m",
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/qsd_transformer_15m_w4.pth"),
    ),
    neck=dict(
        in_channels=[32, 64, 128, 360],
        out_channels=128,
        levels=4,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
    ),
    decode_head=dict(in_channels=[128, 128, 128, 128], channels=128, levels=4),
)
train_dataloader = dict(batch_size=16)
