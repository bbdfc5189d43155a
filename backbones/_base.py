"""The contract every backbone honours: timm's, once for all families.

A family gives a `stem`, a list of stages and a final `norm`, and says in which layout its maps travel; everything a
user calls is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from timm.layers import ClassifierHead, NormMlpClassifierHead
from timm.models import FeatureInfo
from torch import Tensor, nn

CACHE_BYTES = 10 << 20  # hidden layer of an MLP: 4 to 12 MB measured alike, the whole batch of 8 is 1.2 times slower


class Stage(nn.Module):
    """Optional downsampling followed by blocks, with activation checkpointing per block."""

    batch_axis = 0

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        images = self._images_at_once(x)
        if images and images < x.shape[self.batch_axis]:
            return torch.cat([self._run(part) for part in x.split(images, self.batch_axis)], self.batch_axis)
        return self._run(x)

    def _images_at_once(self, x: Tensor) -> int:
        """How many images keep the widest activation in cache during inference on a CPU; 0 for all of them."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.training or torch.is_grad_enabled() or traced or x.device.type != "cpu":
            return 0
        return max(1, CACHE_BYTES * x.shape[self.batch_axis] // max(1, 4 * x.numel() * x.element_size()))

    def _run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Backbone(nn.Module):
    """Base of all backbones.

    A subclass sets `stem_name`, `stages_name`, `output_fmt`, builds those modules and `norm`, and calls `build_head`.

    Attributes:
        num_classes: outputs of the classifier; 0 for none.
        num_features: channels of the last stage; head_hidden_size: of what the classifier reads.
        feature_info: per stage `num_chs`, `reduction` (stride) and `module`, known before the first forward.
        output_fmt: layout of the maps inside, `NHWC` or `NCHW`; what `forward_features` returns.
        model_args: the arguments that make this model from its name, as saved to a hub.
        pretrained_cfg: timm's description of input, normalisation and classifier.
    """

    stem_name = "patch_embed"
    stages_name = "layers"
    output_fmt = "NHWC"
    stem_stride = 0  # of the stem's map where it is the first level of the pyramid

    norm: nn.Module
    head: ClassifierHead | NormMlpClassifierHead
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def build_head(
        self,
        dims: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        head: nn.Module | None = None,
    ) -> None:
        """Finish construction: describe the stages and add the classifier, timm's linear one or `head`."""
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = dims[-1]
        names = [f"{self.stages_name}.{i}" for i in range(len(self.stage_list))]
        if self.stem_stride:
            names.insert(0, self.stem_name)
        self.feature_info = [
            dict(num_chs=dim, reduction=stride, module=name)
            for dim, stride, name in zip(dims, strides, names, strict=True)
        ]
        if head is None:
            head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt)
        self.head = head

    def embed(self, x: Tensor) -> Tensor:
        """Image `(B, in_chans, H, W)` -> first map in `output_fmt`."""
        return self.get_submodule(self.stem_name)(x)

    @property
    def stage_list(self) -> nn.ModuleList:
        return getattr(self, self.stages_name)

    def feature_norm(self, dim: int) -> nn.Module:
        """The norm that the paper's dense-prediction code puts on a returned map; it takes `(B, H, W, C)`."""
        return nn.LayerNorm(dim)

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published keys -> ours; ours pass unchanged. Each family has its own."""
        raise NotImplementedError

    def complete(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add what a checkpoint of a simpler model, with our keys, lacks, and drop what this model does not have."""
        return state

    def adapt(self, key: str, value: Tensor) -> Tensor:
        """Fit a checkpoint's tensor to this model's shape where that has a meaning (position tables)."""
        return value

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `(B, in_chans, H, W)` -> normalised last map, in `output_fmt`."""
        x = self.embed(x)
        for stage in self.stage_list:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map -> logits `(B, num_classes)`, or the pooled features `(B, num_features)`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Image `(B, in_chans, H, W)` -> logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the chosen stages, finest first.

        Args:
            x: image `(B, in_chans, H, W)`.
            indices: stages to take: a list (negative from the end), the last n, or None for all.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run stages after the last one taken.
            output_fmt: `NCHW` (contiguous) or `NHWC`.
            intermediates_only: return the list alone, else `(forward_features(x), list)`.

        Raises:
            ValueError: for an index out of range or another layout.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}; use 'NCHW' or 'NHWC'")
        take = self._take_indices(indices)
        last = max(take) if stop_early else self._num_levels() - 1
        x, maps = self._collect(x, take, last, output_fmt, norm)
        if intermediates_only:
            return maps
        return (self.norm(x) if last == len(self.feature_info) - 1 else x), maps

    def _collect(
        self, x: Tensor, take: Sequence[int], last: int, output_fmt: str, norm: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Run levels 0 to `last`: the map after it and those of the levels in `take`."""
        maps = []
        for level in range(last + 1):
            x = self.embed(x) if level == 0 and self.stem_stride else self._run_level(level, x)
            if level in take:
                final = norm and level == len(self.feature_info) - 1
                maps.append(self._to_layout(self.norm(x) if final else x, output_fmt))
        return x, maps

    def _num_levels(self) -> int:
        return len(self.stage_list) + bool(self.stem_stride)

    def _run_level(self, level: int, x: Tensor) -> Tensor:
        if self.stem_stride:
            return self.stage_list[level - 1](x)
        return self.stage_list[level](self.embed(x) if level == 0 else x)

    def _take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = self._num_levels()
        if indices is None:
            return list(range(count))
        wanted = range(count - indices, count) if isinstance(indices, int) else [i + count * (i < 0) for i in indices]
        if not wanted or not all(0 <= i < count for i in wanted):
            raise ValueError(f"indices={indices!r} out of range: the model has levels 0 to {count - 1}")
        return sorted(set(wanted))

    def _to_layout(self, x: Tensor, layout: str) -> Tensor:
        if layout == self.output_fmt:
            return x.contiguous()
        return x.permute((0, 3, 1, 2) if layout == "NCHW" else (0, 2, 3, 1)).contiguous()

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one in `indices`, and the norm and head if asked; returns the indices."""
        take = self._take_indices(indices)
        setattr(self, self.stages_name, self.stage_list[: max(take) + (0 if self.stem_stride else 1)])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity."""
        return self.head.get_submodule("fc")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of `num_classes` outputs (0: none)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.reset(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward instead of keeping its activations."""
        for stage in self.stage_list:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer decay in timm's form: stem, blocks in order, norm."""
        stages = self.stages_name
        blocks = [(rf"^{stages}\.(\d+)\.downsample", (0,)), (rf"^{stages}\.(\d+)\.blocks\.(\d+)", None)]
        return dict(
            stem=rf"^{self.stem_name}",
            blocks=rf"^{stages}\.(\d+)" if coarse else [*blocks, (r"^norm", (99999,))],
        )

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, beyond biases and vectors."""
        return set()


class FeaturePyramid(nn.Module):
    """A backbone for dense prediction: image -> list of contiguous NCHW maps, for any image size.

    Args:
        backbone: the model; its head and final norm are removed.
        out_indices: stages to return; negative ones count from the end.
        feature_norms: normalise each returned map as the paper's detection and segmentation code does; the
            un-normalised map goes on to the next stage.
        keep_time: of a spiking backbone, return the maps of every step, not their mean.

    Raises:
        ValueError: for a stage that the backbone does not have, or `keep_time` of one that does not spike.

    Attributes:
        feature_info: timm's `FeatureInfo`: `channels()` and `reduction()` of the returned maps.
        norms: the norm of each returned map, by stage.
    """

    def __init__(
        self,
        backbone: Backbone,
        out_indices: Sequence[int] | int | None = None,
        feature_norms: bool = False,
        keep_time: bool = False,
    ) -> None:
        super().__init__()
        if keep_time and not hasattr(backbone, "keep_time"):
            raise ValueError(f"keep_time=True: a {type(backbone).__name__} has no time steps; leave it out")
        if keep_time:
            backbone.keep_time = True  # type: ignore[assignment]
        self.out_indices = tuple(backbone._take_indices(out_indices))
        self.feature_info = FeatureInfo(backbone.feature_info, self.out_indices)
        backbone.prune_intermediate_layers(self.out_indices, prune_norm=True)
        backbone.head = nn.Identity()
        self.backbone = backbone
        dims = zip(self.out_indices, self.feature_info.channels(), strict=True)
        self.norms = nn.ModuleDict({str(i): backbone.feature_norm(dim) for i, dim in dims}) if feature_norms else None
        self.pretrained_cfg = self.default_cfg = backbone.pretrained_cfg

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image `(B, in_chans, H, W)` -> maps `(B, C_i, H / s_i, W / s_i)`, sizes rounded up.

        BiFormer-STL and plain ViG round down, as published. With `keep_time`, the maps are `(T, B, C_i, …)`.
        """
        layout = "NCHW" if self.norms is None else "NHWC"
        _, maps = self.backbone._collect(x, self.out_indices, max(self.out_indices), layout)
        if self.norms is None:
            return maps
        return [norm(m).movedim(-1, -3).contiguous() for norm, m in zip(self.norms.values(), maps, strict=True)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Backbone.set_grad_checkpointing`."""
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """See `Backbone.group_matcher`."""
        groups = self.backbone.group_matcher(coarse)
        blocks = groups["blocks"]
        inside = (
            blocks.replace("^", r"^backbone\.")
            if coarse
            else [(pattern.replace("^", r"^backbone\."), order) for pattern, order in blocks]
        )
        return dict(stem=groups["stem"].replace("^", r"^backbone\."), blocks=inside)

    def no_weight_decay(self) -> set[str]:
        """See `Backbone.no_weight_decay`."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
