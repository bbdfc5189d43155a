"""Where the authors of each model publish its weights, and who keeps copies that load here.

One line per file. An address stands here because the authors' own pages or timm's registry give it; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

CLASSES = {"in1k": 1000, "in22k": 21841, "in21k": 21843, "cifar10": 10, "cifar100": 100}  # by name of the data set
TAG = re.compile(rf"[a-z0-9]+(_[a-z0-9]+)*?_(?P<data>{'|'.join(CLASSES)})(_ft_(?P<tuned>{'|'.join(CLASSES)}))?(_\d+)?")


@dataclasses.dataclass(frozen=True)
class Weights:
    """One published file of weights.

    Attributes:
        model: registered name; tag: `<source>_<data set>[_<resolution>]`, after the dot of `model.tag`.
        file: its name where it is published; `model.tag.pth` (or `.safetensors`) where the page gives none.
        page: where the authors publish it, for people.
        size: height and width of the images that it was trained or tuned on last.
        licence: of the weights, or of the source repository where nothing else is said.
        link: address of the file itself, or None; dead: why link or page do not work, empty while they are thought to.
        mirrors: copies on a hub, `hf:org/name` or `hf:org/name/file`.
        sha256: checksum, 64 hexadecimal digits, or None where none is known.
        top1: accuracy on ImageNet-1k in percent as published.
        note: what to know when downloading by hand.
        args: arguments of the model that these weights need; cfg: what differs in timm's description of the input.
    """

    model: str
    tag: str
    file: str
    page: str
    size: int
    licence: str
    link: str | None = None
    dead: str = ""
    mirrors: tuple[str, ...] = ()
    sha256: str | None = None
    top1: float | None = None
    note: str = ""
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cfg: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"

    @property
    def num_classes(self) -> int:
        match = TAG.fullmatch(self.tag)
        if match is None:
            raise ValueError(f"weight tag {self.tag!r} is not <source>_<data set>[_<resolution>]")
        return CLASSES[match["tuned"] or match["data"]]

    @property
    def input_size(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    @property
    def working_link(self) -> str | None:
        return None if self.dead else self.link

    @property
    def works(self) -> bool:
        """Whether `pretrained=True` has a place to fetch it from."""
        return bool(self.working_link or self.mirrors)


def hub_place(mirror: str) -> tuple[str, str | None]:
    """`hf:org/name[/file]` -> repository and file, None where it is the repository's only one."""
    owner, name, *file = mirror.removeprefix("hf:").split("/", 2)
    return f"{owner}/{name}", file[0] if file else None


def published(name: str) -> tuple[Weights, ...]:
    """What is published for a registered model, the default first; empty if nothing is, see `UNPUBLISHED`."""
    return TABLE.get(name, ())


def _biformer(name: str, share: str, top1: float) -> Weights:
    link = f"https://api.onedrive.com/v1.0/shares/s!AkBbczdRlZvCh{share}/root/content"
    dead = "since 2026 OneDrive has answered that the share id is malformed"
    page = "https://github.com/rayleizhu/BiFormer"
    return Weights(name, "rayleizhu_in1k", f"{name}_in1k.pth", page, 224, "MIT", link, dead, top1=top1)


_BIFORMER = [
    _biformer("biformer_tiny", "HEOoGkgwgQzEDlM", 81.4),
    _biformer("biformer_small", "HDyM-x9KWRBZ832", 83.8),
    _biformer("biformer_base", "HI_XPhoadjaNxtO", 84.3),
    _biformer("biformer_stl", "Sf-m7ujkvx9lIQ1", 82.7),
    _biformer("biformer_stl_nchw", "WYrKbWbMgqd2Ai0", 82.7),
]

_STORAGE = "https://github.com/SwinTransformer/storage/releases/download"
_SWIN_PAGE = "https://github.com/microsoft/Swin-Transformer/blob/main/MODELHUB.md"
_LARGE = dict(crop_pct=1.0)


def _swin(name: str, tag: str, release: str, stem: str, suffix: str = "", top1: float | None = None) -> Weights:
    """`stem` is timm's name too, but for V2, where timm leaves the patch size out."""
    size = int(re.split(r"[_o]", stem)[-1])
    file, copy = f"{stem}{suffix}.pth", stem if release < "v2" else stem.replace("_patch4", "")
    return Weights(
        name, tag, file, _SWIN_PAGE, size, "MIT", f"{_STORAGE}/{release}/{file}", "", (f"hf:timm/{copy}.{tag}",),
        top1=top1, cfg=_LARGE if size == 384 else {},
    )  # fmt: skip


_TINY, _SMALL = "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"
_BASE, _BASE_384 = "swin_base_patch4_window7_224", "swin_base_patch4_window12_384"
_LARGE_224, _LARGE_384 = "swin_large_patch4_window7_224", "swin_large_patch4_window12_384"

_SWIN = [
    _swin("swin_tiny", "ms_in1k", "v1.0.0", _TINY, top1=81.2),
    _swin("swin_tiny", "ms_in22k_ft_in1k", "v1.0.8", _TINY, "_22kto1k_finetune", 80.9),
    _swin("swin_tiny", "ms_in22k", "v1.0.8", _TINY, "_22k"),
    _swin("swin_small", "ms_in1k", "v1.0.0", _SMALL, top1=83.2),
    _swin("swin_small", "ms_in22k_ft_in1k", "v1.0.8", _SMALL, "_22kto1k_finetune", 83.2),
    _swin("swin_small", "ms_in22k", "v1.0.8", _SMALL, "_22k"),
    _swin("swin_base", "ms_in1k", "v1.0.0", _BASE, top1=83.5),
    _swin("swin_base", "ms_in22k_ft_in1k", "v1.0.0", _BASE, "_22kto1k", 85.2),
    _swin("swin_base", "ms_in22k", "v1.0.0", _BASE, "_22k"),
    _swin("swin_base_window12_384", "ms_in1k", "v1.0.0", _BASE_384, top1=84.5),
    _swin("swin_base_window12_384", "ms_in22k_ft_in1k", "v1.0.0", _BASE_384, "_22kto1k", 86.4),
    _swin("swin_base_window12_384", "ms_in22k", "v1.0.0", _BASE_384, "_22k"),
    _swin("swin_large", "ms_in22k_ft_in1k", "v1.0.0", _LARGE_224, "_22kto1k", 86.3),
    _swin("swin_large", "ms_in22k", "v1.0.0", _LARGE_224, "_22k"),
    _swin("swin_large_window12_384", "ms_in22k_ft_in1k", "v1.0.0", _LARGE_384, "_22kto1k", 87.3),
    _swin("swin_large_window12_384", "ms_in22k", "v1.0.0", _LARGE_384, "_22k"),
    _swin("swinv2_tiny_window8_256", "ms_in1k", "v2.0.0", "swinv2_tiny_patch4_window8_256", top1=81.8),
    _swin("swinv2_tiny_window16_256", "ms_in1k", "v2.0.0", "swinv2_tiny_patch4_window16_256", top1=82.8),
    _swin("swinv2_small_window8_256", "ms_in1k", "v2.0.0", "swinv2_small_patch4_window8_256", top1=83.7),
    _swin("swinv2_small_window16_256", "ms_in1k", "v2.0.0", "swinv2_small_patch4_window16_256", top1=84.1),
    _swin("swinv2_base_window8_256", "ms_in1k", "v2.0.0", "swinv2_base_patch4_window8_256", top1=84.2),
    _swin("swinv2_base_window16_256", "ms_in1k", "v2.0.0", "swinv2_base_patch4_window16_256", top1=84.6),
    dataclasses.replace(
        _swin("swinv2_base_window16_256", "ms_in22k_ft_in1k", "v2.0.0",
              "swinv2_base_patch4_window12to16_192to256", "_22kto1k_ft", 86.2),
        args=dict(pretrained_window=(12, 12, 12, 6)),  # the windows at 192 pixels, before the tuning at 256
    ),
]  # fmt: skip


def _davit(name: str, share: str, top1: float, dead: str = "") -> Weights:
    page = f"https://connecthkuhk-my.sharepoint.com/:u:/g/personal/u3007305_connect_hku_hk/{share}"
    mirrors = (f"hf:timm/{name}.msft_in1k",)
    file = f"{name}.msft_in1k.pth"
    return Weights(name, "msft_in1k", file, page, 224, "MIT", None, dead, mirrors, top1=top1)


_DAVIT = [
    _davit("davit_tiny", "EcJYlVYP9y5FsDbMP-nwjtABgLmdrNGZBxgR5--Kg3MZ7Q?e=v9OrXB", 82.8),
    _davit("davit_small", "ERN_Gzm8oKdIvO01r0X2cscB_owuRAnnQPNGJEVGP23xHQ?e=MVW3ZO", 84.2,
           dead="users of the authors' repository report that it cannot be reached"),
    _davit("davit_base", "Ea8kCpdM949CvTM0w7DWbGwBxxiACMSik4zx-emrNY0uKQ?e=aEjC7u", 84.6),
]  # fmt: skip

_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_SQUASHED = dict(_HALF, crop_pct=1.0, crop_mode="squash")


def _maxvit(size: str, data: str, side: int, top1: float | None = None) -> Weights:
    name, folder = f"maxvit_{size}", {"in1k": "i1k", "in21k": "i21k_pt", "in21k_ft_in1k": "i21k_i1k"}[data]
    tag = f"google_{data}" if side == 224 else f"google_{data}_{side}"
    page = f"https://console.cloud.google.com/storage/browser/gresearch/maxvit/ckpts/maxvit{size}/{folder}/{side}"
    return Weights(
        name, tag, f"{name}.{tag}.safetensors", page, side, "Apache-2.0",
        mirrors=(f"hf:timm/{name}_tf_{side}.{data}",), top1=top1, note="the authors' file is one of TensorFlow",
        args={} if side == 224 else dict(img_size=side),
        cfg=_SQUASHED if side > 224 else _HALF if data == "in21k" else {},
    )  # fmt: skip


_MAXVIT = [
    _maxvit("tiny", "in1k", 224, 83.62),
    _maxvit("tiny", "in1k", 384, 85.24),
    _maxvit("tiny", "in1k", 512, 85.72),
    _maxvit("small", "in1k", 224, 84.45),
    _maxvit("small", "in1k", 384, 85.74),
    _maxvit("small", "in1k", 512, 86.19),
    _maxvit("base", "in1k", 224, 84.95),
    _maxvit("base", "in1k", 384, 86.34),
    _maxvit("base", "in1k", 512, 86.66),
    _maxvit("base", "in21k", 224),
    _maxvit("base", "in21k_ft_in1k", 384),
    _maxvit("base", "in21k_ft_in1k", 512),
    _maxvit("large", "in1k", 224, 85.17),
    _maxvit("large", "in1k", 384, 86.40),
    _maxvit("large", "in1k", 512, 86.70),
    _maxvit("large", "in21k", 224),
    _maxvit("large", "in21k_ft_in1k", 384),
    _maxvit("large", "in21k_ft_in1k", 512),
    _maxvit("xlarge", "in21k", 224),
    _maxvit("xlarge", "in21k_ft_in1k", 384),
    _maxvit("xlarge", "in21k_ft_in1k", 512),
]


def _crossformer(size: str, drive: str, top1: float) -> Weights:
    page = f"https://drive.google.com/file/d/{drive}/view"
    return Weights(f"crossformer_{size}", "cheerss_in1k", f"crossformer-{size[0]}.pth", page, 224, "MIT", top1=top1)


def _crossformer_pp(size: str, top1: float) -> Weights:
    name, page = f"crossformer_pp_{size}", "https://github.com/cheerss/CrossFormer"
    return Weights(
        name, "cheerss_in1k", f"{name}.cheerss_in1k.pth", page, 224, "MIT", top1=top1,
        note="on Baidu, with the key crsf; L and H share one link",
    )  # fmt: skip


_CROSSFORMER = [
    _crossformer("tiny", "1YSkU9enn-ITyrbxLH13zNcBYvWSEidfq", 81.5),
    _crossformer("small", "1RAkigsgr33va0RZ85S2Shs2BhXYcS6U8", 82.5),
    _crossformer("base", "1bK8biVCi17nz_nkt7rBfio_kywUpllSU", 83.4),
    _crossformer("large", "1zRWByVW_KIZ87NgaBkDIm60DAsGJErdG", 84.0),
    _crossformer_pp("small", 83.2),
    _crossformer_pp("base", 84.2),
    _crossformer_pp("large", 84.7),
    _crossformer_pp("huge", 84.9),
]


def _by_hand(name: str, tag: str, page: str, licence: str, top1: float | None, note: str = "") -> Weights:
    return Weights(name, tag, f"{name}.{tag}.pth", page, 224, licence, top1=top1, note=note)


def _vig(name: str, top1: float) -> Weights:
    page = "https://huggingface.co/hustvl/ViG/tree/main"
    return _by_hand(name, "hustvl_in1k", page, "MIT", top1, "the authors name no files: take that of this size")


_VIG = [
    _vig("vig_tiny", 77.2),
    _vig("vig_small", 81.7),
    _vig("vig_base", 82.6),
    _vig("vig_h_tiny", 82.8),
    _vig("vig_h_small", 83.8),
    _vig("vig_h_base", 84.2),
]

_DRIVE = "https://drive.google.com"
_QSD = "https://huggingface.co/Xuerui123/QSD_Transformer"

_SPIKING = [
    _by_hand("spike_driven_transformer_8_384", "biclab_in1k",
             f"{_DRIVE}/file/d/10oH_zkwB4FDtFLgmZ_lI8e0tFjRzrXyD/view", "Apache-2.0", 72.28),
    _by_hand("spike_driven_transformer_8_512", "biclab_in1k",
             f"{_DRIVE}/file/d/1n59WNSBgP2VyAW2nfJX2Wvx5rgNJEMXI/view", "Apache-2.0", 74.57),
    _by_hand("spike_driven_transformer_8_768", "biclab_in1k",
             f"{_DRIVE}/file/d/1R-MaeFV8d2Y0pIGBSjklOGWhaF8dLHf4/view", "Apache-2.0", 77.07),
    _by_hand("metaspikformer_8_512", "biclab_in1k",
             f"{_DRIVE}/drive/folders/12JcIRG8BF6JcgPsXIetSS14udtHXeSSx", "unknown", 80.0, "a folder with logs"),
    _by_hand("qsd_transformer_15m", "xuerui123_in1k", _QSD, "MIT", None, "the authors call it 15M_w4"),
    _by_hand("qsd_transformer_8_512", "xuerui123_in1k", _QSD, "MIT", 80.3, "the authors call it 55M_w4"),
]  # fmt: skip

_MST_PAGE = "https://github.com/bic-L/Masked-Spiking-Transformer"
_CIFAR_CFG = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def _mst(tag: str, release: str, file: str) -> Weights:
    return Weights(
        "mst_tiny", tag, file, _MST_PAGE, 224, "unknown", f"{_MST_PAGE}/releases/download/{release}/{file}",
        args=dict(masking_ratio=0.75) if "mask75" in tag else {},
        cfg=_CIFAR_CFG if "cifar" in tag else {},
    )  # fmt: skip


_MST = [
    _mst("bicl_in1k", "checkpoint", "imagenet_checkpoint.pth"),
    _mst("bicl_cifar10", "checkpoint", "Cifar10_checkpoint.pth"),
    _mst("bicl_cifar100", "checkpoint", "Cifar100_checkpoint.pth"),
    _mst("bicl_mask75_in1k", "checkpoint_with_mask", "imagenet_75._masking_ratio_checkpoint.pth"),
    _mst("bicl_mask75_cifar10", "checkpoint_with_mask", "cifar10_75._masking_ratio_checkpoint.pth"),
    _mst("bicl_mask75_cifar100", "checkpoint_with_mask", "Cifar100_75._masking_ratio_checkpoint.pth"),
]


def _ecoformer(name: str, file: str, top1: float) -> Weights:
    page = "https://github.com/ziplab/EcoFormer"
    link = f"{page}/releases/download/v1.0/{file}"
    return Weights(name, "ziplab_in1k", file, page, 224, "Apache-2.0", link, top1=top1)


_ECOFORMER = [
    _ecoformer("ecoformer_pvt_v2_b0", "pvtv2_b0_ecoformer.pth", 70.44),
    _ecoformer("ecoformer_pvt_v2_b1", "pvtv2_b1_ecoformer.pth", 78.38),
    _ecoformer("ecoformer_pvt_v2_b2", "pvtv2_b2_ecoformer.pth", 81.28),
    _ecoformer("ecoformer_twins_svt_small", "twins_svt_s_ecoformer.pth", 80.22),
]

TABLE: dict[str, tuple[Weights, ...]] = {}
for _entry in [
    *_BIFORMER, *_SWIN, *_DAVIT, *_MAXVIT, *_CROSSFORMER, *_VIG, *_SPIKING, *_MST, *_ECOFORMER
]:  # fmt: skip
    TABLE[_entry.model] = (*TABLE.get(_entry.model, ()), _entry)

_OWN = "it is a size of our own, which nobody has published"
_NO_DOWNLOAD = "its authors publish code, and no weights are known to be public"
UNPUBLISHED = {
    name: why
    for why, names in {
        _OWN: "biformer_nano bivit_nano mst_nano spikformer_nano",
        _NO_DOWNLOAD: (
            "bivit_deit_tiny bivit_deit_small bivit_deit_base bivit_swin_tiny binaryvit_small reactdeit_small"
            " binaryvit_small_full_precision_downsample spikformer_8_384 spikformer_8_512 spikformer_8_768"
            " spikformer_2_384_cifar spikformer_4_384_cifar spike_driven_transformer_2_512_cifar"
            " statten_8_512 statten_8_768 statten_2_512_cifar"
        ),
        "neither code nor weights of it are known to be public": (
            "spikformer_v2_8_384 spikformer_v2_8_512 spikformer_v2_16_768"
        ),
        "users have asked for its weights since 2023, and none were released": (
            "davit_large davit_large_window12_384 davit_huge davit_giant"
        ),
        "only the size of 55 million parameters is published": (
            "metaspikformer_15m metaspikformer_8_384 metaspikformer_8_768"
        ),
        "only the sizes of 15 and 55 million parameters are published": "qsd_transformer_8_256 qsd_transformer_8_384",
    }.items()
    for name in names.split()
}
