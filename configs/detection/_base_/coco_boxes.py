# COCO with boxes, shorter side 800, 12 epochs of 16 images a step (8 processes of 2), AdamW
_base_ = [
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["striate.detection.mmdet"], allow_failed_imports=False)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            "relative_position_bias_table": dict(decay_mult=0.0),
            "pos_embed": dict(decay_mult=0.0),
        },
    ),
)
