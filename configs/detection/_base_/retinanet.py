# The pyramid begins at stride 8, so the backbone leaves out its first stage; the parameters are those of start_level=1
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
model = dict(
    backbone=dict(_delete_=True, type="StriateBackbone", out_indices=(1, 2, 3), feature_norms=True),
    neck=dict(start_level=0),
)
