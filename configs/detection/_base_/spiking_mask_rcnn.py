# Mask R-CNN with spiking neck and heads. The last map has stride 16, which its authors declare as 32
_base_ = "./mask_rcnn.py"
model = dict(
    backbone=dict(feature_norms=False, out_indices=(1, 2, 3, 4)),
    neck=dict(type="SpikeFPN"),
    rpn_head=dict(type="SpikeRPNHead"),
    roi_head=dict(bbox_head=dict(type="SharedSpike2FCBBoxHead"), mask_head=dict(type="SpikeFCNMaskHead")),
)
