"""`striate profile --energy`: exact counts on small networks, real spiking models, the command and its files."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import striate
from striate.backbones._spiking import Lif, Multispike
from striate.train import profile
from striate.train.cli import main
from striate.train.config import DataConfig
from striate.train.data import open_source
from striate.train.loop import train
from striate.train.model import load_trained
from striate.train.profile import EnergyReport, LayerEnergy, Levels, firing_rates, profile_energy
from train_helpers import small_config, write_small_npz

SUBSET = DataConfig(name="fashion-mnist-subset", workers=0, batch_size=8)


class Call(nn.Module):
    """A network that is a function of the image and of its layers."""

    def __init__(self, call: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call, self.layers = call, nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, **self.layers)


def spikes(*shape: int, rate: float = 0.3) -> Tensor:
    return (torch.rand(shape) < rate).float()


def rows_of(model: nn.Module, x: Tensor, batch: int = 2) -> list[LayerEnergy]:
    return list(profile_energy(model, x.split(batch)).rows)


def real_images(model: nn.Module, count: int) -> Tensor:
    return torch.cat(list(profile._open_images(model, SUBSET, 3, count, torch.device("cpu"))))


def awake(name: str, images: int = 8, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    """A model whose norms fit real images and let neurons fire, as after training; and the images."""
    model = striate.create_model(name, num_classes=10, **kwargs)
    x = real_images(model, images)
    for norm in model.modules():
        if hasattr(norm, "running_var"):
            norm.momentum = None
            nn.init.constant_(norm.weight, 3.0)
    with torch.no_grad():
        model.train()(x)
    return model.eval().double(), x.double()  # a threshold turns the last bits of float32 into spikes


# Counts


def test_a_linear_layer_adds_once_per_spike_and_output() -> None:
    x = spikes(6, 1, 3, 4)
    model = Call(lambda x, fc: fc(x.flatten(1)), fc=nn.Linear(12, 5))
    report = profile_energy(model, x.split(4))
    (row,) = report.rows
    assert (row.layer, row.op, row.kind, row.steps, row.most_spikes) == ("layers.fc", "linear", "AC", 1, 1)
    assert row.macs == 12 * 5
    assert row.rate == float(x.sum()) / x.numel()
    assert row.sops == pytest.approx(float(x.sum()) * 5 / 6, rel=1e-12)
    assert row.energy_uj == report.energy_uj == pytest.approx(0.9e-6 * row.sops, rel=1e-12)
    assert report.ann_energy_uj == pytest.approx(4.6e-6 * 60, rel=1e-12)
    assert report.ratio == pytest.approx(4.6 * 60 / (0.9 * row.sops), rel=1e-12)
    assert report.images == 6


def test_an_integer_activation_counts_several_spikes() -> None:
    counts = torch.randint(5, (6, 1, 3, 4))
    (row,) = rows_of(Call(lambda x, fc: fc(x.flatten(1)), fc=nn.Linear(12, 5)), counts / 4)
    assert row.most_spikes == 4
    assert row.sops == pytest.approx(float(counts.sum()) * 5 / 6, rel=1e-12)


def test_the_step_of_a_saturated_neuron_is_known() -> None:
    model = Call(lambda x, neuron, fc: fc(neuron(x).flatten(1)), neuron=Multispike(4), fc=nn.Linear(12, 5))
    (row,) = rows_of(model, torch.full((4, 1, 3, 4), 7.0))
    assert (row.rate, row.most_spikes, row.sops) == (4.0, 4, 4 * 60)


def test_real_inputs_are_macs_and_the_ratio_is_1() -> None:
    layers = dict(conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 5))
    model = Call(lambda x, conv, fc: fc(F.gelu(conv(x)).mean((2, 3))), **layers)
    report = profile_energy(model, torch.randn(4, 3, 8, 8).split(3))
    assert [(row.kind, row.rate, row.most_spikes, row.sops) for row in report.rows] == [("MAC", None, None, 0.0)] * 2
    assert [row.macs for row in report.rows] == [36 * 27 * 4, 20]
    assert (report.ratio, report.sops, report.timesteps) == (1.0, 0.0, 1)
    assert report.energy_uj == pytest.approx(4.6e-6 * (36 * 27 * 4 + 20), rel=1e-12)


def test_weights_are_not_spikes() -> None:
    layers = dict(conv=nn.Conv2d(3, 4, 1), fc=nn.Linear(4, 5))
    model = Call(lambda x, conv, fc: fc(conv(x).mean((2, 3))) + torch.randn(1, 4) @ fc.weight.t(), **layers)
    nn.init.constant_(layers["conv"].weight, 1.0)
    with torch.no_grad():
        layers["fc"].weight.copy_(spikes(5, 4))
    assert [row.kind for row in rows_of(model, torch.randn(4, 3, 8, 8))] == ["MAC", "MAC", "MAC"]


@pytest.mark.parametrize(("padding", "groups", "stride"), [(0, 1, 1), (1, 2, 1), (2, 1, 2)])
def test_a_convolution_costs_its_macs_times_the_rate(padding: int, groups: int, stride: int) -> None:
    """Padding counts as if it fired like the input: with it, real additions are fewer."""
    conv = nn.Conv2d(4, 6, 3, stride, padding, groups=groups)
    x = spikes(5, 4, 7, 7)
    (row,) = rows_of(Call(lambda x, conv: conv(x), conv=conv), x)
    side = (7 + 2 * padding - 3) // stride + 1
    assert row.macs == side**2 * 6 * 9 * 4 // groups
    assert row.sops == pytest.approx(row.macs * float(x.mean()), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_attention_counts_the_sparser_of_k_and_v_and_then_q(scale: float) -> None:
    x = torch.stack([spikes(4, 2, 16, 8, rate=rate) for rate in (0.6, 0.2, 0.1)], 1)  # q, k, v of 2 heads
    x[:, 0, :, :4] = 1.0  # q fires more than k^T v, whose factors are sparse

    def attend(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(2, (2, 16)).unbind(1)
        return q @ (k.transpose(-2, -1) @ v * scale)

    first, second = rows_of(Call(attend), x.flatten(2, 3))
    q, _, v = x.mean((0, 2, 3, 4)).tolist()
    assert [(row.op, row.kind, row.macs) for row in (first, second)] == [
        ("matmul", "AC", 2 * 8 * 8 * 16), ("matmul 2", "AC", 2 * 8 * 8 * 16)
    ]  # fmt: skip
    assert first.rate == pytest.approx(v, rel=1e-6)
    assert second.rate == pytest.approx(q, rel=1e-6)


def test_fused_attention_is_seen_and_its_softmax_is_real() -> None:
    x = torch.randn(4, 3, 16, 8)
    x[:, 2] = spikes(4, 16, 8)
    model = Call(lambda x: F.scaled_dot_product_attention(*x[:, :, None].unbind(1)))
    first, second = rows_of(model, x)
    assert (first.op, first.kind, first.macs) == ("matmul", "MAC", 16 * 16 * 8)
    assert (second.op, second.kind, second.macs) == ("matmul 2", "AC", 16 * 16 * 8)
    assert second.rate == pytest.approx(float(x[:, 2].mean()), rel=1e-6)


def test_a_sum_of_products_adds_once_per_spike() -> None:
    x = spikes(4, 3, 6, 5, rate=0.5)

    def attend(x: Tensor) -> Tensor:
        q, k, v = x.unbind(1)
        mask = (k * v).sum(1, keepdim=True)
        return q * (mask > 1) + x.sum((1, 2))[:, None]  # masks and other sums are free

    (row,) = rows_of(Call(attend), x)
    assert (row.op, row.kind, row.macs) == ("sum", "AC", 30)
    assert row.sops == float((x[:, 1] * x[:, 2]).sum()) / 4
    assert rows_of(Call(lambda x, conv: (conv(x) * conv(x)).sum((2, 3)), conv=nn.Conv2d(3, 2, 1)), x)[0].op == "conv"


class Repeating(nn.Module):
    """Convolves a still image once, and event frames each; then spikes, real numbers, and a mean of spikes."""

    def __init__(self, timesteps: int = 3) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.conv, self.lif, self.fc = nn.Conv2d(2, 4, 3), Lif(), nn.Linear(4, 6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
        nn.init.constant_(self.conv.bias, 1.5)  # type: ignore[arg-type]

    def hidden(self, x: Tensor) -> Tensor:
        frames = x if x.ndim == 5 else x[None]
        x = self.conv(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return self.lif(x if len(frames) > 1 else x.expand(self.timesteps, *x.shape[1:]))  # (T, B, 4, H, W)

    def last(self, x: Tensor) -> Tensor:
        y = self.mix(self.fc(self.hidden(x).movedim(2, -1)))
        return (y > 0).float().flatten(2, 3)[:, :, 0]  # (T, B, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(x).mean(0))


def test_what_runs_once_is_told_from_what_runs_in_every_step() -> None:
    model, x = Repeating(), torch.randn(4, 2, 6, 6)
    report = profile_energy(model, x.split(2))
    conv, fc, mix, head = report.rows
    assert (report.timesteps, model.timesteps) == (3, 3)
    assert (conv.kind, conv.steps, conv.macs) == ("MAC", 1, 16 * 18 * 4)
    assert conv.energy_uj == pytest.approx(4.6e-6 * conv.macs, rel=1e-12)
    with torch.no_grad():
        hidden, last = model.hidden(x), model.last(x)
    assert (fc.kind, fc.steps, fc.macs) == ("AC", 3, 16 * 4 * 6)
    assert fc.sops == pytest.approx(float(hidden.sum()) * 6 / 4, rel=1e-6)
    assert fc.sops == pytest.approx(fc.rate * fc.steps * fc.macs, rel=1e-12)
    assert (mix.kind, mix.steps, mix.macs) == ("MAC", 3, 16 * 6 * 6)
    assert mix.energy_uj == pytest.approx(4.6e-6 * 3 * mix.macs, rel=1e-12)
    assert (head.kind, head.steps, head.macs) == ("AC", 1, 30)
    assert head.sops == pytest.approx(float(last.sum()) * 5 / 4, rel=1e-6), "the spikes of all steps"
    assert report.macs == conv.macs + fc.macs + mix.macs + head.macs
    assert report.energy_uj == pytest.approx(sum(row.energy_uj for row in report.rows), rel=1e-12)
    assert report.ann_energy_uj == pytest.approx(4.6e-6 * report.macs, rel=1e-12)


def test_event_frames_bring_their_own_steps() -> None:
    x = spikes(5, 4, 2, 6, 6)
    report = profile_energy(Repeating(), x.split(3, 1))
    conv = report.rows[0]
    assert (report.timesteps, report.images) == (5, 4)
    assert (conv.kind, conv.steps, conv.macs) == ("AC", 5, 16 * 18 * 4)
    assert conv.sops == pytest.approx(float(x.mean()) * 5 * conv.macs, rel=1e-6)


def test_work_that_a_batch_shares_counts_for_every_image() -> None:
    def call(x: Tensor, bias: nn.Module, conv: nn.Module) -> Tensor:
        return conv(x) + bias(bias.weight)

    layers = dict(bias=nn.Linear(4, 4), conv=nn.Conv2d(1, 2, 1))
    reports = [profile_energy(Call(call, **layers), torch.randn(6, 1, 4, 4).split(batch)) for batch in (1, 6)]
    assert [row.macs for report in reports for row in report.rows] == 2 * [32, 64]


def test_one_value_everywhere_is_spikes_only_among_spikes() -> None:
    quiet = Call(lambda x, conv, fc: fc(conv(x).mean((2, 3)) * 0), conv=nn.Conv2d(1, 2, 1), fc=nn.Linear(2, 3))
    assert [row.kind for row in rows_of(quiet, torch.randn(2, 1, 4, 4))] == ["MAC", "MAC"]
    assert [row.kind for row in rows_of(quiet, torch.ones(2, 1, 4, 4))] == ["MAC", "MAC"]
    row = rows_of(quiet, spikes(2, 1, 4, 4, rate=0.9))[1]
    assert (row.kind, row.rate, row.sops) == ("AC", 0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "rate", "most"),
    [
        ([0.0, 0.5, 0.75, 1.0], 2.25, 4),  # no single spike: the step is the common one
        ([0.0, 3.7], 0.5, 1),
        ([k / 196 for k in range(60)], 29.5, 59),
        ([1.0, 1.0], 1.0, 1),
        ([0.0, 0.0], 0.0, 0),
    ],
)
def test_multiples_of_a_step_are_spikes(values: list[float], rate: float, most: int) -> None:
    levels = Levels()
    for part in torch.tensor(values).split(2):
        levels.add(part)
    found = levels.spikes()
    assert found is not None
    assert found.most == most
    assert found.rate == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(
    "values",
    [[-1.0, 0.0, 1.0], [0.0, 1.0, 3**0.5], [0.0, 1e-7, 1.0], [k / 65 for k in range(66)], [float("nan")]],
)
def test_other_values_are_real_numbers(values: list[float]) -> None:
    levels = Levels()
    for part in torch.tensor(values).split(2):
        levels.add(part)
    assert levels.spikes() is None


def test_many_values_are_real_numbers_whatever_the_batches() -> None:
    levels = Levels()
    for value in torch.rand(200):
        levels.add(value[None])
    assert levels.spikes() is None
    assert levels.counts is None, "not kept"


# Models


@pytest.mark.parametrize("name", ["biformer_nano", "test_vit", "test_efficientnet"])
def test_models_that_do_not_spike_are_macs_as_torch_counts_them(name: str) -> None:
    model = striate.create_model(name, **({"img_size": 32} if name == "test_vit" else {})).eval()
    x = torch.randn(3, 3, 32, 32)
    report = profile_energy(model, x.split(2))
    counter = FlopCounterMode(display=False)
    with profile.reference_path(), sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        model(x[:1])
    assert 2 * report.macs == counter.get_total_flops()
    assert {row.kind for row in report.rows} == {"MAC"}
    assert report.ratio == 1.0


def test_spikformer_on_real_images() -> None:
    model, x = awake("spikformer_nano", pools=(True, False, True, False))
    rates = firing_rates(model, x)
    names = [name for name, module in model.named_modules() if isinstance(module, Lif)]
    assert list(rates) == names
    assert all(0 < rate < 1 for rate in rates.values()), rates

    report = profile_energy(model, x.split(4))
    kinds = [row.kind for row in report.rows]
    assert kinds[:-1] == ["MAC"] + ["AC"] * (len(kinds) - 2), "all but the first convolution and the pooled classifier"
    assert report.timesteps == 4
    by_name = {(row.layer, row.op): row for row in report.rows}
    assert by_name["patch_embed.rpe.conv", "conv"].rate == pytest.approx(rates["patch_embed.lifs.3"], rel=1e-6)
    for block in ("stages.0.blocks.0", "stages.0.blocks.1"):
        q, k, v = (rates[f"{block}.attn.{name}_lif"] for name in "qkv")
        assert by_name[f"{block}.attn", "matmul"].rate == pytest.approx(min(k, v), rel=1e-6)
        assert by_name[f"{block}.attn", "matmul 2"].rate == pytest.approx(q, rel=1e-6)
        assert by_name[f"{block}.mlp.fc2.linear", "linear"].rate == pytest.approx(
            rates[f"{block}.mlp.fc1_lif"], rel=1e-6
        )
    stream = by_name["stages.0.blocks.1.attn.q.linear", "linear"]
    assert 2 <= stream.most_spikes <= 4, "the residual stream counts the spikes of two stems and two branches"
    parts = (
        "patch_embed.lifs.3",
        "patch_embed.rpe_lif",
        "stages.0.blocks.0.attn.proj_lif",
        "stages.0.blocks.0.mlp.fc2_lif",
    )
    assert stream.rate == pytest.approx(sum(rates[part] for part in parts), rel=1e-6)
    assert 1 < report.ratio < 10


def test_numbers_do_not_depend_on_the_batch() -> None:
    model, x = awake("spikformer_nano", images=3, timesteps=2, dim=64, depths=(1,))
    reports = [profile_energy(model, x.split(batch)) for batch in (1, 2)]
    assert reports[0] == reports[1]
    with torch.inference_mode():
        assert profile_energy(model, [x]) == reports[0]


def test_spike_driven_attention_adds_only() -> None:
    model, x = awake("spike_driven_transformer_2_512_cifar", images=2, dim=64, timesteps=2)
    attn = model.get_submodule("stages.0.blocks.0.attn")
    found: list[Tensor] = []
    for neurons in (attn.k_lif, attn.v_lif):
        neurons.register_forward_hook(lambda _, __, out: found.append(out))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model(x)
    k, v = found
    report = profile_energy(model, x.split(2))
    assert [row.kind for row in report.rows] == ["MAC"] + ["AC"] * (len(report.rows) - 1)
    row = next(row for row in report.rows if row.op == "sum")
    assert row.layer == "stages.0.blocks.0.attn"
    assert row.sops == pytest.approx(float((k * v).sum()) / 2, rel=1e-12)
    head = report.rows[-1]
    assert head.rate == pytest.approx(2 * firing_rates(model, x)["head.lif"], rel=1e-6)


def test_rates_are_the_means_of_outputs_in_spikes() -> None:
    x = torch.rand(3, 4, 1, 5, 5)
    model = Call(
        lambda x, lif, three, two: two(three(lif(x * 3) + x)), lif=Lif(), three=Multispike(3), two=Multispike(2, 1.5)
    )
    a = model.layers["lif"](x * 3)
    b = model.layers["three"](a + x)
    c = model.layers["two"](b)
    want = {"layers.lif": a.mean(), "layers.three": b.mean() * 3, "layers.two": c.mean() / 1.5}
    assert firing_rates(model.train(), x) == pytest.approx({name: float(rate) for name, rate in want.items()})
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_rates_of_a_converted_network() -> None:
    model, x = awake("mst_nano", spiking=True, timesteps=4)
    nn.init.constant_(model.get_submodule("patch_embed.proj_if").up, 0.7)  # type: ignore[arg-type]
    found = []
    hook = model.get_submodule("patch_embed.proj_if").register_forward_hook(lambda _, __, out: found.append(out))
    rates = firing_rates(model, x)
    hook.remove()
    assert rates["patch_embed.proj_if"] == pytest.approx(float((found[0] > 0).float().mean()), rel=1e-6)
    assert 0 < rates["patch_embed.proj_if"] < 1
    model.set_spiking(None)  # type: ignore[operator]
    with pytest.raises(ValueError, match="MST has no spiking neurons"):
        firing_rates(model, x)


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "cpu")
    model = Repeating().train()
    profile_energy(model, [torch.randn(2, 2, 6, 6)])
    assert model.training
    assert model.timesteps == 3
    assert os.environ["STRIATE_BACKEND"] == "cpu"
    with pytest.raises(RuntimeError, match="channels"):
        profile_energy(model, [torch.randn(2, 3, 6, 6)])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_to_profile() -> None:
    with pytest.raises(ValueError, match="there are no images"):
        profile_energy(Repeating(), [])
    with pytest.raises(ValueError, match="Identity has no convolution or matrix product"):
        profile_energy(nn.Identity(), [torch.randn(2, 3, 6, 6)])


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    images = write_small_npz(folder / "small.npz")
    nano = dict(model__name="spikformer_nano", model__options={"depths": [1]})
    train(small_config(images, folder / "run", schedule__epochs=1, schedule__warmup_epochs=0, **nano))
    return folder / "run"


def words_of(text: str) -> list[str]:
    return ["profile", "--energy", *text.split(), "--data.workers", "0"]


def test_the_command_prints_and_writes_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = awake("spikformer_nano", images=4, dim=64, depths=(1,))
    model, x = model.float(), x.float()
    address = striate.push(model, f"local-dir:{tmp_path / 'hub'}")
    files = f"--csv {tmp_path / 'energy.csv'} --png {tmp_path / 'energy.png'}"
    assert main(words_of(f"{address} --images 4 --batch 3 {files} --json")) == 0
    said = json.loads(capsys.readouterr().out)
    want = profile_energy(model, x.split(3)).record()
    assert said == {"source": address, "dataset": "fashion-mnist-subset", "trained": True, **want}
    assert sum(row["share"] for row in said["rows"]) == pytest.approx(1)
    assert sum(row["energy_uj"] for row in said["rows"]) == pytest.approx(said["energy_uj"])
    with (tmp_path / "energy.csv").open() as text:
        lines = list(csv.DictReader(text))
    assert [
        {key: None if value == "" else type(row[key])(value) if row[key] is not None else value
         for key, value in line.items()}
        for line, row in zip(lines, said["rows"], strict=True)
    ] == said["rows"]  # fmt: skip
    with Image.open(tmp_path / "energy.png") as plot:
        assert plot.format == "PNG"
        left, right = (
            {colour: count for count, colour in plot.convert("RGB").crop(box).getcolors(1 << 24) or []}
            for box in ((0, 0, plot.width * 5 // 9, plot.height), (plot.width * 5 // 9, 0, plot.width, plot.height))
        )
    assert left[230, 97, 1] > 100, "bars of MACs"
    assert left[33, 102, 172] > 1000, "bars of spikes"
    assert right[33, 102, 172] > left[33, 102, 172], "bars of rates"
    assert (230, 97, 1) not in right
    assert sorted(path.name for path in tmp_path.iterdir()) == ["energy.csv", "energy.png", "hub"]

    assert main(words_of(f"{address} --images 4")) == 0
    table = capsys.readouterr().out
    assert f"energy {said['energy_uj']:.3f} uJ" in table
    assert f"{said['ratio']:.2f} times as much" in table
    assert all(row["layer"] in table for row in said["rows"])
    assert "random" not in table
    assert "dead" not in table


def test_random_weights_and_dead_neurons_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words_of("spikformer_nano --images 2")) == 0
    table = capsys.readouterr().out
    assert "spikformer_nano (random weights) on fashion-mnist-subset" in table
    assert "rows read no spike at all" in table


def test_a_model_that_does_not_spike_has_one_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words_of(f"biformer_nano --images 2 --png {tmp_path / 'e.png'} --json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ratio"], said["sops"], said["trained"]) == (1.0, 0.0, False)
    with Image.open(tmp_path / "e.png") as plot:
        assert plot.width == 650


def test_the_command_on_a_run_folder_and_on_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words_of(f"{run} --images 5 --json")) == 0
    said = json.loads(capsys.readouterr().out)
    config = DataConfig(name="npz", root=str(run.parent / "small.npz"), image_size=32, workers=0)
    model = load_trained(run)
    images = profile._open_images(model, config, 3, 5, torch.device("cpu"))
    want = profile_energy(model, images).record()
    assert said == {"source": str(run), "dataset": "npz", "trained": True, **want}
    assert any(row["rate"] for row in said["rows"])
    weights = f"--checkpoint_path {run / 'best.safetensors'} --model.num_classes 10 --model.options.depths [1]"
    data = f"--data.name npz --data.root {config.root} --data.image_size 32"
    assert main(words_of(f"spikformer_nano {weights} {data} --images 5 --json")) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert loaded["trained"] is True
    assert loaded["rows"] == said["rows"]
    assert main(words_of(f"{run} --images 1 --model.options.timesteps 2 --json")) == 0
    assert (said["timesteps"], json.loads(capsys.readouterr().out)["timesteps"]) == (4, 2)


def test_images_are_spread_over_the_split() -> None:
    model = striate.create_model("spikformer_nano")
    chosen = real_images(model, 7)
    source = open_source(SUBSET, "validation", 3)
    total = len(source.images)
    every = real_images(model, total)
    assert torch.equal(chosen, every[[i * total // 7 for i in range(7)]])
    with pytest.raises(ValueError, match=f"--images {total + 1}: fashion-mnist-subset has {total} in 'validation'"):
        real_images(model, total + 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["spikformer_nano"], "striate profile --energy spikformer_nano"),
        (["--energy"], "source"),
        (["--energy", "spikformer_nanno"], "no model 'spikformer_nanno'"),
        (["--energy", "spikformer_nano", "--images", "0"], "--images 0 must be at least 1"),
        (["--energy", "spikformer_nano", "--batch", "-3"], "--batch -3 must be at least 1"),
        (["--energy", "spikformer_nano", "--csv", "/no/such/folder/e.csv"], "--csv /no/such/folder/e.csv cannot"),
        (["--energy", "spikformer_nano", "--png", "."], "--png . cannot be written"),
        (["--energy", "spikformer_nano", "--checkpoint_path", "no.pth"], "no.pth does not exist"),
        (["--energy", "spikformer_nano", "--data.nam", "npz"], "did you mean data.name"),
        (["--energy", "spikformer_nano", "--data.eval_split", "other"], "'other'"),
        (["--energy", "spikformer_nano", "--run.device", "gpu"], "run.device 'gpu'"),
    ],
)
def test_bad_requests(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "_run", lambda *args: pytest.fail("measured"))
    assert main(["profile", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("striate profile: error: ")
    assert message in error


def test_a_run_folder_has_its_own_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words_of(f"{run} --checkpoint_path {run / 'best.safetensors'}")) == 2
    assert "--checkpoint_path does not go with the run folder" in capsys.readouterr().err
    assert main(words_of(f"{run} --weights other")) == 2
    assert "other.safetensors does not exist" in capsys.readouterr().err


def test_without_matplotlib_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(words_of(f"spikformer_nano --png {tmp_path / 'e.png'}")) == 2
    assert "pip install matplotlib, or striate with its extra `plot`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(words_of(f"spikformer_nano --images 1 --csv {tmp_path / 'e.csv'}")) == 0


def test_the_table() -> None:
    rows = (
        LayerEnergy("stem", "conv", "MAC", 2_000_000, 1, None, None, 0.0, 9.2),
        LayerEnergy("", "matmul 2", "AC", 1_000_000, 4, 0.25, 3, 1e6, 0.9),
    )
    table = profile.format_report(EnergyReport(rows, 7, 4)).splitlines()
    assert table[1].split() == ["stem", "conv", "MAC", "2.000", "1", "-", "-", "9.200", "91.1%"]
    assert table[2].split() == ["(model)", "matmul", "2", "AC", "1.000", "4", "0.2500", "1.000", "0.900", "8.9%"]
    assert "mean of 7, T = 4: 3.000 M MACs in a step, 1.000 M SOPs" in table[4]
    assert "energy 10.100 uJ; " in table[5]
    assert "13.800 uJ, 1.37 times as much" in table[5]


def test_a_report_of_nothing_has_no_ratio() -> None:
    report = EnergyReport((LayerEnergy("a", "linear", "AC", 10, 1, 0.0, 0, 0.0, 0.0),), 1, 1)
    assert report.ratio is None
    assert report.table()[0]["share"] == 0
    assert "times" not in profile.format_report(report)
