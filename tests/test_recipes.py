"""Every packaged recipe: its keys, its data, and the first step of training that it asks for."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import dispatch_clip_grad
from torch import Tensor

import striate
from striate.train.augment import train_transform
from striate.train.config import TrainConfig, load_config, packaged_recipe, parse_config, recipe_names
from striate.train.data import open_sources, resolve_preprocess
from striate.train.model import build_model
from striate.train.objective import Objective
from striate.train.optim import build_ema, build_loss, build_mixup, build_optimizer, build_scheduler, lr_scale
from striate.train.seeding import seed_all

RECIPES = recipe_names()
IN1K = [name for name in RECIPES if name.endswith("_in1k")]
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# The schedules of the first two are not published; reactdeit is in the folder of its paper, binaryvit.
WITHOUT_IN1K = {"bivit", "spikformer_v2", "reactdeit"}
FROM_SCRATCH = {"biformer", "crossformer", "crossformer_pp", "davit", "maxvit", "swin", "swinv2", "vig"}
IMAGENET_IMAGES = 1_281_167
META, CPU = torch.device("meta"), torch.device("cpu")


class Step:
    """What the builders of striate.train make of a recipe on a device, ready for a step."""

    def __init__(self, config: TrainConfig, num_classes: int, device: torch.device) -> None:
        self.config, self.num_classes, self.device = config, num_classes, device
        # A checkpoint to start from would be another recipe's run.
        model_config = replace(config.model, checkpoint_path=None)
        with device:
            self.model = build_model(model_config, num_classes, config.model.in_chans).train()
        if device == META and hasattr(self.model, "hash_trained"):
            self.model.hash_trained = torch.tensor(True)  # chooses the way of the forward pass, so it needs its value
        self.scale = lr_scale(config.optim, config.data.batch_size)
        self.optimizer = build_optimizer(config.optim, self.model, self.scale)
        self.steps_per_epoch = IMAGENET_IMAGES // (config.data.batch_size * config.optim.accumulation)
        self.scheduler, self.epochs = build_scheduler(config.schedule, self.optimizer, self.steps_per_epoch, self.scale)
        self.mixup = build_mixup(config.augment, num_classes)
        labelled = build_loss(config.augment, config.loss, self.mixup)
        self.objective = Objective(config.loss, labelled, self.model)

    def lr_at(self, step: int) -> float:
        self.scheduler.step_update(step)
        return max(group["lr"] for group in self.optimizer.param_groups)

    def __call__(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """The loss, after a step."""
        config = self.config
        hints = torch.randn(len(images), self.num_classes, device=self.device) if config.loss.teacher else None
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        loss = self.objective(forward(images), labels, hints)
        loss.backward()
        if config.optim.clip_grad is not None:
            dispatch_clip_grad(self.model.parameters(), config.optim.clip_grad, config.optim.clip_mode)
        self.optimizer.step()
        return loss.detach()


recipe = functools.cache(load_config)


def num_classes(name: str) -> int:
    return 1000 if name.endswith("_in1k") else 10


def input_size(config: TrainConfig) -> tuple[int, int, int]:
    info = striate.model_info(config.model.name)
    return resolve_preprocess(config.data, config.model.in_chans, {"input_size": info.input_size})["input_size"]


def params(name: str) -> tuple[float, str]:
    return striate.model_info(recipe(name).model.name).params, name


def smallest_of_each_family() -> list[str]:
    families = sorted({name.partition("/")[0] for name in RECIPES})
    return [min((name for name in RECIPES if name.startswith(f"{family}/")), key=params) for family in families]


@functools.cache
def largest_of_each_architecture() -> set[str]:
    found: dict[str, str] = {}
    for name in sorted(RECIPES, key=params):
        config = recipe(name)
        entry = re.sub("tiny|small|base|large|huge|_b[0-9]$", "", config.model.name)
        found[f"{entry} {config.model.options} {config.loss} {input_size(config)}"] = name
    return set(found.values())


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like ImageNet, with one image in each of the 1000 classes of train and val."""
    root = tmp_path_factory.mktemp("imagenet")
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 30)).save(file, "JPEG")
    for split in ("train", "val"):
        for number in range(1000):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            (folder / f"{folder.name}_1.JPEG").write_bytes(file.getvalue())
    return root


def test_every_published_family_has_a_recipe() -> None:
    families = {striate.model_info(name).family.name for name in striate.list_models()}
    assert families - {name.partition("/")[0] for name in IN1K} == WITHOUT_IN1K


@pytest.mark.parametrize("name", RECIPES)
def test_keys(name: str) -> None:
    """The model and the transforms exist; the comment, the name and the keys tell the same story."""
    config, text = recipe(name), (CONFIGS / f"{name}.yaml").read_text()
    info = striate.model_info(config.model.name)
    family, _, size = name.partition("/")
    assert text.startswith("# "), "a recipe says where it comes from"
    assert re.search(rf"#     striate train --(config|recipe) {name} ", text), "a recipe shows its command"
    assert 0 <= config.model.drop_path_rate < 1
    if name in IN1K and info.family.name == family:
        assert f"{family}_{size}".startswith(info.name)
    if family in FROM_SCRATCH and name in IN1K:
        assert f"{info.top1} % top-1" in text
    teacher = config.loss.teacher
    assert teacher is None or teacher.startswith("runs/") or timm.is_model(teacher.partition(".")[0])
    preprocess = resolve_preprocess(config.data, config.model.in_chans, {"input_size": info.input_size})
    train_transform(config.augment, preprocess)


# Images a step, peak learning rate at that many, weight decay, clipping, moving average, warm-up, and stochastic depth
# by size, as the papers and their code have them.
SWIN = (1024, 1e-3, 0.05, 5.0, None, 20)
PUBLISHED = {
    "biformer": ((1024, 1e-3, 0.05, None, 0.99996, 5), {"tiny": 0.1, "small": 0.15, "base": 0.3, "stl": 0.1}),
    "crossformer": (SWIN, {"tiny": 0.1, "small": 0.2, "base": 0.3, "large": 0.5}),
    "crossformer_pp": (SWIN, {"small": 0.2, "base": 0.3, "large": 0.5, "huge": 0.5}),
    "davit": ((1024, 1e-3, 0.05, 1.0, None, 5), {"tiny": 0.1, "small": 0.2, "base": 0.4}),
    "maxvit": ((4096, 3e-3, 0.05, 1.0, 0.9999, 32), {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6}),
    "swin": (SWIN, {"tiny": 0.2, "small": 0.3, "base": 0.5}),
    "swinv2": (
        SWIN,
        {
            f"{size}_window{window}_256": rate
            for size, rate in {"tiny": 0.2, "small": 0.3, "base": 0.5}.items()
            for window in (8, 16)
        },
    ),
    "vig": (
        (1024, 1e-3, 0.05, 5.0, 0.9999, 20),
        {"tiny": 0.0, "small": 0.2, "base": 0.5, "h_tiny": 0.2, "h_small": 0.3, "h_base": 0.6},
    ),
}
OTHER_LR = {"vig/tiny": 2e-3, "vig/base": 2e-3, "vig/h_tiny": 1.6e-3}
OTHER_WEIGHT_DECAY = {"vig/small": 0.1}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_values(family: str) -> None:
    (images, lr, weight_decay, clip, ema, warmup), rates = PUBLISHED[family]
    assert {f"{family}/{size}_in1k" for size in rates} == {name for name in IN1K if name.startswith(f"{family}/")}
    for size, rate in rates.items():
        config = recipe(f"{family}/{size}_in1k")
        optim, key = config.optim, f"{family}/{size}"
        assert config.data.batch_size * optim.accumulation == images
        peak = optim.lr * lr_scale(optim, config.data.batch_size)
        assert peak == pytest.approx(OTHER_LR.get(key, lr))
        assert optim.weight_decay == OTHER_WEIGHT_DECAY.get(key, weight_decay)
        assert (optim.clip_grad, optim.ema_decay) == (clip, ema)
        assert config.augment.repeats == (3 if family == "biformer" else 1)
        assert (config.schedule.epochs, config.schedule.warmup_epochs) == (300, warmup)
        assert config.model.drop_path_rate == rate


def test_imagenet_recipes_find_its_classes(imagenet: Path) -> None:
    found: dict[str, int | None] = {}
    for name in IN1K:
        config = recipe(name)
        assert config.model.num_classes is None
        assert config.data.image_size is not None
        layout = repr(replace(config.data, image_size=None, batch_size=1, preprocess={}))
        if layout not in found:
            train, held_out = open_sources(replace(config.data, root=str(imagenet)), config.model.in_chans)
            assert (len(train.images), len(held_out.images)) == (1000, 1000)
            found[layout] = train.num_classes
        assert found[layout] == 1000, name


@pytest.mark.parametrize("name", RECIPES)
def test_first_step_without_values(name: str) -> None:
    """A step on tensors that have a shape only: of the head, after a forward pass at the real size.

    Recipes of one architecture differ in widths and depths, so the largest of them stands for their forward passes.
    """
    config = recipe(name)
    step = Step(config, num_classes(name), META)
    images = torch.empty(2, *input_size(config), device=META)
    if name in largest_of_each_architecture():
        with torch.no_grad():
            outputs = step.model(images)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        assert logits.shape == (2, step.num_classes)
    head = step.model.get_classifier()
    features = torch.empty(2, step.model.num_features, device=META)
    loss = step(lambda _: head(features), images, torch.zeros(2, dtype=torch.long, device=META))
    assert loss.shape == ()
    assert all(parameter in step.optimizer.state for parameter in head.parameters())
    schedule = config.schedule
    warm_up = round(schedule.warmup_epochs * step.steps_per_epoch)
    assert step.lr_at(0) == pytest.approx((schedule.warmup_lr if warm_up else config.optim.lr) * step.scale)
    after_warm_up = (1 + math.cos(math.pi * schedule.warmup_epochs / schedule.epochs)) / 2
    peak = schedule.min_lr + (config.optim.lr - schedule.min_lr) * after_warm_up
    assert step.lr_at(warm_up) == pytest.approx(peak * step.scale, rel=1e-3)
    assert step.lr_at(step.epochs * step.steps_per_epoch) == pytest.approx(schedule.min_lr * step.scale)


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_first_step(name: str) -> None:
    """All of a step on the CPU, on two small augmented images."""
    seed_all(0)
    config = recipe(name)
    config = replace(config, data=replace(config.data, image_size=32))
    step = Step(config, num_classes(name), CPU)
    in_chans = config.model.in_chans
    transform = train_transform(config.augment, resolve_preprocess(config.data, in_chans, step.model.pretrained_cfg))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 36, 3), np.uint8)
    images = torch.stack([transform(Image.fromarray(p).convert("RGB" if in_chans == 3 else "L")) for p in pixels])
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    step.lr_at(round(config.schedule.warmup_epochs * step.steps_per_epoch))
    assert torch.isfinite(step(step.model, images, torch.tensor([3, 7])))
    parameters = list(step.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in parameters)
    changed = sum(old.numel() for old, new in zip(before, parameters, strict=True) if not torch.equal(old, new))
    assert changed > 0.9 * sum(map(torch.numel, parameters))
    ema = build_ema(config.optim, step.model)
    assert ema is None or ema.update(step.model, step=1) is None


class TestNames:
    def test_both_spellings_and_later_flags(self) -> None:
        """A family with an underscore included: every recipe can be asked for in both spellings."""
        for name in RECIPES:
            assert packaged_recipe(name) == packaged_recipe(name.replace("/", "_")) == CONFIGS / f"{name}.yaml"
        wanted = load_config("biformer/small_in1k", {"data.root": "/imagenet", "optim.lr": 0.5})
        for words in (
            ["--recipe", "biformer_small_in1k", "--data.root", "/imagenet", "--optim.lr", "0.5"],
            ["--recipe=biformer/small_in1k", "--data.root=/imagenet", "--optim.lr=0.5"],
        ):
            assert parse_config(words) == wanted
        assert parse_config(["--optim.lr", "0.5", "--recipe", "biformer_small_in1k"]).optim.lr == 1e-3

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["--recipe", "biformer_smal_in1k"],
                "no packaged recipe is called biformer_smal_in1k; .*biformer/small_in1k",
            ),
            (["--recipe=small_in1k"], "no packaged recipe is called small_in1k"),
            (["--recipe", str(CONFIGS / "biformer/small_in1k.yaml")], "give a file with --config"),
            (["--recipe"], "--recipe needs a name; there is biformer/"),
        ],
    )
    def test_wrong_names(self, words: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_config(words)

    def test_a_name_of_two_recipes_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("vig/h_tiny_in1k", "vig_h/tiny_in1k"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / f"{name}.yaml").write_text("model: {name: vig_h_tiny}\n")
        monkeypatch.setattr("striate.train.config._recipe_root", lambda: tmp_path)
        with pytest.raises(ValueError, match="stands for vig/h_tiny_in1k and vig_h/tiny_in1k"):
            packaged_recipe("vig_h_tiny_in1k")
        assert packaged_recipe("vig_h/tiny_in1k") == tmp_path / "vig_h/tiny_in1k.yaml"
