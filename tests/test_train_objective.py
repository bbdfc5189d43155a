"""The loss beyond the labels: time steps that learn alone, teachers, and runs that use them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import striate
from striate.train.config import LossConfig, parse_config
from striate.train.data import train_loader
from striate.train.loop import Trainer, train
from striate.train.objective import Objective, Teacher, WithMap, attention_transfer, build_teacher
from train_helpers import arguments, first_difference, record_of, small_config, stop_after, write_small_npz

CPU = torch.device("cpu")
PREPROCESS = {"mean": (0.5,), "std": (0.25,)}
SPIKING = {"model__name": "spikformer_nano", "model__options": {"timesteps": 2}, "model__drop_path_rate": 0.1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_npz(tmp_path_factory.mktemp("images") / "small.npz")


def spiking(**kwargs: Any) -> nn.Module:
    return striate.create_model("spikformer_nano", num_classes=5, in_chans=1, timesteps=3, **kwargs).train()


def objective(model: nn.Module | None = None, **keys: Any) -> Objective:
    return Objective(LossConfig(**keys), nn.CrossEntropyLoss(), model or nn.Identity())


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_labels_alone() -> None:
    x, labels = logits(6, 5), torch.arange(6) % 5
    assert torch.equal(objective()(x, labels), F.cross_entropy(x, labels))
    assert torch.equal(objective()((x, x.flip(1)), labels), F.cross_entropy(x, labels))


def test_temporal_efficient_training_is_its_formula() -> None:
    model = spiking()
    loss = objective(model, tet=0.05)
    x, labels = logits(3, 6, 5), torch.arange(6) % 5
    steps = sum(F.cross_entropy(x[t], labels) for t in range(3)) / 3
    want = 0.95 * steps + 0.05 * F.mse_loss(x, torch.ones_like(x))
    assert loss(x, labels) == pytest.approx(float(want), rel=1e-6)
    assert loss(x, labels) != pytest.approx(float(F.cross_entropy(x.mean(0), labels)), rel=1e-2)


def test_steps_are_returned_in_training_alone() -> None:
    model, x = spiking(), torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 5)
    objective(model, tet=0.1)
    steps = model(x)
    assert steps.shape == (3, 2, 5)
    assert not torch.equal(steps[0], steps[2])
    assert model.eval()(x).shape == (2, 5)


def test_time_steps_are_needed() -> None:
    with pytest.raises(ValueError, match=r"loss.tet is 0.1, but Linear has no time steps"):
        objective(nn.Linear(3, 3), tet=0.1)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_soft_distillation_is_its_formula(weight) -> None:
    x, hints, labels = logits(6, 5), logits(7, 5)[1:], torch.arange(6) % 5
    p, q = F.softmax(hints / 3, 1), F.softmax(x / 3, 1)
    divergence = 9 * (p * (p / q).log()).sum(1).mean()
    want = (1 - weight) * F.cross_entropy(x, labels) + weight * divergence
    got = objective(teacher="t", distillation_weight=weight, temperature=3.0)(x, labels, hints)
    assert got == pytest.approx(float(want), rel=1e-5)


def test_hard_distillation_reads_the_second_head() -> None:
    x, y, hints, labels = logits(6, 5), logits(8, 5)[2:], logits(7, 5)[1:], torch.arange(6) % 5
    got = objective(teacher="t", temperature=0.0)((x, y), labels, hints)
    want = 0.5 * F.cross_entropy(x, labels) + 0.5 * F.cross_entropy(y, hints.argmax(1))
    assert got == pytest.approx(float(want), rel=1e-6)


def test_the_mean_of_the_steps_learns_from_the_teacher() -> None:
    x, hints, labels = logits(3, 6, 5), logits(7, 5)[1:], torch.arange(6) % 5
    loss = objective(spiking(), tet=0.0, teacher="t", temperature=0.0, distillation_weight=1.0)
    assert loss(x, labels, hints) == pytest.approx(float(F.cross_entropy(x.mean(0), hints.argmax(1))), rel=1e-6)


def test_a_head_for_distillation_is_turned_on() -> None:
    calls: list[bool] = []

    class Distilled(nn.Module):
        head_dist = nn.Identity()

        def set_distilled_training(self, enable: bool) -> None:
            calls.append(enable)

    objective(Distilled())
    assert calls == []
    objective(Distilled(), teacher="t")
    assert calls == [True]


def test_teacher_sees_its_own_normalisation() -> None:
    seen: list[Tensor] = []

    class Seer(nn.Linear):
        pretrained_cfg: ClassVar[dict[str, Any]] = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    teacher = Teacher(Seer(1, 1), {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}, CPU)
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    teacher((pixels - mean) / std)
    own_mean, own_std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    assert (seen[0] - (pixels - own_mean) / own_std).abs().max() < 1e-6
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


def test_teacher_from_a_file(tmp_path) -> None:
    model = striate.create_model("spikformer_nano", num_classes=5, in_chans=1).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    config = LossConfig(
        teacher="spikformer_nano", teacher_options={"checkpoint_path": str(tmp_path / "teacher.safetensors")}
    )
    teacher = build_teacher(config, 5, 1, PREPROCESS, CPU)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(teacher.model(x), model(x))
    with pytest.raises(ValueError, match="has a classifier of other than 7 classes"):
        build_teacher(config, 7, 1, PREPROCESS, CPU)
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "timm.pth")
    config = LossConfig(teacher="test_vit", teacher_options={"checkpoint_path": str(tmp_path / "timm.pth")})
    assert build_teacher(config, 5, 3, PREPROCESS, CPU).model.num_classes == 5
    with pytest.raises(ValueError, match=r"timm.pth does not fit test_vit|with .*size mismatch"):
        build_teacher(config, 7, 3, PREPROCESS, CPU)


def test_bad_teachers(tmp_path) -> None:
    with pytest.raises(ValueError, match="no model 'no_such_model'"):
        build_teacher(LossConfig(teacher="no_such_model"), 5, 1, PREPROCESS, CPU)
    with pytest.raises(ValueError, match="no working download of biformer_nano is known"):
        build_teacher(LossConfig(teacher="biformer_nano"), 1000, 3, PREPROCESS, CPU)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.tet", "1.0"], r"loss.tet is 1.0, but must be in \[0, 1\), or null"),
        (["--loss.distillation_weight", "1.5"], r"loss.distillation_weight is 1.5, but must be in \[0, 1\]"),
        (["--loss.temperature", "-1"], "loss.temperature is -1.0, but must be >= 0"),
        (["--loss.teacher_options", "{a: 1}"], "loss.teacher_options is {'a': 1}, but must be {} without a teacher"),
        (["--loss.tat", "0.1"], "did you mean loss.tet"),
    ],
)
def test_bad_keys(words, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config([*arguments(tmp_path, tmp_path / "run"), *words])


def test_a_run_learns_from_another_run_and_resumes_exactly(images, tmp_path, monkeypatch) -> None:
    """A spiking pupil of a finished run, every step of it learning alone: all of it survives a stop."""
    teacher = tmp_path / "teacher"
    train(small_config(images, teacher, model__in_chans=1, schedule__epochs=2))
    keys = SPIKING | {
        "model__in_chans": 1, "loss__tet": 0.1, "loss__teacher": str(teacher), "loss__temperature": 2.0,
        "schedule__epochs": 2,
    }  # fmt: skip
    with Trainer(small_config(images, tmp_path / "whole", **keys)) as trainer:
        assert trainer.teacher is not None
        trainer.fit()
    stop_after(monkeypatch, 5)
    with pytest.raises(Exception, match="stopped by SIGTERM after step 5"):
        train(small_config(images, tmp_path / "stopped", **keys))
    monkeypatch.undo()
    train(small_config(images, tmp_path / "stopped", **keys))
    assert first_difference(record_of(tmp_path / "whole"), record_of(tmp_path / "stopped")) is None
    alone = keys | {"loss__teacher": None, "loss__temperature": 1.0}
    train(small_config(images, tmp_path / "alone", **alone))
    losses = [record_of(tmp_path / run)["log"][0]["loss"] for run in ("whole", "alone")]
    assert all(map(math.isfinite, losses))
    assert losses[0] != losses[1]


def test_a_run_as_teacher_brings_its_own_options(images, tmp_path) -> None:
    train(small_config(images, tmp_path / "teacher", schedule__epochs=2))
    config = LossConfig(teacher=str(tmp_path / "teacher"), teacher_options={"drop_rate": 0.1})
    with pytest.raises(ValueError, match="is a run, which has its weights and options; leave yours out"):
        build_teacher(config, 10, 3, PREPROCESS, CPU)
    with pytest.raises(ValueError, match="has 10 classes, the model 7"):
        build_teacher(LossConfig(teacher=str(tmp_path / "teacher")), 7, 3, PREPROCESS, CPU)


class TestMaps:
    """Attention transfer: where the last map is active, whatever its channels and size."""

    def test_it_is_its_formula(self) -> None:
        own, wanted = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 4, 5)
        places = [x.square().sum(1).flatten(1) for x in (own, wanted)]
        a, b = (x / x.norm(dim=1, keepdim=True) for x in places)
        assert float(attention_transfer(own, wanted)) == pytest.approx(float(((a - b) ** 2).sum() / 2), rel=1e-5)
        assert float(attention_transfer(own, 3 * own)) == pytest.approx(0, abs=1e-6)
        assert float(attention_transfer(own, own.roll(1, 2))) > 0.01

    def test_a_larger_map_is_averaged(self) -> None:
        own = torch.randn(2, 3, 2, 2)
        larger = own.repeat_interleave(4, 2).repeat_interleave(3, 3)
        assert float(attention_transfer(own, larger)) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("name", ["biformer_nano", "test_vit"])
    def test_the_outputs_stay(self, name: str) -> None:
        options = {"img_size": 64} if name == "test_vit" else {}
        model = striate.create_model(name, num_classes=5, **options).eval()
        x = torch.randn(2, 3, 64, 64)
        outputs, maps = WithMap(model)(x)
        assert torch.allclose(outputs, model(x), atol=1e-6)
        assert maps.shape[:2] == (2, model.num_features)

    def test_a_run_learns_it(self, images: Path, tmp_path: Path) -> None:
        """The loss is the one without it plus so much of the distance."""
        weights = tmp_path / "teacher.safetensors"
        safetensors.torch.save_file(timm.create_model("test_efficientnet", num_classes=10).state_dict(), weights)
        teacher = {"loss__teacher": "test_efficientnet", "loss__teacher_options": {"checkpoint_path": str(weights)}}
        losses = {}
        for weight in (0.0, 2.0):
            keys = {"data__image_size": 96, "loss__feature_weight": weight}  # a map of one place has nothing to tell
            config = small_config(images, tmp_path / str(weight), **teacher, **keys)
            with Trainer(config) as trainer:
                batch = next(train_loader(trainer.train_images, trainer._order(0, 1), 0, CPU))
                losses[weight] = trainer._loss(batch, 0, 0).detach()
        assert 0 < float(losses[2.0] - losses[0.0]) <= 4

    def test_only_with_a_teacher(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"loss.feature_weight is 1.0, but must be 0 without a teacher"):
            small_config(images, tmp_path, loss__feature_weight=1.0)
        with pytest.raises(ValueError, match="needs models with forward_intermediates; Identity has none"):
            WithMap(nn.Identity())
