"""Every backbone for mmdetection and mmsegmentation, and learning rates that decay from layer to layer.

A config names this module, then the backbone by its registered name:

    custom_imports = dict(imports=["striate.detection.mmdet"], allow_failed_imports=False)
    model = dict(
        backbone=dict(
            _delete_=True,
            type="StriateBackbone",
            name="swin_tiny",
            feature_norms=True,
            drop_path_rate=0.2,
            init_cfg=dict(type="Pretrained", checkpoint="swin_tiny_patch4_window7_224.pth"),
        ),
        neck=dict(in_channels=[96, 192, 384, 768]),
    )

Both classes are in mmengine's root registries, where mmdetection and mmsegmentation find them under their plain names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from timm.models._hub import download_cached_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones import CheckpointError, FeaturePyramid, load_checkpoint
from ..backbones._reading import read_file
from ..hub.sources import HUB, LOCAL, WEIGHTS, Repository, parse_source
from ._pyramid import create_pyramid, pyramid_maps

logger = logging.getLogger("striate")


@MODELS.register_module()
class StriateBackbone(BaseModule):
    """A backbone of `striate.create_model` as mmdetection and mmsegmentation use it.

    Its state dict has the keys of the backbone itself (`layers.0.…`, `norms.0.…`), so that `striate.create_model(name,
    features_only=True, feature_norms=True, checkpoint_path=FILE)` reads the weights out of a detector's; in return,
    a whole detector with the keys of the authors' backbone can be given to `load_from`.

    Args:
        name: of one of our models or timm's, or `hf-hub:org/name`, `local-dir:PATH`, whose weights are then loaded.
        out_indices: stages to return, ascending, negative ones from the end.
        feature_norms: normalise each returned map, as the dense code of Swin, DaViT, BiFormer and ViG does.
        frozen_stages: train neither the stem nor the first so many stages; 0 freezes the stem alone, -1 nothing.
        norm_eval: keep batch norms in evaluation mode: their statistics stay, their weights learn.
        drop_path_rate: of stochastic depth.
        with_cp: recompute blocks in the backward instead of keeping their activations.
        init_cfg: `dict(type="Pretrained", checkpoint=…)` with a file of ours or the authors' (of classification or
            of a detector), an address of one, or `hf-hub:org/name`; by default the paper's initialisation.
        **kwargs: further arguments of the model: `num_regions`, `window`, `keep_time`, `pretrained`, …

    Raises:
        ValueError: for an unknown name, a stage that the model does not have, an argument that it does not take, or
            another kind of `init_cfg`; by `init_weights` for weights that do not fit.

    Attributes:
        out_channels, strides: of the returned maps.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        feature_norms: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        drop_path_rate: float | None = None,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_init(init_cfg)
        if isinstance(kwargs.get("pretrained"), str):
            raise ValueError(
                f"pretrained={kwargs['pretrained']!r}: weights of this backbone are named by init_cfg=dict("
                "type='Pretrained', checkpoint=…); set `pretrained=None` in the model, which hands its own down"
            )
        super().__init__(init_cfg=None if init_cfg is None else dict(init_cfg))
        self.name, self.norm_eval, self.frozen_stages = name, norm_eval, frozen_stages
        if feature_norms:  # timm's models do not know the argument
            kwargs["feature_norms"] = True
        self._create = dict(kwargs, out_indices=out_indices, drop_path_rate=drop_path_rate)
        self.pyramid = create_pyramid(name, **self._create)
        info: Any = self.pyramid.feature_info
        self.out_channels, self.strides = tuple(info.channels()), tuple(info.reduction())
        self._freeze_stages()
        if with_cp:
            self.pyramid.set_grad_checkpointing(True)  # type: ignore[operator]
        # weights of a hub or timm are in place, and nothing may write over them
        self._is_init = init_cfg is None and (bool(kwargs.get("pretrained")) or parse_source(name) is not None)
        self.register_state_dict_post_hook(_hide_pyramid)
        self.register_load_state_dict_pre_hook(_find_pyramid)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image `(B, in_chans, H, W)` -> maps `(B, C_i, H / s_i, W / s_i)`, contiguous in that order of dimensions.

        mmcv's RoIAlign reads memory in this order whatever the strides say.
        """
        return tuple(pyramid_maps(self.pyramid, x))

    def init_weights(self) -> None:
        """Load the weights that `init_cfg` names; without one the backbone keeps the initialisation of its paper.

        Raises:
            ValueError: they cannot be found or read, or do not fit.
        """
        if self._is_init:
            return
        self._is_init = True
        if self.init_cfg:
            self._load(str(self.init_cfg["checkpoint"]))

    def train(self, mode: bool = True) -> StriateBackbone:
        """Set the mode; frozen stages, and with `norm_eval` batch norms, stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter, 0 for the stem, and one more than the largest: the depth of what follows the backbone.

        Args:
            param_name: as in `named_parameters` of the model around the backbone.
            prefix: of the backbone's parameters in there, `backbone.`.

        Raises:
            ValueError: the backbone has no such parameter, or is one of timm's that does not know its layers.
        """
        if not hasattr(self.pyramid, "group_matcher"):
            raise ValueError(f"the layers of timm's {self.name} as a pyramid have no order; leave out layer_decay")
        name = param_name.removeprefix(prefix).removeprefix("pyramid.")
        depths = group_parameters(self.pyramid, self.pyramid.group_matcher(), reverse=True)  # type: ignore[operator]
        if name not in depths:
            raise ValueError(f"no parameter {param_name!r} in {self.name}; is the prefix {prefix!r} right?")
        norms = [parameter for parameter in depths if parameter.startswith("norms.")]  # they follow the last layer
        last = max(depth for parameter, depth in depths.items() if parameter not in norms)
        return (last + 1 if name in norms else depths[name]), last + 2

    def _frozen(self) -> list[nn.Module]:
        """The stem and stages that do not train."""
        if self.frozen_stages < 0:
            return []
        backbone = self.pyramid.backbone
        return [backbone.get_submodule(backbone.stem_name), *backbone.stage_list[: self.frozen_stages]]  # type: ignore

    def _freeze_stages(self) -> None:
        if self.frozen_stages == -1:
            return
        if not isinstance(self.pyramid, FeaturePyramid):
            raise ValueError(
                f"frozen_stages={self.frozen_stages}: {self.name} is timm's, whose stages cannot be frozen"
            )
        count = len(self.pyramid.backbone.stage_list)
        if not -1 <= self.frozen_stages <= count:
            raise ValueError(f"frozen_stages={self.frozen_stages} of {self.name}: use -1 to {count}")
        stem = (self.pyramid.backbone.stem_name, "pos_embed")
        for name, parameter in self.pyramid.backbone.named_parameters():
            if name.startswith(stem):
                parameter.requires_grad = False
        for module in self._frozen():
            module.requires_grad_(False)

    def _load(self, checkpoint: str) -> None:
        path = _local_file(checkpoint)
        if isinstance(self.pyramid, FeaturePyramid):
            content = read_file(path, inert=True)  # mmengine saves objects of its own beside the weights
            try:
                load_checkpoint(self.pyramid, content)
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint}: {error}") from error
        else:  # timm loads strictly before it cuts a model into features
            overlay = dict(file=str(path))
            source = create_pyramid(
                self.name, **{**self._create, "pretrained": True, "pretrained_cfg_overlay": overlay}
            )
            self.pyramid.load_state_dict(source.state_dict())
        logger.info("loaded %s into %s", checkpoint, self.name)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """mmengine's optimizer constructor with learning rates that fall from layer to layer towards the image.

    `paramwise_cfg` takes `layer_decay`, the factor from one layer to the one before, besides what mmengine knows
    (`norm_decay_mult`, `custom_keys`, …). Whatever follows the backbone has the full rate, its last layer `layer_decay`
    times that. Parameters that the backbone excludes from weight decay have none.

        optim_wrapper = dict(
            constructor="LayerDecayConstructor",
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay=0.9, norm_decay_mult=0.0),
        )

    Raises:
        ValueError: `layer_decay` is missing or not in (0, 1]; the model has no `StriateBackbone`.
    """

    def _validate_cfg(self) -> None:
        decay = (self.paramwise_cfg or {}).get("layer_decay")
        if not isinstance(decay, (int, float)) or not 0 < decay <= 1:
            raise ValueError(f"paramwise_cfg.layer_decay={decay!r}: give a factor in (0, 1]")
        super()._validate_cfg()

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """Append one group for every parameter of `module`."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # a part of the model; the rates are scaled once, for all of it
            return
        backbones = [(name, part) for name, part in module.named_modules() if isinstance(part, StriateBackbone)]
        if not backbones:
            raise ValueError(
                f"{type(module).__name__} has no StriateBackbone, whose layers LayerDecayConstructor needs"
            )
        groups = {id(parameter): group for group in params for parameter in group["params"]}
        for _, backbone in backbones:
            self._scale(groups, backbone)

    def _scale(self, groups: dict[int, dict[str, Any]], backbone: StriateBackbone) -> None:
        undecayed = {f"pyramid.{name}" for name in backbone.pyramid.no_weight_decay()}  # type: ignore[operator]
        for name, parameter in backbone.named_parameters():
            group = groups.get(id(parameter))
            if group is None or not parameter.requires_grad:
                continue
            depth, count = backbone.get_layer_depth(name)
            group["lr"] = group.get("lr", self.base_lr) * self.paramwise_cfg["layer_decay"] ** (count - 1 - depth)
            if name in undecayed:
                group["weight_decay"] = 0.0


def _check_init(init_cfg: Mapping[str, Any] | None) -> None:
    if init_cfg is None:
        return
    if not isinstance(init_cfg, Mapping) or init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint"):
        raise ValueError(
            f"init_cfg={init_cfg!r}: a StriateBackbone starts as its paper says; to load weights give"
            " dict(type='Pretrained', checkpoint=FILE)"
        )
    if unknown := sorted(set(init_cfg) - {"type", "checkpoint", "prefix", "map_location"}):
        raise ValueError(f"init_cfg has the unknown key {', '.join(unknown)}; give type and checkpoint")


def _local_file(checkpoint: str) -> Path:
    """The file that a path, an address of the web or a source of `create_model` names.

    Raises:
        ValueError, OSError: it cannot be had.
    """
    if checkpoint.startswith((f"{HUB}:", f"{LOCAL}:")):
        source = parse_source(checkpoint)
        assert source is not None
        return Repository(source).file(WEIGHTS)
    if checkpoint.startswith(("http://", "https://")):
        return Path(download_cached_file(checkpoint))
    return Path(checkpoint).expanduser()


def _hide_pyramid(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave the wrapper out of the keys to save."""
    inside = f"{prefix}pyramid."
    for key in [key for key in state if key.startswith(inside)]:
        state[f"{prefix}{key.removeprefix(inside).removeprefix('backbone.')}"] = state.pop(key)


def _find_pyramid(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The way back, from our keys or the authors'."""
    assert isinstance(module, StriateBackbone)
    found = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    if not isinstance(module.pyramid, FeaturePyramid):
        state.update({f"{prefix}pyramid.{key}": value for key, value in found.items()})
        return
    for key, value in module.pyramid.backbone.convert(found).items():
        inside = key if key.startswith("norms.") else f"backbone.{key}"
        state[f"{prefix}pyramid.{inside}"] = value
