"""The Triton kernels of routing attention, in the interpreter, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from helpers import relative, run, saved_bytes, worst
from striate.ops import route_regions
from striate.ops.routing_attention import kernels, reference
from striate.ops.routing_attention import triton as op
from triton_tools import OutOfBoundsError, interpreted, metered, mutated, poisoned

HEADS, DIM, SCALE = 2, 16, 0.3
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # of the output; gradients: twice that

# size of the map, region, topk
CASES = {
    "routed": ((5, 9), (3, 4), 2),
    "one-route": ((5, 9), (3, 3), 1),
    "long-lists": ((9, 10), (5, 4), 4),  # 80 keys: more than a tile
    "many-rows": ((13, 23), (13, 12), 1),  # 156 rows: more than a tile
    "divisible": ((6, 8), (3, 4), 1),
    "smaller-than-region": ((2, 3), (4, 4), 1),
    "in-a-word": ((6, 8), (2, 4), 2),
    "in-a-word-odd": ((7, 9), (3, 2), 4),  # 90 rows
    "regions-of-one": ((3, 4), (1, 1), 5),
    "all-bits-of-a-word": ((8, 8), (1, 1), 2),
}
DENSE = {"all-bits-of-a-word", "in-a-word", "in-a-word-odd", "regions-of-one"}


def inputs(
    case: str, batch: int = 2, dim: int = DIM, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    size, region, topk = CASES[case]
    qkv = torch.randn(batch, *size, 3 * HEADS * dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    return qkv, route_regions(qkv.double(), region=region, topk=topk), region


def by_kernels(routes: Tensor, region: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    return lambda qkv: op.routing_attention(qkv, routes, HEADS, region, SCALE)


def by_definition(routes: Tensor, region: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    return lambda qkv: reference.routing_attention(qkv, routes, HEADS, region, SCALE)


def errors(case: str, **kwargs: Any) -> list[float]:
    """Relative errors of output and gradient over what their dtype allows: at most 1 where the kernels are right."""
    qkv, routes, region = inputs(case, **kwargs)
    with poisoned():
        got = run(by_kernels(routes, region), [qkv])
    assert {t.dtype for t in got} == {qkv.dtype}
    want = run(by_definition(routes, region), [qkv.double()])
    limits = (LIMITS[qkv.dtype], 2 * LIMITS[qkv.dtype])
    return [relative(a, b) / limit for a, b, limit in zip(got, want, limits, strict=True)]


@pytest.fixture(autouse=True)
def in_the_interpreter() -> Iterator[None]:
    with interpreted():
        yield


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(case, dtype) for case in ("routed", "in-a-word-odd") for dtype in (torch.float16, torch.bfloat16)]
    + [("long-lists", torch.bfloat16)],
    ids=str,
)
def test_kernels_are_the_definition(case: str, dtype: torch.dtype) -> None:
    batch = 2 if case in ("divisible", "in-a-word-odd") else 1
    assert max(errors(case, batch=batch, dtype=dtype)) < 1


@pytest.mark.parametrize("case", ["routed", "in-a-word"])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(3, torch.float32), (24, torch.bfloat16), (32, torch.float16), (80, torch.float32), (128, torch.bfloat16)],
)
def test_heads_of_any_dim(case: str, dim: int, dtype: torch.dtype) -> None:
    assert max(errors(case, batch=1, dim=dim, dtype=dtype)) < 1


@pytest.mark.parametrize("case", CASES)
def test_which_kernel_a_case_takes(case: str) -> None:
    qkv, routes, region = inputs(case)
    assert op._Launch(qkv, routes, HEADS, region, SCALE).dense == (case in DENSE)


@pytest.mark.parametrize(
    "case", ["divisible", "in-a-word"]
)  # padded keys have score 0: others would vanish beside them
@pytest.mark.parametrize(("low", "high"), [(-9.0, -9.0), (9.0, 9.0), (-9.0, 9.0)], ids=["low", "high", "both"])
def test_scores_of_any_size(case: str, low: float, high: float) -> None:
    """Scores of hundreds below or above zero: no weight overflows, not even that of a token which is not there."""
    qkv, routes, region = inputs(case, batch=1)
    q, k, v = qkv.chunk(3, -1)
    q = 0.1 * q + 9.0
    k = 0.1 * k + torch.linspace(low, high, k[..., 0].numel()).view(k[..., :1].shape)
    both = torch.cat((q, k, v), -1)
    got, want = run(by_kernels(routes, region), [both]), run(by_definition(routes, region), [both.double()])
    assert worst(got, want) < 1e-4  # float32 has 24 bits: of a score of 400, 5e-5 are lost


@pytest.mark.parametrize("case", ["routed", "in-a-word"])
def test_regions_that_nobody_sees_have_no_gradient(case: str) -> None:
    qkv, routes, region = inputs(case, batch=1)
    everyone = torch.arange(routes.shape[2]).expand_as(routes).contiguous()
    with poisoned():
        got = run(by_kernels(everyone, region), [qkv])
    want = run(by_definition(everyone, region), [qkv])
    assert worst(got, want) < LIMITS[torch.float32]
    assert (got[1][:, -1, -1, HEADS * DIM :] == 0).all()


@pytest.mark.parametrize("case", ["routed", "in-a-word"])
def test_views_are_taken_as_they_are(case: str) -> None:
    qkv, routes, region = inputs(case, batch=1)
    want = run(by_kernels(routes, region), [qkv])
    wide = torch.nn.functional.pad(qkv, (5, 3, 1, 0, 2, 1))
    views = [wide[:, 2:-1, 1:, 5:-3], qkv.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)]
    for view in views:
        assert not view.is_contiguous()
        leaf = view.detach().requires_grad_()
        out = by_kernels(routes, region)(leaf)
        assert torch.equal(out, want[0])
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
        strange = probe.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        assert torch.equal(torch.autograd.grad(out, leaf, strange)[0], want[1])


@pytest.mark.parametrize("case", ["routed", "in-a-word"])
def test_gradients_are_deterministic_and_routes_a_set(case: str) -> None:
    qkv, routes, region = inputs(case, batch=1)
    first, second = (run(by_kernels(routes, region), [qkv]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert worst(run(by_kernels(routes.flip(-1).contiguous(), region), [qkv]), first) < LIMITS[torch.float32]


def test_inverted_routes() -> None:
    _, routes, _ = inputs("long-lists")
    sources, starts = op.inverted(routes)
    regions = routes.shape[1]
    for image, table in enumerate(routes.tolist()):
        for region in range(regions):
            seen_by = sources[starts[image * regions + region] : starts[image * regions + region + 1]]
            assert seen_by.tolist() == [other for other, row in enumerate(table) if region in row]


@triton.jit
def _divide_kernel(quotients, remainders, divisor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    quotient, remainder = kernels._divide(index, divisor)
    tl.store(quotients + index, quotient)
    tl.store(remainders + index, remainder)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 49, 361, 1023, 99_991, (1 << 20) - 1])
def test_division_by_a_reciprocal_is_exact(divisor: int) -> None:
    index = torch.arange(1 << 20, dtype=torch.int32)
    quotient, remainder = torch.empty_like(index), torch.empty_like(index)
    _divide_kernel[(8,)](quotient, remainder, divisor, 1 << 17)
    assert torch.equal(quotient, index // divisor)
    assert torch.equal(remainder, index % divisor)


# -------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("case", ["routed", "one-route", "many-rows", "in-a-word", "in-a-word-odd"])
def test_memory_traffic(case: str) -> None:
    """q and outputs once, k and v as often as the routes demand: once per tile of queries that sees their region."""
    qkv, routes, region = inputs(case, batch=1)
    h, w = qkv.shape[1:3]
    q, k, v = qkv.chunk(3, -1)
    tokens = region[0] * region[1]
    seen = torch.zeros(routes.shape[1], dtype=torch.int64).scatter_add_(
        0, routes.flatten(), torch.ones_like(routes).flatten()
    )
    y, x = torch.arange(h)[:, None] // region[0], torch.arange(w) // region[1]
    demanded = seen[y * -(-w // region[1]) + x][None, :, :, None]

    def tiles(name: str) -> int:
        rows = routes.shape[1] * tokens if case in DENSE else tokens
        return -(-rows // op._Launch(qkv, routes, HEADS, region, SCALE).block(name))

    def rereads(name: str) -> Tensor:
        return torch.full_like(demanded, tiles(name)) if case in DENSE else demanded * tiles(name)

    def once(counts: Tensor) -> bool:
        return bool((counts == 1).all())

    with metered() as meter:
        out, lse = op.launch_forward(qkv, routes, HEADS, region, SCALE)
    assert once(meter.read_counts(q))
    assert all((meter.read_counts(t) == rereads("fwd")).all() for t in (k, v))
    assert once(meter.write_counts(out))
    assert once(meter.write_counts(lse))
    if case not in DENSE | {"many-rows"}:
        real = torch.zeros(routes.shape[1]).index_add_(0, (y * -(-w // region[1]) + x).flatten(), torch.ones(h * w))
        want = (real * seen).sum() / real.sum()  # topk, but that smaller regions at the edge weigh less
        assert float(meter.reads(k)) == pytest.approx(float(want))

    grad = torch.randn_like(out)
    with metered() as meter:
        grad_qkv = op.launch_backward(grad, qkv, routes, out, lse, HEADS, region, SCALE)
    assert once(meter.write_counts(grad_qkv))
    assert once(meter.read_counts(out))
    assert all((meter.read_counts(t) == 1 + rereads("bwd_q")).all() for t in (k, v))
    queries = meter.read_counts(q)
    if case in DENSE:
        assert (queries == 1 + tiles("bwd_kv")).all()
    else:
        assert (queries == 1 + routes.shape[2] * tiles("bwd_kv")).all()
    assert torch.equal(meter.read_counts(grad), queries)


class _Allocated(TorchDispatchMode):
    """Bytes of everything that torch operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor) and t._base is None)
        return out


@pytest.mark.parametrize("case", ["long-lists", "in-a-word-odd"])
def test_memory_grows_with_tokens_alone(case: str) -> None:
    """Beside inputs and outputs: one float32 per token and head, and tables of the size of the routes."""
    qkv, routes, region = inputs(case, batch=1)
    with _Allocated() as forward:
        out, lse = op.launch_forward(qkv, routes, HEADS, region, SCALE)
    with _Allocated() as backward:
        grad_qkv = op.launch_backward(out, qkv, routes, out, lse, HEADS, region, SCALE)
    assert forward.bytes <= out.nbytes + lse.nbytes + 4 * routes.nbytes
    assert backward.bytes <= grad_qkv.nbytes + lse.nbytes + 16 * routes.nbytes
    assert saved_bytes(lambda: by_kernels(routes, region)(qkv.requires_grad_()), skip=[qkv, routes]) == (
        out.nbytes + lse.nbytes
    )


# ----------------------------------------------------------------------------------------------- mutations

MUTATIONS = [
    ("fwd", "tl.where(listed[None, :], scores", "tl.where(listed[None, :] | True, scores", "routed"),
    ("fwd", "total * shrink", "total", "long-lists"),
    ("fwd", "acc * shrink[:, None]", "acc", "in-a-word-odd"),
    ("fwd", "count = topk * tokens", "count = (topk - 1) * tokens", "routed"),
    (
        "fwd",
        "scores = tl.where(_allowed(words[:, None]",
        "scores = tl.where(_allowed(words[:, None] * 0 - 1",
        "in-a-word",
    ),
    ("bwd_q", "- shift[:, None]", "", "routed"),
    ("bwd_q", "acc * scale", "acc", "in-a-word"),
    ("bwd_kv", "routes += first", "routes += 0", "routed"),
    ("bwd_kv", "grad_k * scale", "grad_k * scale_log2", "routed"),
    (
        "bwd_kv",
        "_allowed(words[None, :], region[:, None]",
        "_allowed(words[None, :], query_region[None, :]",
        "in-a-word",
    ),
    ("_find", "region_y * region_h + y", "region_y * region_h + x", "routed"),
    ("_find", "& (x < width)", "", "routed"),
    ("_find", "_divide(region, columns)", "_divide(region, columns + 1)", "in-a-word"),
    ("_columns", "routes + place", "routes + 0 * place", "routed"),
    ("_allowed", "region & 63", "(region + 1) & 63", "in-a-word"),
    ("_load", "offset[:, None] + d", "(offset[:, None] + 1) + d", "routed"),
]


@pytest.mark.parametrize(("name", "old", "new", "case"), MUTATIONS)
def test_the_comparison_sees_a_wrong_kernel(name: str, old: str, new: str, case: str) -> None:
    kernel = getattr(kernels, name if name[0] == "_" else f"_routing_attention_{name}_kernel")
    with mutated(kernel, old, new):
        try:
            wrong = max(errors(case, batch=1, dtype=torch.bfloat16))
        except OutOfBoundsError:  # seen before anything is compared
            wrong = float("inf")
    assert wrong > 2


def test_the_comparison_sees_a_weight_that_overflows() -> None:
    with mutated(kernels._routing_attention_bwd_q_kernel, "tl.where(listed[None, :], weights, 0.0)", "weights"):
        qkv, routes, region = inputs("divisible", batch=1)
        q, k, v = qkv.chunk(3, -1)
        low = torch.cat((q * 0.1 + 9, k * 0.1 - 9, v), -1)
        assert worst(run(by_kernels(routes, region), [low]), run(by_definition(routes, region), [low])) > 1


# ----------------------------------------------------------------------------------------------- as an operator


def arguments(case: str, **kwargs: Any) -> tuple[Any, ...]:
    qkv, routes, region = inputs(case, **kwargs)
    return qkv, routes, HEADS, *region, SCALE


@pytest.mark.parametrize("case", ["divisible", "in-a-word"])
@pytest.mark.parametrize("kernels_run", [True, False])
def test_opcheck(case: str, kernels_run: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels_run:
        monkeypatch.setattr(op._triton, "interpreting", lambda: False)
        monkeypatch.setattr(op, "launch_forward", None)
    qkv, *rest = arguments(case, batch=1)
    torch.library.opcheck(torch.ops.striate.routing_attention.default, (qkv.requires_grad_(), *rest))
    out, lse = torch.ops.striate.routing_attention(qkv.detach(), *rest)
    backward = (torch.randn_like(out), qkv.detach(), rest[0], out, lse, *rest[1:])
    torch.library.opcheck(torch.ops.striate.routing_attention_backward.default, backward)


@pytest.mark.parametrize("case", ["divisible", "in-a-word"])
def test_an_exported_graph_runs_on_a_cpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, routes, region = inputs(case, batch=1)
    monkeypatch.setattr(op._triton, "interpreting", lambda: False)
    monkeypatch.setattr(op, "launch_forward", None)
    want = run(by_definition(routes, region), [qkv])
    assert worst(run(by_kernels(routes, region), [qkv]), want) < LIMITS[torch.float32]
    _, sums = torch.ops.striate.routing_attention(qkv, routes, HEADS, *region, SCALE)
    monkeypatch.undo()
    assert relative(op.launch_forward(qkv, routes, HEADS, region, SCALE)[1], sums) < LIMITS[torch.float32]


def test_compile_as_one_graph_for_any_size() -> None:
    torch.compiler.reset()

    def routed(qkv: Tensor) -> Tensor:
        return op.routing_attention(qkv, reference.route_regions(qkv, (3, 4), 1, SCALE), HEADS, (3, 4), SCALE)

    graph = torch.compile(routed, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in [(5, 7), (6, 8)]:
        qkv = torch.randn(1, *size, 3 * HEADS * DIM)
        torch._dynamo.mark_dynamic(qkv, (1, 2))
        with torch.compiler.set_stance("fail_on_recompile" if size != (5, 7) else "default"):
            assert worst(run(graph, [qkv]), run(routed, [qkv])) == 0


def test_activation_checkpointing() -> None:
    qkv, routes, region = inputs("divisible", batch=1)
    plain = by_kernels(routes, region)
    got = run(lambda x: checkpoint(plain, x, use_reentrant=False), [qkv])
    assert worst(got, run(plain, [qkv])) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    qkv, routes, region = inputs("divisible", batch=1)
    weight = torch.eye(qkv.shape[-1])

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return by_kernels(routes, region)(torch.nn.functional.linear(x, weight))

    got = run(call, [qkv])
    assert got[0].dtype == dtype
    assert worst(got, run(by_definition(routes, region), [qkv.to(dtype).double()])) < 2 * LIMITS[dtype]


def test_double_backward_is_refused() -> None:
    qkv, routes, region = inputs("divisible", batch=1)
    qkv.requires_grad_()
    out = by_kernels(routes, region)(qkv)
    (grad,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="routing_attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.float64}, "no kernel for torch.float64"),
        ({"dim": 136}, "heads of 136 channels, more than 128"),
        ({"size": (1024, 1024)}, "a 1024x1024 map has 2**20 tokens or more"),
        ({"size": (900, 900), "dim": 128, "heads": 8}, "a 900x900 map of 3072 channels has 2**31 elements or more"),
        ({"size": (900, 900), "dim": 16, "batch": 200, "heads": 16}, "2**31 programs or more"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(change: dict[str, Any], reason: str) -> None:
    given = {"size": (9, 9), "dim": 16, "dtype": torch.float32, "batch": 1, "heads": 2, **change}
    h, w = given["size"]
    qkv = torch.empty(given["batch"], h, w, 3 * given["heads"] * given["dim"], dtype=given["dtype"], device="meta")
    routes = torch.empty(given["batch"], (h // 3) * (w // 3), 1, dtype=torch.int64, device="meta")
    assert op.obstacle(qkv, routes, given["heads"], (3, 3), SCALE) == reason
