# Semantic FPN with spiking neck and head, on maps of stride 2, 4, 8 and 16, which the authors declare twice as large
_base_ = "./semantic_fpn.py"
model = dict(
    backbone=dict(feature_norms=False, out_indices=(0, 1, 2, 4)),
    neck=dict(type="SpikeFPN"),
    decode_head=dict(type="SpikeFPNHead", act_cfg=None, dropout_ratio=0.0),
)
