"""Plain vision transformers: one stage of tokens `(B, 1 + N, C)`, the class token first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..ops.partition import Size, to_size
from ._base import Backbone
from ._checkpoint import logger
from ._layers import channels_last_conv, image_to_map


def positions(table: Tensor, native: Size, size: Size, num_prefix: int = 0) -> Tensor:
    """A position table `(1, prefix + N, C)` of a map of size `native`, resampled for `size` where that differs."""
    if not torch.compiler.is_compiling() and size == native:  # a traced size may be any: no branch
        return table
    prefix, table = table[:, :num_prefix], table[:, num_prefix:].unflatten(1, native).permute(0, 3, 1, 2)
    table = F.interpolate(table, size, mode="bicubic", antialias=True)
    return torch.cat((prefix, table.flatten(2).transpose(1, 2)), 1)


def adapt_positions(key: str, table: Tensor, size: Size, num_prefix: int = 0) -> Tensor:
    """Resample the positions `key` of a checkpoint, which are those of a square map, for a map of `size`."""
    old = math.isqrt(table.shape[1] - num_prefix)
    logger.warning("resampled %s from %dx%d to %dx%d", key, old, old, *size)
    return positions(table, (old, old), size, num_prefix)


class TokenEmbed(nn.Module):
    """Patches after a class token, with positions: image -> `(B, 1 + N, C)`; padded to whole patches."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, img_size: int | Size) -> None:
        super().__init__()
        height, width = to_size(img_size, "img_size")
        self.patch_size, self.size = patch_size, (-(-height // patch_size), -(-width // patch_size))
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, 1 + self.size[0] * self.size[1], dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last_conv(self.proj, image_to_map(x, self.patch_size))
        b, h, w, _ = x.shape
        x = torch.cat((self.cls_token.expand(b, -1, -1), x.flatten(1, 2)), 1)
        return x + positions(self.pos_embed, self.size, (h, w), num_prefix=1)


class TokenHead(nn.Module):
    """Pool tokens `(B, 1 + N, C)`, then the classifier `fc`.

    `global_pool` is `token` for the class token, `avg` or `max` over the others, or empty for all of them.

    Raises:
        ValueError: for another pooling.
    """

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        self.dim, self.drop = dim, nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if given."""
        if global_pool not in (None, "token", "avg", "max", ""):
            raise ValueError(f"global_pool={global_pool!r} is unknown; use 'token', 'avg', 'max' or ''")
        if global_pool is not None:
            self.global_pool = global_pool
        self.fc = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool:
            x = x[:, 1:].mean(1) if self.global_pool == "avg" else x[:, 1:].amax(1)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class TokenBackbone(Backbone):
    """A plain transformer with a class token; its only map is that of the other tokens."""

    patch_embed: TokenEmbed

    def build_token_head(self, dim: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """See `Backbone.build_head`."""
        head = TokenHead(dim, num_classes, global_pool, drop_rate)
        self.build_head([dim], [self.patch_embed.patch_size], num_classes, global_pool, drop_rate, head)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `(B, in_chans, H, W)` -> normalised tokens `(B, 1 + N, C)`."""
        return super().forward_features(x)

    def _collect(
        self, x: Tensor, take: Sequence[int], last: int, output_fmt: str, norm: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        size = [-(-side // self.patch_embed.patch_size) for side in x.shape[2:]]
        x = self._run_level(0, x)
        tokens = self.norm(x) if norm else x
        return x, [self._to_layout(tokens[:, 1:].unflatten(1, size), output_fmt)]

    def adapt(self, key: str, value: Tensor) -> Tensor:
        """Resample the positions of another (square) image size."""
        if not key.endswith("pos_embed"):
            return value
        return adapt_positions(key, value, self.patch_embed.size, num_prefix=1)
