# As ade20k.py for spiking necks and heads, which learn faster
_base_ = "./ade20k.py"
custom_imports = dict(
    imports=["striate.segmentation.mmseg", "striate.segmentation.spiking"], allow_failed_imports=False
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.005),
    paramwise_cfg=dict(_delete_=True, custom_keys={"head": dict(lr_mult=2.0)}),
)
