"""EcoFormer's hashing attention against plain loops, and the training of its hash functions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import striate
from helpers import relative
from striate.backbones import ecoformer
from striate.backbones.ecoformer import HashedAttention, KernelHash

SMALL: dict[str, Any] = dict(
    dims=(16, 16, 16, 16), num_heads=(1, 2, 2, 2), mlp_ratios=(1.0,) * 4, depths=(1, 1, 2, 1), num_classes=5
)
DIM = 4


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ecoformer, "STEPS", 3)


def small(name: str = "ecoformer_pvt_v2_b0", **kwargs: Any) -> nn.Module:
    return striate.create_model(name, **SMALL, **kwargs)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 48)


def hashes(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if ".hash." in name}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def clustered(batch: int, heads: int, tokens: int) -> Tensor:
    """Unit vectors around four directions."""
    centres = torch.randn(heads, 4, DIM)[:, torch.arange(tokens) % 4]
    return F.normalize(centres + 0.3 * torch.randn(batch, heads, tokens, DIM), dim=-1)


def codes_of(token: Tensor, sigma: float, table: KernelHash, head: int) -> Tensor:
    kernel = [math.exp(-float((token - a).square().sum()) / (2 * sigma)) for a in table.anchor[0, head]]
    centred = torch.tensor(kernel) - table.mean[0, head, 0]
    return torch.tensor([float(torch.sign((row * centred).sum())) for row in table.weight[head]])


def by_loops(attn: HashedAttention, x: Tensor) -> Tensor:
    """Hashing attention token by token, as the authors compute it."""
    batch, height, width, dim = x.shape
    heads, tokens = attn.num_heads, height * width
    qk, v = (layer(x).view(batch, tokens, heads, -1) for layer in (attn.to_qk, attn.to_v))
    out = torch.empty(batch, tokens, heads, dim // heads)
    for b in range(batch):
        for head in range(heads):
            unit = [token / token.norm() for token in qk[b, :, head]]
            distances = [float((u - a).square().sum()) for u in unit for a in attn.hash.anchor[0, head]]
            codes = [codes_of(u, sum(distances) / len(distances), attn.hash, head) for u in unit]
            for i in range(tokens):
                above = sum(codes[i].dot(codes[j]) * v[b, j, head] for j in range(tokens)) + 17 * v[b, i, head]
                below = sum(codes[i].dot(codes[j]) + 17 for j in range(tokens))
                out[b, i, head] = above / below
    return attn.proj(out.view(batch, height, width, dim))


@torch.no_grad()
def test_attention_is_that_of_plain_loops() -> None:
    attn = HashedAttention(8, 2)
    attn.hash.mean.uniform_(0.5, 0.7)
    x = torch.randn(2, 3, 5, 8) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    assert relative(attn(x), by_loops(attn, x)) < 1e-13


def test_signs_and_their_gradient() -> None:
    """The sign of 0 is 0; gradients pass where the sum before the sign is below 1, as if there were no sign."""
    table = KernelHash(2, DIM)
    u = clustered(2, 2, 6).requires_grad_()
    table.mean.copy_(table.kernel(u.detach())[:1, :, :1])
    codes = table(u)
    assert codes[0, :, 0].abs().sum() == 0
    assert codes[0, :, 1:].abs().min() == 1
    before = (table.kernel(u) - table.mean) @ table.weight.mT
    passes = before.abs() < 1
    assert 0.1 < passes.double().mean() < 0.9
    assert torch.equal(codes, before.sign())
    probe = torch.randn_like(codes)
    want = torch.autograd.grad((before * passes * probe).sum(), u)[0]
    assert relative(torch.autograd.grad((codes * probe).sum(), u)[0], want) < 1e-12


@torch.no_grad()
def dense_training(u: Tensor, anchor: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the mean that the authors' procedure gives, with a matrix over all pairs and torch's SGD."""
    batch, _, tokens, _ = u.shape
    similarity = u @ u.mT
    pairs = torch.zeros_like(similarity)
    pairs.scatter_(-1, similarity.topk(10).indices, 16.0)
    pairs.scatter_(-1, similarity.topk(10, largest=False).indices, -16.0)
    distance = torch.cdist(u, anchor.expand(batch, -1, -1, -1)).square()
    kernel = torch.exp(-distance / (2 * distance.mean((2, 3), keepdim=True)))
    mean = kernel.mean((0, 2), keepdim=True)
    kernel, weight = kernel - mean, weight.clone()

    def loss(y: Tensor) -> Tensor:
        return -torch.einsum("bhn,bhnm,bhm->bh", y, pairs, y).mean() / (tokens * 16)

    for bit in range(16):
        row = weight[:, bit].clone().requires_grad_()
        optimizer = torch.optim.SGD([row], lr=5e-4, momentum=0.9, nesterov=True)
        for _ in range(100):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss(2 * torch.sigmoid(torch.einsum("bhna,ha->bhn", kernel, row)) - 1).backward()
            optimizer.step()
        hard = [(torch.einsum("bhna,ha->bhn", kernel, a) > 0) * 2.0 - 1 for a in (weight[:, bit], row)]
        better = bool(loss(hard[1]) < loss(hard[0]))
        weight[:, bit] = row if better else weight[:, bit]
        pairs = pairs - torch.einsum("bhn,bhm->bhnm", hard[better], hard[better])
    return weight, mean


def test_training_is_that_of_a_dense_version(monkeypatch) -> None:
    monkeypatch.setattr(ecoformer, "SIMILARITIES", 400)  # several parts
    u, table = clustered(2, 2, 33), KernelHash(2, DIM)
    start = table.weight.clone()
    table.learn(u)
    assert all((u[0, head] == a).all(-1).any() for head in range(2) for a in table.anchor[0, head])
    assert len({tuple(a.tolist()) for a in table.anchor[0, 0]}) == 25
    weight, mean = dense_training(u, table.anchor, start)
    assert relative(table.mean, mean) < 1e-12
    assert relative(table.weight, weight) < 1e-9
    assert 0 < int((weight == start).all(2).all(0).sum()) < 16  # some bits stay as they were


def misfit(table: KernelHash, u: Tensor) -> float:
    """Mean squared difference of the products of codes from 1, -1 and 0: for the 10 most similar tokens, the least
    similar and the others."""
    codes, similarity = table(u), u @ u.mT
    wanted = torch.zeros_like(similarity).scatter_(-1, similarity.topk(10).indices, 1.0)
    wanted.scatter_(-1, similarity.topk(10, largest=False).indices, -1.0)
    return float((codes @ codes.mT / 16 - wanted).square().mean())


def test_training_makes_codes_agree_with_affinities() -> None:
    """Also of tokens that it did not see; compared with random bits over the same anchors, in the mean of six."""
    found = []
    for _ in range(6):
        table, u = KernelHash(1, DIM), clustered(1, 1, 128)
        twin = copy.deepcopy(table)
        table.learn(u[:, :, :64])
        twin.anchor, twin.mean = table.anchor, table.mean
        found.append([misfit(t, tokens) for t in (table, twin) for tokens in u.split(64, 2)])
    seen, unseen, random_seen, random_unseen = torch.tensor(found).mean(0).tolist()
    assert seen < 0.95 * random_seen
    assert unseen < 0.95 * random_unseen


@pytest.mark.parametrize("tokens", [1, 2, 7, 19])
def test_few_tokens_train_too(tokens) -> None:
    table = KernelHash(2, DIM)
    u = clustered(2, 2, tokens)
    table.learn(u)
    assert all(b.isfinite().all() for b in table.buffers())
    assert {tuple(a.tolist()) for a in table.anchor[0, 0]} == {tuple(a.tolist()) for a in u[0, 0]}


@pytest.mark.usefixtures("_few_steps")
def test_the_first_training_step_trains_once() -> None:
    model, x = small(), image()
    fresh = hashes(model)
    assert model.eval()(x).isfinite().all()
    assert same(hashes(model), fresh)
    assert not model.hash_trained
    model.train()
    random = torch.get_rng_state()
    model(x[:0])
    assert not model.hash_trained
    model(x)
    trained = hashes(model)
    assert model.hash_trained
    assert not any(torch.equal(trained[key], fresh[key]) for key in fresh if not key.endswith("weight"))
    assert torch.equal(torch.get_rng_state(), random)
    model(image())
    assert same(hashes(model), trained)
    model.train_hash(image())
    assert not same(hashes(model), trained)


@pytest.mark.usefixtures("_few_steps")
def test_training_follows_the_seed() -> None:
    model, x = small(drop_path_rate=0.5), image()
    twins = [striate.create_model("ecoformer_pvt_v2_b0", **SMALL) for _ in range(2)]
    found = []
    for twin, seed in zip(twins, (1, 2), strict=True):
        for again in (seed, 1):
            twin.load_state_dict(model.state_dict())
            twin.head.eval()
            torch.manual_seed(again)
            twin.train_hash(x)
            assert twin.training
            assert not twin.head.training
            found.append(hashes(twin))
    assert same(found[0], found[1])
    assert same(found[0], found[3])
    assert not same(found[0], found[2])


@pytest.mark.usefixtures("_few_steps")
def test_each_block_learns_from_what_reaches_it() -> None:
    """From the outputs of blocks that have learned, without stochastic depth."""
    model, x = small(drop_path_rate=0.9), image()
    model.train_hash(x)
    inputs: dict[int, Tensor] = {}
    layers = [m for m in model.modules() if isinstance(m, HashedAttention)]
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, args, i=i: inputs.__setitem__(i, args[0]))
    with torch.no_grad():
        model.eval()(x)
    assert len(inputs) == len(layers) == 4
    for i, layer in enumerate(layers):
        tokens = F.normalize(layer._heads(layer.to_qk(inputs[i])), dim=-1)
        assert relative(layer.hash.mean, layer.hash.kernel(tokens).mean((0, 2), keepdim=True)) < 1e-12


@pytest.mark.usefixtures("_few_steps")
@pytest.mark.parametrize("pyramid", [False, True])
def test_what_was_saved_is_not_trained_again(pyramid, tmp_path) -> None:
    first, x = small(features_only=pyramid), image()
    first(x)
    torch.save(first.state_dict(), tmp_path / "model.pth")
    second = small(features_only=pyramid)
    second(x)  # once more where a fresh one had been found trained
    striate.load_checkpoint(second, tmp_path / "model.pth")
    third = small(features_only=pyramid)
    third.load_state_dict(first.state_dict())
    for model in (second, third):
        model.train()(image())
        assert same(hashes(model), hashes(first))
    third.load_state_dict(small(features_only=pyramid).state_dict())
    untrained = hashes(third)
    third(x)
    assert not same(hashes(third), untrained)


def official(key: str) -> str:
    """Our key -> the authors', of Twins."""
    key = key.replace("patch_embed.", "patch_embeds.0.").replace("head.fc.", "head.")
    for i in range(4):
        key = key.replace(f"stages.{i}.downsample.", f"patch_embeds.{i}.")
        key = key.replace(f"stages.{i}.blocks.0.pos.proj.", f"pos_block.{i}.proj.0.")
        key = key.replace(f"stages.{i}.blocks.", f"blocks.{i}.")
    for ours, theirs in (("anchor", "anchor"), ("mean", "mvec"), ("weight", "A")):
        key = key.replace(f".hash.{ours}", f".fast_attention.ksh.{theirs}")
    return key


@pytest.mark.usefixtures("_few_steps")
def test_the_authors_files_of_twins_are_trained() -> None:
    first, x = small("ecoformer_twins_svt_small"), image()
    state = {official(key): value for key, value in first.state_dict().items() if key != "hash_trained"}
    assert "blocks.0.0.attn.fast_attention.ksh.A" in state
    assert "pos_block.3.proj.0.weight" in state
    state["blocks.0.0.attn.fast_attention.projection_matrix"] = torch.randn(5, 8)
    second = small("ecoformer_twins_svt_small")
    striate.load_checkpoint(second, {"model": state})
    assert second.hash_trained
    assert torch.equal(second.eval()(x), first.eval()(x))
    second.train()(x)
    assert same(hashes(second), hashes(first))
    assert not first.hash_trained


def test_training_starts_from_the_softmax_network() -> None:
    model = small("ecoformer_twins_svt_small")
    ours, state = model.state_dict(), {}
    for key, value in ours.items():
        if ".to_qk." in key:
            other = ours[key.replace("to_qk", "to_v")]
            state[official(key.replace("to_qk", "qkv"))] = torch.cat([value, torch.randn_like(value), other])
        elif not (".to_v." in key or ".hash." in key or key == "hash_trained"):
            state[official(key)] = value
    fresh = small("ecoformer_twins_svt_small")
    start = ecoformer.from_softmax(fresh, state)
    assert same(hashes(fresh), {key: value for key, value in start.items() if ".hash." in key})
    striate.load_checkpoint(fresh, {"model": start})
    assert not fresh.hash_trained
    assert same(dict(fresh.named_parameters()), dict(model.named_parameters()))
    del state["norm.bias"]
    with pytest.raises(ValueError, match=r"1 keys are missing or left over \(norm.bias\)"):
        ecoformer.from_softmax(fresh, state)


@pytest.mark.usefixtures("_few_steps")
def test_compiled_models_train_outside_the_graph() -> None:
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, x = small(), image()
    torch.compile(model, backend=backend)(x)
    assert model.hash_trained
    assert len(graphs) <= 3  # the model around it, none of the 20 pieces of the training
    loaded = small()
    loaded.load_state_dict(model.state_dict())
    assert relative(torch.compile(loaded, backend=backend, fullgraph=True)(x), model(x)) < 1e-12
    torch.compiler.reset()


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out)
                 if isinstance(t, Tensor) and t.layout == torch.strided]  # fmt: skip
        self.elements = max([self.elements, *sizes])
        return out


def test_memory_is_linear_in_the_tokens(monkeypatch) -> None:
    monkeypatch.setattr(ecoformer, "STEPS", 1)
    monkeypatch.setattr(ecoformer, "SIMILARITIES", 1 << 14)
    attn = HashedAttention(8, 2)
    peaks = []
    for side in (24, 48):
        x = torch.randn(1, side, side, 8, requires_grad=True)
        with _Largest() as forward:
            attn(x).sum().backward()
        with _Largest() as training:
            attn.learn(x)
        assert 0 < forward.elements < 60 * side**2
        assert 0 < training.elements < side**4 / 2
        peaks.append((forward.elements, training.elements))
    assert all(large < 4.2 * small for small, large in zip(*peaks, strict=True))


@pytest.mark.usefixtures("_few_steps")
def test_autocast_leaves_the_sums_alone() -> None:
    """Those of codes over 600 tokens are no bfloat16 numbers."""
    attn = HashedAttention(8, 2).float()
    attn.to_qk, attn.to_v, attn.proj = nn.Identity(), nn.Identity(), nn.Identity()
    twin, x = copy.deepcopy(attn), torch.randn(1, 20, 30, 8, dtype=torch.float32)
    torch.manual_seed(0)
    attn.learn(x)
    want = attn(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        twin.learn(x)
        assert torch.equal(twin(x), want)
        assert twin(x.bfloat16()).dtype == torch.bfloat16
    assert same(dict(twin.named_buffers()), dict(attn.named_buffers()))


@pytest.mark.usefixtures("_few_steps")
def test_a_blank_image_gives_numbers() -> None:
    """Tokens of length 0 have no direction."""
    model = small()
    out = model(torch.zeros(2, 3, 64, 64))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skeleton": "pvt"}, "skeleton='pvt' is unknown; use 'pvt_v2' or 'twins'"),
        ({"depths": (1, 1)}, r"depths=\(1, 1\), .* must have one entry per stage"),
        ({"num_heads": (3, 2, 2, 2)}, r"dims=\(16, 16, 16, 16\) must be multiples of num_heads=\(3, 2, 2, 2\)"),
    ],
)
def test_arguments_that_do_not_fit(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        striate.create_model("ecoformer_pvt_v2_b0", **SMALL | change)


@pytest.mark.usefixtures("_few_steps")
def test_training_that_cannot_be() -> None:
    model, x = small(), image()
    with pytest.raises(ValueError, match=r"train_hash got images \(0, 3, 64, 48\)"):
        model.train_hash(x[:0])
    with pytest.raises(ValueError, match="call model.train_hash"):
        torch.func.vmap(model)(x[None])
    with pytest.raises(ValueError, match="call model.train_hash"):
        torch.jit.trace(model, x)
    model.train_hash(x)
    assert torch.func.vmap(model)(x[None]).shape == (1, 2, 5)
