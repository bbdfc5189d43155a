"""What spiking backbones do beyond the contract: time steps, event frames, attention by its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import striate
from helpers import relative
from striate.backbones._spiking import DropPath, Lif, SpikingBackbone, SpikingHead
from striate.backbones.spike_driven_transformer import SpikeDrivenSelfAttention
from striate.backbones.spikformer import SpikingSelfAttention
from striate.backbones.statten import SpatialTemporalAttention

NAMES = ["spikformer_nano", "spike_driven_transformer_2_512_cifar", "statten_2_512_cifar"]


@pytest.fixture(autouse=True)
def _exact() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(name: str, **kwargs: Any) -> SpikingBackbone:
    model = striate.create_model(name, num_classes=7, depths=(1,), **({"dim": 32, "num_heads": 4} | kwargs))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(1, 3)
                module.bias.uniform_(-0.5, 1)
                module.momentum = 1.0
        model.train()(images(4, 3, 32, 24))  # statistics with which neurons fire
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 32, 24)))


@pytest.mark.parametrize("name", NAMES)
def test_event_frames_are_a_time_of_their_own(name) -> None:
    model, x = make(name, timesteps=4), images()
    assert torch.equal(model(x.expand(4, *x.shape)), model(x))
    assert torch.equal(model(x.expand(2, *x.shape)), make_like(model, name, timesteps=2)(x))
    frames = images(4, 2, 3, 32, 24)
    assert not torch.equal(model(frames), model(frames.flip(0)))
    model.timesteps = 2
    assert torch.equal(model(x), make_like(model, name, timesteps=2)(x))


def make_like(model: nn.Module, name: str, **kwargs: Any) -> nn.Module:
    twin = make(name, **kwargs)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_mean_over_the_steps(name) -> None:
    model, x = make(name), images()
    steps = model.head(model.forward_features(x), keep_time=True)
    assert steps.shape == (4, 2, 7)
    assert relative(steps.mean(0), model(x)) < 1e-12
    assert relative(steps[0], model(x)) > 1e-3
    assert relative(model(x)[:1], model(x)[1:]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_between_calls(name) -> None:
    model, x = make(name), images()
    first = model(x)
    model(images())
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (33, 45)])
def test_pyramids_with_time(name, size) -> None:
    kwargs = dict(num_classes=7, depths=(1,), dim=32, num_heads=4, features_only=True)
    model = striate.create_model(name, **kwargs, keep_time=True).eval()
    mean = striate.create_model(name, **kwargs).eval()
    mean.load_state_dict(model.state_dict())
    x = images(2, 3, *size)
    (maps,), (want,) = model(x), mean(x)
    stride = 8 if name == "spikformer_nano" else 4
    assert maps.shape == (4, 2, 32, -(-size[0] // stride), -(-size[1] // stride))
    assert maps.is_contiguous()
    assert relative(maps.mean(0), want) < 1e-12
    normed = striate.create_model(name, **kwargs, keep_time=True, feature_norms=True).eval()
    assert normed(x)[0].shape == maps.shape


def test_time_needs_steps() -> None:
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match="keep_time=True: a Swin has no time steps"):
        striate.create_model("swin_tiny", features_only=True, keep_time=True)
    with pytest.raises(ValueError, match="keep_time go with features_only=True"):
        striate.create_model("spikformer_nano", keep_time=True)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("spikformer_nano", dict(timesteps=0), "timesteps=0 must be at least 1"),
        ("spikformer_nano", dict(dim=36), "dim=36 must be a multiple of 8 and of num_heads=4"),
        ("spikformer_nano", dict(depths=(1, 2)), r"depths=\(1, 2\) must have one entry"),
        ("spikformer_v2_8_384", dict(depths=(1, 2)), r"depths=\(1, 2\) must have one entry"),
        ("statten_2_512_cifar", dict(chunk_size=3), "chunk_size=3 must be a divisor of timesteps=4"),
        ("statten_2_512_cifar", dict(chunks=3), "takes no argument 'chunks'; it takes .*chunk_size.*num_heads"),
    ],
)
def test_bad_arguments(name, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        striate.create_model(name, **kwargs)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=r"input \(3, 32, 32\); pass images \(B, C, H, W\) or event frames"):
        make("spikformer_nano")(images(3, 32, 32))
    with pytest.raises(ValueError, match="3 time steps must be a multiple of chunk_size=2"):
        make("statten_2_512_cifar")(images(3, 1, 3, 32, 32))


def spikes(*shape: int) -> Tensor:
    return (torch.rand(shape) < 0.4).double()


class Fixed(nn.Module):
    """A layer that returns what it is told."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def with_spikes(attn: nn.Module, t: int, b: int, h: int, w: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """Let the q, k and v of an attention be given spikes, and its output what its neurons say."""
    q, k, v = (spikes(t, b, h, w, c) for _ in range(3))
    attn.q_lif, attn.k_lif, attn.v_lif = Fixed(q), Fixed(k), Fixed(v)
    attn.proj = nn.Identity()
    return q, k, v


def lif(x: Tensor, threshold: float) -> Tensor:
    potential, out = torch.zeros_like(x[0]), []
    for current in x:
        potential = potential + (current - potential) / 2
        out.append((potential >= threshold).double())
        potential = potential * (1 - out[-1])
    return torch.stack(out)


def test_spiking_self_attention_is_its_formula() -> None:
    attn = SpikingSelfAttention(24, num_heads=3, qkv_bias=False).eval()
    attn.proj_lif = nn.Identity()
    q, k, v = with_spikes(attn, 4, 2, 3, 5, 24)
    want = torch.zeros(4, 2, 15, 24)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        a, b, c = (s.flatten(2, 3)[..., part] for s in (q, k, v))
        want[..., part] = a @ b.transpose(-2, -1) @ c / 8
    want = lif(want, 0.5).view_as(q)
    got = attn(torch.zeros_like(q))
    assert torch.equal(got, want)
    assert 0.05 < want.mean() < 0.95


def test_spike_driven_attention_is_its_formula() -> None:
    attn = SpikeDrivenSelfAttention(24, num_heads=3).eval()
    q, k, v = with_spikes(attn, 4, 2, 1, 5, 24)
    sums = (k * v).sum((2, 3))  # of 5 tokens at a rate of 0.16
    want = q * lif(sums, 0.5)[:, :, None, None]
    got = attn(torch.zeros_like(q))
    assert torch.equal(got, want)
    assert 0.05 < got.mean() < q.mean() - 0.05


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_spatial_temporal_attention_is_its_formula(chunk) -> None:
    attn = SpatialTemporalAttention(24, num_heads=3, chunk_size=chunk).eval()
    q, k, v = with_spikes(attn, 4, 2, 4, 3, 24)
    want = torch.zeros(4, 2, 12, 24)
    for start in range(0, 4, chunk):
        steps = range(start, start + chunk)
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            a, b, c = (torch.cat([s[t].flatten(1, 2)[..., part] for t in steps], 1) for s in (q, k, v))
            out = a @ (b.transpose(-2, -1) @ c / 4)  # the height of the map
            for i, t in enumerate(steps):
                want[t, ..., part] = out[:, 12 * i : 12 * i + 12]
    assert torch.equal(attn(torch.zeros_like(q)), lif(want, 0.5).view_as(q))


def test_an_image_loses_a_branch_in_all_its_steps() -> None:
    drop = DropPath(0.5).train()
    kept = drop(torch.ones(4, 200, 2, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(kept, kept[:1, :, :1, :1, :1].expand_as(kept))
    assert 0.3 < (kept[0, :, 0, 0, 0] == 0).double().mean() < 0.7


def test_head_reads_spikes() -> None:
    head = SpikingHead(6, 3, "avg", 0.0, Lif(), distilled=False).eval()
    x = torch.randn(4, 2, 3, 3, 6) * 4
    pooled = lif(x.mean((2, 3)), 1.0)
    assert relative(head(x), head.fc(pooled).mean(0)) < 1e-12
    assert torch.equal(head(x, pre_logits=True), pooled.mean(0))
    with pytest.raises(ValueError, match="num_classes=3 with global_pool=''"):
        head.reset(3, "")


def test_fine_tuning_with_a_teacher_starts_from_a_model_without_one(messages) -> None:
    torch.set_default_dtype(torch.float32)
    small = dict(depths=(1, 1, 1, 1), dims=(16, 16, 16, 16), num_heads=2, num_classes=3)
    plain = striate.create_model("metaspikformer_15m", **small)
    model = striate.create_model("metaspikformer_15m", **small, distilled=True)
    fresh = model.head.fc_dist.weight.clone()
    striate.load_checkpoint(model, plain.state_dict())
    assert messages() == ["the checkpoint has no classifier for distillation: the model's stays as it is"]
    assert torch.equal(model.head.fc.weight, plain.head.fc.weight)
    assert torch.equal(model.head.fc_dist.weight, fresh)
    with pytest.raises(ValueError, match=r"2 unexpected \(head.fc_dist.bias, head.fc_dist.weight\)"):
        striate.load_checkpoint(plain, model.state_dict())
    other = striate.create_model("metaspikformer_15m", **small | {"num_classes": 5}, distilled=True)
    striate.load_checkpoint(other, model.state_dict())
    assert messages() == ["the checkpoint has 3 classes, the model 5: its classifier was not loaded"]
