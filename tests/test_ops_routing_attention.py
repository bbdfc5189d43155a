"""Routing and routed attention: the definition against loops over regions, every path against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import relative, run, saved_bytes, worst
from striate.ops import route_regions, routing_attention
from striate.ops.routing_attention import reference

HEADS, DIM = 2, 3
WIDTH = HEADS * DIM
EXACT = 1e-12  # float64: two orders of summation differ by less; every mutation below by more than 1e-4

# size of the map, region, topk
CASES = [
    pytest.param((6, 8), (2, 4), 2, id="divisible"),
    pytest.param((7, 9), (3, 2), 4, id="odd"),
    pytest.param((7, 9), (3, 2), 1, id="one-route"),
    pytest.param((4, 6), (2, 2), 6, id="all-routes"),
    pytest.param((2, 3), (4, 4), 1, id="smaller-than-region"),
    pytest.param((3, 4), (1, 1), 5, id="regions-of-one"),
    pytest.param((5, 40), (2, 3), 3, id="wide"),
    pytest.param((36, 30), (4, 5), 2, id="large"),
]


def inputs(size: tuple[int, int], batch: int = 2, **kwargs: Any) -> Tensor:
    return torch.randn(batch, *size, 3 * WIDTH, **{"dtype": torch.float64, **kwargs})


def regions(size: tuple[int, int], region: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """The tokens of every region, those of the padding too, row by row."""
    rows, cols = (-(-n // r) for n, r in zip(size, region, strict=True))
    return [
        [(gy * region[0] + y, gx * region[1] + x) for y in range(region[0]) for x in range(region[1])]
        for gy in range(rows)
        for gx in range(cols)
    ]


def affinities(qkv: Tensor, region: tuple[int, int]) -> Tensor:
    """Mean query of each region times mean key of each other, over the real tokens: `(B, R, R)`."""
    _, h, w, _ = qkv.shape
    means = []
    for tokens in regions((h, w), region):
        real = [(y, x) for y, x in tokens if y < h and x < w]
        means.append(sum(qkv[:, y, x] for y, x in real) / len(real))
    q, k, _ = torch.stack(means, 1).chunk(3, -1)
    return (q[:, :, None] * k[:, None]).sum(-1)


def by_loops(region: tuple[int, int], routes: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """Attention region by region; padded tokens are zero vectors that take part."""

    def call(qkv: Tensor) -> Tensor:
        batch, h, w, _ = qkv.shape
        parts = regions((h, w), region)
        zero = qkv.new_zeros(3, HEADS, DIM)
        tokens = {
            (b, y, x): qkv[b, y, x].view(3, HEADS, DIM) if y < h and x < w else zero
            for b in range(batch)
            for part in parts
            for y, x in part
        }
        out = {}
        for b in range(batch):
            for r, part in enumerate(parts):
                seen = torch.stack([tokens[b, y, x] for other in routes[b, r].tolist() for y, x in parts[other]])
                for y, x in part:
                    scores = (tokens[b, y, x][0] * seen[:, 1]).sum(-1) * scale
                    out[b, y, x] = (scores.softmax(0)[..., None] * seen[:, 2]).sum(0).flatten()
        return torch.stack(
            [torch.stack([torch.stack([out[b, y, x] for x in range(w)]) for y in range(h)]) for b in range(batch)]
        )

    return call


def op(routes: Tensor, region: Any, scale: float | None = 0.7) -> Callable[[Tensor], Tensor]:
    return lambda qkv: routing_attention(qkv, routes, num_heads=HEADS, region=region, scale=scale)


@pytest.fixture(params=["cpu", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    monkeypatch.setenv("STRIATE_BACKEND", request.param)
    return request.param


def chosen(affinity: Tensor, topk: int) -> Tensor:
    return affinity.argsort(-1, descending=True)[..., :topk].sort()[0]


@pytest.mark.parametrize(("size", "region", "topk"), CASES)
def test_routes_are_the_most_similar_regions(path, size, region, topk) -> None:
    qkv = inputs(size)
    routes = route_regions(qkv, region=region, topk=topk)
    assert routes.dtype == torch.int64
    assert torch.equal(routes.sort()[0], chosen(affinities(qkv, region), topk))


def test_values_and_padding_do_not_enter_the_choice(path) -> None:
    qkv = inputs((7, 9))
    routes = route_regions(qkv, region=(3, 2), topk=4)
    other = torch.cat((qkv[..., : 2 * WIDTH], torch.randn_like(qkv[..., 2 * WIDTH :])), -1)
    assert torch.equal(routes, route_regions(other, region=(3, 2), topk=4))
    diluted = torch.nn.functional.pad(qkv, (0, 0, 0, 1, 0, 2))  # zeros in the means would change some choice
    assert not torch.equal(routes.sort()[0], route_regions(diluted, region=(3, 2), topk=4).sort()[0])


def test_no_gradient_flows_through_the_choice(path) -> None:
    assert not route_regions(inputs((6, 8)).requires_grad_(), region=2, topk=3).requires_grad


@pytest.mark.parametrize(("size", "region", "topk"), CASES)
def test_every_path_is_the_definition(path, size, region, topk) -> None:
    qkv = inputs(size)
    routes = chosen(affinities(qkv, region), topk)
    assert worst(run(op(routes, region), [qkv]), run(by_loops(region, routes, 0.7), [qkv])) < EXACT


def test_the_order_of_routes_does_not_matter(path) -> None:
    qkv = inputs((7, 9))
    routes = route_regions(qkv, region=(3, 2), topk=4)
    assert worst(run(op(routes, (3, 2)), [qkv]), run(op(routes.flip(-1), (3, 2)), [qkv])) < EXACT


def test_default_scales(path) -> None:
    qkv = inputs((7, 9))
    routes = route_regions(qkv, region=(3, 2), topk=4)
    assert relative(op(routes, (3, 2), None)(qkv), op(routes, (3, 2), DIM**-0.5)(qkv)) < EXACT
    assert torch.equal(routes.sort()[0], route_regions(qkv, region=(3, 2), topk=4, scale=WIDTH**-0.5).sort()[0])


def test_gradcheck_of_the_definition(monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "reference")
    qkv = inputs((3, 4), batch=1).requires_grad_()
    routes = route_regions(qkv, region=2, topk=2)
    assert torch.autograd.gradcheck(op(routes, 2), qkv, fast_mode=True)


def padding_in_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.split
    monkeypatch.setattr(
        reference, "split", lambda x, r: torch.ones_like(right(x, r)) if x.shape[-1] == 1 else right(x, r)
    )


def keys_only(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.split
    swap = torch.cat((torch.arange(WIDTH, 2 * WIDTH), torch.arange(WIDTH)))
    monkeypatch.setattr(reference, "split", lambda x, r: right(x[..., swap] if x.shape[-1] == 2 * WIDTH else x, r))


@pytest.mark.parametrize("mutate", [padding_in_the_means, keys_only])
def test_the_comparison_sees_wrong_means(mutate, monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "reference")
    qkv = inputs((7, 9))
    want = chosen(affinities(qkv, (3, 2)), 4)
    assert torch.equal(route_regions(qkv, region=(3, 2), topk=4).sort()[0], want)
    mutate(monkeypatch)
    assert not torch.equal(route_regions(qkv, region=(3, 2), topk=4).sort()[0], want)


@pytest.mark.parametrize("change", ["routes", "one-less", "scale", "region"])
@pytest.mark.parametrize("size", [(8, 8), (36, 36)])  # both formulations of the CPU path
def test_the_comparison_sees_every_argument(path, change, size) -> None:
    qkv = inputs(size, batch=1)
    region = (2, 4) if size == (8, 8) else (4, 6)
    routes = route_regions(qkv, region=region, topk=2)
    want = run(op(routes, region), [qkv])
    wrong = {
        "routes": op(routes.roll(1, 1), region),
        "one-less": op(routes[..., :1], region),
        "scale": op(routes, region, 0.71),
        "region": op(routes, region[::-1]),
    }[change]
    assert all(relative(a, b) > 1e-4 for a, b in zip(run(wrong, [qkv]), want, strict=True))


@pytest.mark.parametrize(("size", "region", "topk"), [CASES[1].values, CASES[6].values, CASES[7].values])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-6)])
def test_reduced_precision(path, size, region, topk, dtype, limit) -> None:
    """Inputs are rounded first, so that only the arithmetic differs; a bfloat16 has 8 bits."""
    qkv = inputs(size, batch=1).to(dtype)
    routes = route_regions(qkv, region=region, topk=topk)
    got, want = run(op(routes, region), [qkv]), run(by_loops(region, routes, 0.7), [qkv.double()])
    assert {t.dtype for t in got} == {dtype}
    errors = [relative(a, b) for a, b in zip(got, want, strict=True)]
    assert errors[0] < limit
    assert errors[1] < 4 * limit
    wrong = run(op(routes.roll(1, 1) if topk < routes.shape[1] else routes[..., :1], region), [qkv])
    assert all(relative(a, b) > 4 * limit for a, b in zip(wrong, want, strict=True))


@pytest.mark.parametrize("size", [(7, 9), (36, 36)])
def test_views_are_taken_as_they_are(path, size) -> None:
    qkv = inputs(size, batch=1)
    strange = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strange.is_contiguous()
    routes = route_regions(qkv, region=(3, 4), topk=2)
    assert torch.equal(route_regions(strange, region=(3, 4), topk=2).sort()[0], routes.sort()[0])
    assert worst(run(op(routes, (3, 4)), [strange]), run(op(routes, (3, 4)), [qkv])) < EXACT


def routed(qkv: Tensor) -> Tensor:
    return routing_attention(qkv, route_regions(qkv, region=(3, 2), topk=2), num_heads=HEADS, region=(3, 2))


def test_compile_as_one_graph_for_any_size() -> None:
    torch.compiler.reset()
    graph = torch.compile(routed, fullgraph=True, backend="aot_eager")

    def compiled(qkv: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(qkv, (1, 2))  # fails if the graph would serve one size only
        return graph(qkv)

    for size in [(7, 9), (6, 8)]:
        qkv = inputs(size)
        assert worst(run(compiled, [qkv]), run(routed, [qkv])) < EXACT


@pytest.mark.parametrize("size", [(7, 9), (36, 36)])
def test_functional_gradients_per_sample(size) -> None:
    qkv = inputs(size, batch=3)

    def loss(one: Tensor) -> Tensor:
        return routed(one[None]).pow(2).sum()

    got = torch.vmap(torch.func.grad(loss))(qkv)
    want = torch.stack([torch.autograd.functional.jacobian(loss, one) for one in qkv])
    assert relative(got, want) < EXACT


@pytest.mark.parametrize("size", [(5, 11), (40, 33)])  # sizes that no other test uses: tables are cached by size
def test_training_after_inference_mode(size) -> None:
    qkv = inputs(size)
    with torch.inference_mode():
        want = routed(qkv)
    assert relative(run(routed, [qkv])[0], want) < EXACT


@pytest.mark.parametrize(("side", "region", "topk"), [(28, 4, 16), (56, 8, 8)])
def test_training_does_not_keep_the_gathered_keys_and_values(side, region, topk) -> None:
    qkv = torch.randn(1, side, side, 3 * 64, requires_grad=True)
    routes = route_regions(qkv, region=region, topk=topk)

    def call() -> Tensor:
        return routing_attention(qkv, routes, num_heads=2, region=region)

    kept = saved_bytes(call, skip=[qkv])
    gathered = routes.numel() * region**2 * 2 * 64 * 4
    assert 0 < kept < gathered / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRIATE_BACKEND", "reference")
        assert saved_bytes(call, skip=[qkv]) > gathered


@pytest.mark.parametrize("topk", [0, 10])
def test_the_number_of_routes_is_checked(topk) -> None:
    with pytest.raises(ValueError, match=rf"topk={topk}, but a 9x9 map has 9 regions of 3x3 tokens; choose 1 to 9"):
        route_regions(inputs((9, 9)), region=3, topk=topk)


@pytest.mark.parametrize("shape", [(9, 9, 18), (1, 9, 9, 17)])
def test_the_shape_of_a_map_is_checked(shape) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, H, W, 3 \* C\)"):
        route_regions(torch.randn(shape), region=3, topk=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 4}, r"qkv \(2, 7, 9, 18\) must be .* C a multiple of num_heads=4"),
        ({"qkv": torch.randn(7, 9, 18)}, r"qkv \(7, 9, 18\) must be \(B, H, W, 3 \* C\)"),
        ({"region": (3, 0)}, r"region=\(3, 0\); give a positive integer"),
        ({"region": 2}, r"routes \(2, 9, 2\) must be \(2, 20, topk\) for 20 regions of \(2, 2\)"),
        ({"routes": torch.zeros(2, 9, dtype=torch.int64)}, r"routes \(2, 9\) must be \(2, 9, topk\)"),
    ],
)
def test_arguments_are_checked(change, message) -> None:
    routes = torch.zeros(2, 9, 2, dtype=torch.int64)
    arguments = {"qkv": torch.randn(2, 7, 9, 18), "routes": routes, "num_heads": 2, "region": 3, **change}
    with pytest.raises(ValueError, match=message):
        routing_attention(**arguments)
