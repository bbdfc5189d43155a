"""Pushing models to folders and hubs, and pulling them."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..backbones._hub_files import Access, sha256
from .card import is_untouched, render_card
from .config import describe, read_config
from .factory import create_model
from .folders import check_replaceable, replaced, save_weights
from .sources import (
    CARD,
    COMMAND,
    CONFIG,
    FILES,
    LOCAL,
    METRICS,
    RECIPE,
    WEIGHTS,
    Repository,
    Source,
    parse_address,
)
from .upload import Upload

logger = logging.getLogger("striate")


def push(
    model: nn.Module,
    target: str,
    *,
    label_names: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    recipe: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    private: bool | None = None,
    commit_message: str = "Add model",
    tag: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Publish `model` as config.json, model.safetensors and a model card, in timm's hub format.

    Beside them go the recipe (recipe.yaml if it is a configuration, else recipe.txt) and metrics.json, if given.
    Everything is first written elsewhere, created again from there and compared weight by weight; only then does it
    take the place of what was there. `timm.create_model` loads it too, once `striate` has been imported.

    To a hub it goes as one commit on top of what the branch held before, and the checksums there are compared with
    those here. A push that fails leaves the branch as it was and can be repeated; one of the same files commits
    nothing.

    A model card that somebody has edited is kept, one that is as it was written is replaced. Other files of the folder
    or repository stay. A folder that holds files but no config.json is refused.

    Args:
        model: a model of `create_model`, feature pyramids included; one wrapped for training, compiled or averaged is
            unwrapped.
        target: `local-dir:PATH`, or `org/name[@branch]` on the Hugging Face Hub (huggingface_hub's login or HF_TOKEN).
        label_names: one per class; default: those of `model.pretrained_cfg`.
        metrics: numbers for the card, e.g. `{"top1": 88.1, "top5": 99.7}` in percent, measured on `dataset`.
        dataset: identifier of the data, e.g. `fashion_mnist` or `org/name`.
        recipe: how it was trained: a command line or a configuration, shown as it is.
        description: first paragraph of the card.
        licence: of the weights, e.g. `mit`; default: that of the architecture's source.
        private: of a new repository; default: as the account says.
        commit_message: of the commit to a hub.
        tag: to give to that commit.
        token: of a hub; default: huggingface_hub's login or HF_TOKEN.
        endpoint: address of a hub; default: HF_ENDPOINT, or the Hugging Face Hub.

    Returns:
        What `create_model` takes to load it: `local-dir:PATH`, or `hf-hub:org/name@commit`.

    Raises:
        ValueError: for a model that cannot be created again from a name and arguments, weights that are not numbers,
            labels or metrics that do not fit, a target that is not one, or a tag that other files have. Nothing has
            changed then.
        striate.hub.HubError: the hub refuses or fails; see `create_model` for its kinds.
    """
    destination = parse_address(target)
    upload = None
    if destination.kind == LOCAL:
        if tag is not None:
            raise ValueError(f"a folder has no tags; leave out tag={tag!r}, or push to a hub")
    else:
        upload = Upload(destination, Access(token, endpoint))
    model = unwrap_model(model)
    config = describe(model, label_names)
    state = _own_tensors(model)

    def write(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # one entry: several are written in any order, and the same weights would have another checksum each time
        save_weights(state, folder / WEIGHTS, {"format": "pt"})
        card = render_card(
            f"{destination.kind}:{destination.location}",
            config,
            model,
            sha256(folder / WEIGHTS),
            metrics=metrics,
            dataset=dataset,
            recipe=recipe,
            description=description,
            licence=licence,
        )
        (folder / CARD).write_text(card, encoding="utf-8")
        _write_story(folder, recipe, metrics, dataset)
        _check_reload(folder, state)

    if upload is None:
        folder = Path(destination.location)
        with replaced(folder) as new:
            write(new)
            _keep_edited_card(folder / CARD, new / CARD)
        return str(destination)
    with tempfile.TemporaryDirectory() as work:
        write(Path(work))
        if upload.head is not None:
            old = Repository(Source(destination.kind, destination.location, upload.head), upload.access)
            if card := old.optional_file(CARD):
                _keep_edited_card(card, Path(work) / CARD)
        commit = upload.publish(Path(work), commit_message, private, tag)
    return str(Source(destination.kind, destination.location, commit))


def pull(
    source: str,
    target: str | Path | None = None,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Fetch a saved model: config.json, model.safetensors and, where there are any, card, recipe and metrics.

    Args:
        source: `org/name[@revision]` or `hf-hub:org/name[@revision]`, or `local-dir:PATH`.
        target: folder to copy it to, replaced as a whole; default: leave it where it is, in huggingface_hub's cache or
            the source folder.
        token, endpoint, cache_dir: see `create_model`.

    Returns:
        The folder with the files.

    Raises:
        ValueError: if the source has no such files, config.json is malformed, or `target` holds other things.
        striate.hub.HubError: see `create_model`.
    """
    if target is not None:
        check_replaceable(Path(target))
    repository = Repository(parse_address(source), Access(token, endpoint, cache_dir))
    config = repository.file(CONFIG)
    read_config(config)
    files = [config, repository.file(WEIGHTS)]
    files += filter(None, (repository.optional_file(name) for name in FILES if name not in (CONFIG, WEIGHTS)))
    if target is None:
        return config.parent
    with replaced(Path(target)) as new:
        for path in files:
            shutil.copyfile(path, new / path.name)
    return Path(target)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as contiguous CPU copies, since safetensors refuses shared memory."""
    state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()}
    if broken := [key for key, value in state.items() if value.is_floating_point() and bool(value.isnan().any())]:
        raise ValueError(f"{len(broken)} tensors hold NaN ({', '.join(broken[:3])}); such a model is not published")
    return state


def _write_story(folder: Path, recipe: str | None, metrics: Mapping[str, float] | None, dataset: str | None) -> None:
    """What the card shows, for programs to read."""
    if recipe:
        name = RECIPE if _is_configuration(recipe) else COMMAND
        (folder / name).write_text(recipe.rstrip() + "\n", encoding="utf-8")
    if metrics:
        content = {"dataset": dataset, "metrics": dict(metrics)}
        (folder / METRICS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_configuration(recipe: str) -> bool:
    try:
        return isinstance(yaml.safe_load(recipe), dict)
    except yaml.YAMLError:
        return False


def _check_reload(folder: Path, state: dict[str, Tensor]) -> None:
    """Create the model from what was written and compare it with what was meant."""
    with torch.random.fork_rng(devices=[]):  # initialising it must not disturb a training that pushes on its way
        found = create_model(f"{LOCAL}:{folder}").state_dict()
    differing = sorted(found.keys() ^ state.keys())
    differing += [key for key, value in state.items() if key in found and not _equal(found[key], value)]
    if differing:
        raise ValueError(
            f"the model comes back differently: {len(differing)} tensors ({', '.join(differing[:3])}) do not follow"
            " from its name and arguments; push it as it was created"
        )


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.equal(found.to(wanted.dtype), wanted)


def _keep_edited_card(old: Path, new: Path) -> None:
    if old.is_file() and not is_untouched(old.read_text(encoding="utf-8")):
        logger.warning("%s was edited, so it is kept; what it says about metrics may be out of date", old)
        shutil.copyfile(old, new)
