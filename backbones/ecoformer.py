"""EcoFormer (arXiv 2209.09004): attention between binary codes that kernel-based hash functions give to the tokens.

Query and key are one projection, hashed to 16 signs for each head; products of codes stand for the similarity of
softmax attention, and a cost linear in the tokens follows. The hash functions are not learned by gradients but fitted
once, from the first batch. Two skeletons carry the attention, PVT v2 (arXiv 2106.13797) and Twins-SVT (arXiv
2104.13840), without what made their own attention cheap. `convert` reads the authors' files
(https://github.com/ziplab/EcoFormer, Apache-2.0).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ..ops._backend import no_autocast
from ..ops.binary import binary_sign
from ..ops.partition import pad_map
from ._base import Backbone, Stage
from ._checkpoint import rename
from ._layers import Mlp, channels_last_conv, gelu, image_to_map, init_linear
from ._registry import Family, build, register
from .davit import ConvPosEnc

ECOFORMER = Family(
    "ecoformer",
    "EcoFormer",
    "https://arxiv.org/abs/2209.09004",
    "https://github.com/ziplab/EcoFormer",
    "Apache-2.0",
)
BITS, ANCHORS = 16, 25
NEIGHBOURS = 10  # most and least similar tokens that the codes of a token are fitted to
STEPS, LR, MOMENTUM = 100, 5e-4, 0.9  # of the gradient descent on one bit
EPS = 1e-6  # least length of a token and width of a kernel that are divided by; the authors divide by any, also by 0
SIMILARITIES = 1 << 24  # computed at once while similar tokens are looked for


class KernelHash(nn.Module):
    """Binary codes of unit vectors: signs of linear functions of a Gaussian kernel between a token and anchors.

    The buffers are fitted by `learn`: `anchor` `(1, heads, anchors, dim)`, `mean` `(1, heads, 1, anchors)` of the
    kernel and `weight` `(heads, bits, anchors)`.
    """

    anchor: Tensor
    mean: Tensor
    weight: Tensor

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("anchor", F.normalize(torch.randn(1, num_heads, ANCHORS, head_dim), dim=-1))
        self.register_buffer("mean", torch.zeros(1, num_heads, 1, ANCHORS))
        self.register_buffer("weight", torch.randn(num_heads, BITS, ANCHORS))

    def kernel(self, u: Tensor) -> Tensor:
        """Kernel of the tokens `(B, heads, N, dim)` and the anchors, `(B, heads, N, anchors)`.

        Its width is the mean squared distance in this very image and head, as published, not one kept from training.
        """
        anchor = self.anchor.to(u.dtype)
        lengths = u.square().sum(-1, keepdim=True) + anchor.square().sum(-1).unsqueeze(-2)
        distance = lengths - 2 * (u @ anchor.mT)
        sigma = distance.mean((-2, -1), keepdim=True).clamp_min(EPS)
        return torch.exp(-distance / (2 * sigma))

    def forward(self, u: Tensor) -> Tensor:
        """Unit vectors `(B, heads, N, dim)` -> codes `(B, heads, N, bits)` of 1 and -1."""
        centred = self.kernel(u) - self.mean.to(u.dtype)
        return binary_sign(centred @ self.weight.to(u.dtype).mT, "clip")

    @torch.no_grad()
    def learn(self, u: Tensor) -> None:
        """Fit the hash functions to unit vectors `(B, heads, N, dim)`.

        Anchors are random tokens of the first image (again and again where it has too few). Codes should agree for
        similar tokens of an image and differ for dissimilar ones, which is asked of one bit after the other: each
        minimises `-y^T S y` for what the earlier bits left of the affinities S, with tanh instead of the sign, and is
        kept if it did better than the random bit it started from.
        """
        tokens = u.shape[2]
        self.anchor.copy_(u[:1, :, torch.randperm(tokens)[torch.arange(ANCHORS) % tokens]])
        kernel = self.kernel(u)
        self.mean.copy_(kernel.mean(2, keepdim=True).mean(0, keepdim=True))
        centred = kernel - self.mean.to(u.dtype)
        residual = Residual(affinities(u))
        for bit in range(BITS):
            start = self.weight[:, bit, :, None].to(u.dtype)
            learned = descend(start, centred, residual)
            codes = [torch.where(centred @ weight > 0, 1.0, -1.0).to(u.dtype) for weight in (start, learned)]
            better = bool(residual.loss(codes[1]) < residual.loss(codes[0]))
            if better:
                self.weight[:, bit] = learned[..., 0]
            residual.subtract(codes[better])


def affinities(u: Tensor) -> Tensor:
    """For each of the unit vectors `(B, heads, N, dim)`, `BITS` at the most similar ones of its image and head and
    `-BITS` at the least similar: a sparse matrix over all tokens, made symmetric. Never dense, for there may be many.
    """
    batch, heads, tokens, _ = u.shape
    count = min(NEIGHBOURS, tokens // 2)
    rows = max(1, SIMILARITIES // (batch * heads * tokens))
    found = []
    for part in u.split(rows, dim=2):
        similarity = part @ u.mT
        found.append(torch.cat([similarity.topk(count, largest=best).indices for best in (True, False)], -1))
    first = torch.arange(0, batch * heads * tokens, tokens, device=u.device).view(batch, heads, 1, 1)
    columns = (torch.cat(found, 2) + first).flatten()
    row = torch.arange(batch * heads * tokens, device=u.device).repeat_interleave(2 * count)
    signs = torch.tensor([0.5 * BITS, -0.5 * BITS], dtype=u.dtype, device=u.device)
    values = signs.repeat_interleave(count).repeat(batch * heads * tokens)
    index = torch.stack([torch.cat([row, columns]), torch.cat([columns, row])])
    size = (batch * heads * tokens,) * 2
    matrix = torch.sparse_coo_tensor(index, values.repeat(2), size, check_invariants=False).coalesce()
    with warnings.catch_warnings():  # that the format is in beta
        warnings.simplefilter("ignore", UserWarning)
        matrix = matrix.to_sparse_csr()
    ends, columns = matrix.crow_indices().int(), matrix.col_indices().int()  # else every product converts them
    return torch.sparse_csr_tensor(ends, columns, matrix.values(), size, check_invariants=False)


class Residual:
    """What the bits found so far leave of the affinities `(B * heads * N)^2`: `S - sum_k y_k y_k^T`, never formed."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.bits: Tensor | None = None

    def times(self, y: Tensor) -> Tensor:
        """The product with a bit `(B, heads, N, 1)` of all tokens."""
        product = (self.matrix @ y.reshape(-1, 1)).view_as(y)
        return product if self.bits is None else product - self.bits @ (self.bits.mT @ y)

    def loss(self, y: Tensor) -> Tensor:
        """`-y^T S y`, by the tokens of an image and the bits, the mean over images and heads."""
        return -(y * self.times(y)).sum((2, 3)).mean() / (BITS * y.shape[2])

    def gradient(self, y: Tensor) -> Tensor:
        """Of the loss by `y`."""
        return self.times(y) * (-2 / (BITS * y[..., 0].numel()))

    def subtract(self, y: Tensor) -> None:
        """Take off what a further bit explains."""
        self.bits = y if self.bits is None else torch.cat([self.bits, y], -1)


def descend(weight: Tensor, centred: Tensor, residual: Residual) -> Tensor:
    """`STEPS` steps of gradient descent with Nesterov's momentum on the `weight` `(heads, anchors, 1)` of one bit."""
    velocity = torch.zeros_like(weight)
    for _ in range(STEPS):
        y = torch.tanh(0.5 * (centred @ weight))
        slope = residual.gradient(y) * (0.5 - 0.5 * y.square())
        gradient = (centred.mT @ slope).sum(0)
        velocity = MOMENTUM * velocity + gradient
        weight = weight - LR * (gradient + MOMENTUM * velocity)
    return weight


class HashedAttention(nn.Module):
    """Attention with products of binary codes instead of exponentials, linear in the number of tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qk = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.hash = KernelHash(num_heads, dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        v = self._heads(self.to_v(x))
        u = self._heads(self.to_qk(x))
        with no_autocast(x):  # which would round sums over all tokens
            out = hashed_attention(self.hash(F.normalize(u, dim=-1, eps=EPS)), v)
        return self.proj(out.to(x.dtype).transpose(1, 2).reshape(x.shape))

    @torch.no_grad()
    def learn(self, x: Tensor) -> None:
        """Fit the hash functions to the input `(B, H, W, C)`."""
        u = self._heads(self.to_qk(x))
        with no_autocast(x):
            self.hash.learn(F.normalize(u, dim=-1, eps=EPS))

    def _heads(self, x: Tensor) -> Tensor:
        """`(B, H, W, C)` -> `(B, heads, N, C / heads)`, in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def hashed_attention(codes: Tensor, v: Tensor) -> Tensor:
    """Attention of codes `(B, heads, N, bits)`, for queries and keys, to values `(B, heads, N, dim)`.

    A bias of `bits + 1` keeps every similarity positive. In the sum of weighted values the authors give it to the token
    itself alone, in the sum of weights to all of them.
    """
    bias, tokens = codes.shape[-1] + 1, codes.shape[-2]
    numerator = codes @ (codes.mT @ v) + bias * v
    denominator = codes @ codes.sum(-2, keepdim=True).mT + bias * tokens
    return numerator / denominator


class Attention(nn.Module):
    """Softmax attention between all tokens, in the last stage."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).view(b, h * w, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c))


class ConvMlp(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, linear: the MLP of PVT v2, which tells positions."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(channels_last_conv(self.dwconv, self.fc1(x))))


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and with a residual; Twins' first ones end in a position encoding."""

    def __init__(self, dim: int, attn: HashedAttention | Attention, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.pos: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return self.pos(x + self.drop_path(self.mlp(self.norm2(x))))


class OverlapPatchEmbed(nn.Module):
    """PVT v2: overlapping patches, of the image 7x7 at stride 4, later 3x3 at stride 2 of a map that is normalised."""

    def __init__(self, dim: int, out_dim: int, first: bool) -> None:
        super().__init__()
        self.pre_norm = nn.Identity() if first else nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Conv2d(dim, out_dim, 7, 4, padding=3) if first else nn.Conv2d(dim, out_dim, 3, 2, padding=1)
        self.norm = nn.LayerNorm(out_dim)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = image_to_map(x) if self.first else self.pre_norm(x)
        return self.norm(channels_last_conv(self.proj, x))


class PatchEmbed(nn.Module):
    """Twins: patches side by side, 4x4 of the image or 2x2 of a map, which are padded to whole patches."""

    def __init__(self, dim: int, out_dim: int, first: bool) -> None:
        super().__init__()
        self.patch = 4 if first else 2
        self.proj = nn.Conv2d(dim, out_dim, self.patch, stride=self.patch)
        self.norm = nn.LayerNorm(out_dim)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = image_to_map(x, self.patch) if self.first else pad_map(x, (self.patch, self.patch))
        return self.norm(channels_last_conv(self.proj, x))


class EcoFormer(Backbone):
    """EcoFormer for any image size.

    The first forward in training mode of a model whose hash functions are still random fits them to its images
    (`train_hash`); `hash_trained` is saved with the weights, and set by loading the authors' files, so that this
    happens once. In evaluation mode nothing is fitted: a fresh model gives finite but arbitrary outputs.

    Args:
        skeleton: `pvt_v2`, or `twins` with plain patches and MLPs and a position encoding after the first block of
            each stage.
        dims, depths, num_heads, mlp_ratios: width, blocks, heads and widening of the MLPs of the stages. The last stage
            has softmax attention.
        num_classes, in_chans, global_pool, drop_rate (before the classifier), drop_path_rate (at the last block).

    Raises:
        ValueError: for arguments that do not fit together.
    """

    stages_name = "stages"
    hash_trained: Tensor

    def __init__(
        self,
        skeleton: str = "pvt_v2",
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if skeleton not in ("pvt_v2", "twins"):
            raise ValueError(f"skeleton={skeleton!r} is unknown; use 'pvt_v2' or 'twins'")
        if not len(dims) == len(depths) == len(num_heads) == len(mlp_ratios):
            raise ValueError(
                f"dims={dims}, depths={depths}, num_heads={num_heads}, mlp_ratios={mlp_ratios}"
                " must have one entry per stage"
            )
        if any(dim % heads for dim, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(f"dims={dims} must be multiples of num_heads={num_heads}, stage by stage")
        twins = skeleton == "twins"
        embed = PatchEmbed if twins else OverlapPatchEmbed
        drops = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = embed(in_chans, dims[0], first=True)
        self.stages = nn.ModuleList()
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            attention = Attention if i == len(dims) - 1 else HashedAttention
            mlp, hidden = Mlp if twins else ConvMlp, int(dim * mlp_ratios[i])
            blocks = [Block(dim, attention(dim, heads), mlp(dim, hidden), next(drops)) for _ in range(depths[i])]
            if twins:
                blocks[0].pos = ConvPosEnc(dim)
            self.stages.append(Stage(embed(dims[i - 1], dim, first=False) if i else nn.Identity(), blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.register_buffer("hash_trained", torch.tensor(False))
        self._hash_checked = False
        self.build_head(dims, [4 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        init_linear(module)
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / (area * module.out_channels)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """See `Backbone.embed`; a model in training mode learns its hash functions first if it has not."""
        if self.training and not self._hash_checked:
            self._train_hash_once(x)
        return super().embed(x)

    @torch.compiler.disable
    def _train_hash_once(self, x: Tensor) -> None:
        """Train the hash functions unless `hash_trained` is set; remember it, for a look at it waits for the device."""
        if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
            raise ValueError(
                f"the hash functions of this {type(self).__name__} are not known to be trained and cannot be under"
                " torch.func or torch.jit.trace; call model.train_hash(images) first"
            )
        if self.hash_trained:
            self._hash_checked = True
        elif len(x):
            self.train_hash(x)

    @torch.no_grad()
    def train_hash(self, x: Tensor) -> None:
        """Learn the hash functions of all blocks anew from images `(B, in_chans, H, W)`.

        One pass through the model as in evaluation, without gradients, in which every block learns from the tokens that
        reach it, before it answers. The random state of torch decides what is drawn and is left as it was. It takes
        1600 small steps of gradient descent a block, memory linear in the tokens and time quadratic in those of an
        image. Activation checkpointing has no part in it; `torch.compile` runs it outside the graph, so that with
        `fullgraph=True`, as for `torch.func` in training mode, it must be called beforehand. In distributed training
        every process learns from its own images, until the buffers of the first one are broadcast (the default of
        `DistributedDataParallel`).

        Raises:
            ValueError: for an empty batch.
        """
        if len(x) == 0:
            raise ValueError(f"train_hash got images {tuple(x.shape)}: an empty batch has nothing to learn from")
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.random.fork_rng(devices=[]):  # not to shift what the rest of the training draws
                self._train_stages(super().embed(x))
        finally:
            for module, mode in modes:
                module.training = mode
        self.hash_trained.fill_(True)
        self._hash_checked = True

    def _train_stages(self, x: Tensor) -> None:
        for stage in self.stages:
            x = stage.downsample(x)  # type: ignore[operator]
            for block in stage.blocks:  # type: ignore[union-attr]
                if isinstance(block.attn, HashedAttention):
                    block.attn.learn(block.norm1(x))
                x = block(x)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._hash_checked = not self.hash_trained.is_meta and bool(self.hash_trained)

    def feature_norm(self, dim: int) -> nn.Module:
        """The norm that ends a stage of PVT v2, and that Twins' dense-prediction code adds."""
        return nn.LayerNorm(dim, eps=1e-6)

    def no_weight_decay(self) -> set[str]:
        """Position encodings of Twins."""
        return {name for name, _ in self.named_parameters() if ".pos." in name}

    @staticmethod
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the end of the file."""
        return convert(state)


_CONVERT = [
    (r"^patch_embed1\.", "patch_embed."),
    *((rf"^patch_embed{i + 1}\.", f"stages.{i}.downsample.") for i in (1, 2, 3)),
    *((rf"^norm{i}\.", f"stages.{i}.downsample.pre_norm.") for i in (1, 2, 3)),
    *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"^norm4\.", "norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^patch_embeds\.0\.", "patch_embed."),  # from here on Twins
    (r"^patch_embeds\.(\d)\.", r"stages.\1.downsample."),
    (r"^blocks\.(\d)\.", r"stages.\1.blocks."),
    (r"^pos_block\.(\d)\.proj\.0\.", r"stages.\1.blocks.0.pos.proj."),
    (r"\.fast_attention\.ksh\.anchor$", ".hash.anchor"),
    (r"\.fast_attention\.ksh\.mvec$", ".hash.mean"),
    (r"\.fast_attention\.ksh\.A$", ".hash.weight"),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> ours. Their files hold trained hash functions, and matrices that their code never uses."""
    out = {rename(k, _CONVERT): v for k, v in state.items() if not k.endswith(".fast_attention.projection_matrix")}
    if any(".fast_attention.ksh." in key for key in state):
        out["hash_trained"] = torch.tensor(True)
    return out


def from_softmax(model: EcoFormer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the training of `model` starts from: its state dict with weights of the network with softmax attention.

    That network, trained first by the authors, has softmax attention in all stages (`pvt_v2_*_msa` and
    `alt_gvt_*_sra_to_msa` in their code). Query rows of its joint projections become `to_qk`, value rows `to_v`; hash
    functions stay as `model` has them.

    Args:
        state: the authors' state dict of it.

    Raises:
        ValueError: if keys are missing or left over; the first ones are named.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, HashedAttention)}
    out = {key: value for key, value in model.state_dict().items() if ".hash." in key or key == "hash_trained"}
    for key, value in convert(dict(state)).items():
        layer, _, leaf = key.partition(".qkv.")
        if layer in layers:
            out[f"{layer}.to_qk.{leaf}"], _, out[f"{layer}.to_v.{leaf}"] = value.chunk(3)
        else:
            out[key] = value
    if different := sorted(out.keys() ^ model.state_dict().keys()):
        raise ValueError(
            f"{len(different)} keys are missing or left over ({', '.join(different[:6])}): this is not the state dict"
            f" of {model.pretrained_cfg['architecture']} with softmax attention"
        )
    return out


_TWINS = dict(dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16), mlp_ratios=(4.0, 4.0, 4.0, 4.0))


@register(ECOFORMER, params=3.1, gmacs=0.55, top1=70.44)
def ecoformer_pvt_v2_b0(**kwargs: Any) -> nn.Module:
    """EcoFormer on PVT v2-B0."""
    return build(EcoFormer, dict(dims=(32, 64, 160, 256)), kwargs)


@register(ECOFORMER, params=11.9, gmacs=2.1, top1=78.38)
def ecoformer_pvt_v2_b1(**kwargs: Any) -> nn.Module:
    """EcoFormer on PVT v2-B1."""
    return build(EcoFormer, dict(), kwargs)


@register(ECOFORMER, params=20.4, gmacs=3.9, top1=81.28)
def ecoformer_pvt_v2_b2(**kwargs: Any) -> nn.Module:
    """EcoFormer on PVT v2-B2."""
    return build(EcoFormer, dict(depths=(3, 4, 6, 3)), kwargs)


@register(ECOFORMER, params=21.5, gmacs=2.8, top1=80.22)
def ecoformer_twins_svt_small(**kwargs: Any) -> nn.Module:
    """EcoFormer on Twins-SVT-S."""
    return build(EcoFormer, dict(_TWINS, skeleton="twins", depths=(2, 2, 10, 4)), kwargs)
