"""Model cards: README.md with a front matter that hubs read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from .. import __version__
from ..backbones import model_info
from .config import is_ours

_SIGNATURE = re.compile(r"\n<!-- striate model card ([0-9a-f]{16}): an edited card is kept by the next push -->\n$")
_METRICS = {"top1": ("accuracy", "Top-1 accuracy (%)"), "top5": ("accuracy", "Top-5 accuracy (%)")}


def render_card(
    address: str,
    config: Mapping[str, Any],
    model: nn.Module,
    sha256: str,
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    recipe: str | None = None,
    description: str | None = None,
    licence: str | None = None,
) -> str:
    """The text of README.md for a model that will live at `address` (`local-dir:PATH` or `hf-hub:org/name`).

    Args:
        config: the content of config.json.
        sha256: checksum of model.safetensors.
        metrics, dataset, recipe, description, licence: see `push`.

    Raises:
        ValueError: for metrics that are no numbers or lack the data set they were measured on, or for a data set
            that is no identifier.
    """
    title = re.split(r"[/:\\]", address.rstrip("/\\"))[-1]
    metrics = _checked_metrics(metrics or {}, dataset)
    sections = [
        f"# {title}",
        description or _summary(config),
        f"## Use\n\n```python\n{_usage(address, config)}\n```",
        _results(metrics, dataset),
        _training(recipe),
        _details(config, model, sha256),
    ]
    head = _front_matter(title, config, metrics, dataset, licence)
    text = f"---\n{head}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    return f"{text}\n<!-- striate model card {_digest(text)}: an edited card is kept by the next push -->\n"


def is_untouched(card: str) -> bool:
    """Whether `card` is as `render_card` wrote it, so that nobody's words are lost when it is replaced."""
    signature = _SIGNATURE.search(card)
    return signature is not None and signature[1] == _digest(card[: signature.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked_metrics(metrics: Mapping[str, float], dataset: str | None) -> dict[str, float]:
    if dataset is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
        raise ValueError(f"dataset={dataset!r} is no identifier; write it like 'fashion_mnist' or 'org/name'")
    if metrics and dataset is None:
        raise ValueError(f"metrics {dict(metrics)} need dataset=NAME, what they were measured on")
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"metric {name}={value!r} is no finite number")
    return dict(metrics)


def _front_matter(
    title: str, config: Mapping[str, Any], metrics: dict[str, float], dataset: str | None, licence: str | None
) -> str:
    task = "image-classification" if config["num_classes"] else "image-feature-extraction"
    licence = licence or config["pretrained_cfg"].get("license")
    results = []
    for name, value in metrics.items():
        kind, label = _METRICS.get(name, (name, name))
        results.append(EvalResult(task, dataset or "", dataset or "", kind, value, metric_name=label))
    data = ModelCardData(
        model_name=title,
        tags=[task, "pytorch", "timm", "striate"],
        pipeline_tag=task,
        # plain timm cannot build what it does not have, so a hub must not offer its snippet
        library_name="striate" if is_ours(config["architecture"]) else "timm",
        license=licence.lower() if licence else None,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _summary(config: Mapping[str, Any]) -> str:
    architecture, classes = config["architecture"], config["num_classes"]
    if is_ours(architecture):
        architecture = f"{architecture} ({model_info(architecture).family.title})"
    return f"{architecture}, {f'a classifier of {classes} classes' if classes else 'a feature extractor'}."


def _usage(address: str, config: Mapping[str, Any]) -> str:
    mode = "L" if config["pretrained_cfg"]["input_size"][0] == 1 else "RGB"
    lines = [
        "import striate",
        "import timm",
        "from PIL import Image",
        "",
        f"model = striate.create_model({json.dumps(address)}).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        f'image = transform(Image.open("photo.jpg").convert("{mode}"))[None]',
    ]
    if not config["num_classes"]:
        return "\n".join([*lines, "features = model(image)"])
    lines.append("scores, classes = model(image).softmax(-1)[0].sort(descending=True)")
    if "label_names" in config:
        lines.append('print([model.pretrained_cfg["label_names"][i] for i in classes[:3]], scores[:3])')
    return "\n".join([*lines, "", "# or with timm, which needs to have seen `import striate`:"]) + (
        f"\nmodel = timm.create_model({json.dumps(address)}, pretrained=True)"
    )


def _results(metrics: dict[str, float], dataset: str | None) -> str:
    if not metrics:
        return ""
    rows = [f"| {_METRICS.get(name, ('', name))[1]} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join([f"## Results on {dataset}", "", "| metric | value |", "|---|---|", *rows])


def _training(recipe: str | None) -> str:
    if not recipe:
        return ""
    fence = "`" * (3 + max((len(ticks) for ticks in re.findall("`+", recipe)), default=0))
    return f"## Training\n\n{fence}\n{recipe.strip()}\n{fence}"


def _details(config: Mapping[str, Any], model: nn.Module, sha256: str) -> str:
    cfg = config["pretrained_cfg"]
    rows = {
        "architecture": f"`{config['architecture']}`",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        "input": " x ".join(map(str, cfg["input_size"])),
        "classes": ", ".join(config.get("label_names", [])) or config["num_classes"],
        **_origin(config["architecture"], cfg),
        "sha256 of model.safetensors": f"`{sha256}`",
        "written with": f"striate {__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }
    return "\n".join(["## Details", "", *(f"- {key}: {value}" for key, value in rows.items())])


def _origin(architecture: str, cfg: Mapping[str, Any]) -> dict[str, str]:
    """Paper, source and licence of the architecture, which are not those of the weights."""
    if is_ours(architecture):
        family = model_info(architecture).family
        found = (family.paper, family.source, family.licence)
    else:
        papers = cfg.get("paper_ids") or ()
        joined = papers if isinstance(papers, str) else ", ".join(papers)
        found = (joined, cfg.get("origin_url") or "", cfg.get("license") or "")
    titles = ("paper", "source of the architecture", "licence of that source")
    return {title: value for title, value in zip(titles, found, strict=True) if value}
