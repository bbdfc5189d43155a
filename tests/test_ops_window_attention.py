"""Window attention: the definition against loops over tokens, every path against the definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import relative, run, saved_bytes, worst
from striate.ops import partition, window_attention
from striate.ops.window_attention import cpu, reference

HEADS, DIM = 2, 3
EXACT = 1e-12  # float64: two orders of summation differ by less; every mutation below by more than 1e-4

# size of the map, window, shift, grid, cosine
CASES = [
    pytest.param((6, 8), (3, 4), (0, 0), False, False, id="divisible"),
    pytest.param((7, 9), (3, 4), (0, 0), False, False, id="odd"),
    pytest.param((7, 9), (3, 4), (1, 2), False, False, id="odd-shifted"),
    pytest.param((6, 8), (3, 4), (1, 2), False, False, id="shifted"),
    pytest.param((7, 9), (3, 4), (0, 2), False, False, id="columns-shifted"),
    pytest.param((7, 9), (3, 4), (1, 0), False, False, id="rows-shifted"),
    pytest.param((3, 4), (3, 4), (1, 2), False, False, id="one-window-shifted"),
    pytest.param((2, 3), (4, 4), (2, 2), False, False, id="smaller-than-window-shifted"),
    pytest.param((1, 1), (4, 4), (0, 0), False, False, id="one-token"),
    pytest.param((6, 8), (3, 4), (0, 0), True, False, id="grid"),
    pytest.param((7, 9), (3, 2), (0, 0), True, False, id="odd-grid"),
    pytest.param((7, 9), (3, 4), (1, 2), False, True, id="cosine-shifted"),
    pytest.param((7, 9), (3, 2), (0, 0), True, True, id="cosine-grid"),
    pytest.param((5, 5), (1, 1), (0, 0), False, False, id="window-of-one"),
]


def inputs(size: tuple[int, int], window: tuple[int, int], batch: int = 2, **kwargs: Any) -> list[Tensor]:
    """qkv, bias, pad and a scale per head."""
    kwargs = {"dtype": torch.float64, **kwargs}
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    width = 3 * HEADS * DIM
    return [
        torch.randn(batch, *size, width, **kwargs),
        torch.randn(rows, HEADS, **kwargs),
        torch.randn(width, **kwargs),
        torch.rand(HEADS, **kwargs) + 0.5,
    ]


def op(window: tuple[int, int], shift: Any = 0, grid: bool = False, cosine: bool = False) -> Callable[..., Tensor]:
    def call(qkv: Tensor, bias: Tensor | None, pad: Tensor | None, scale: Tensor | float | None) -> Tensor:
        return window_attention(
            qkv, bias, num_heads=HEADS, window=window, shift=shift, grid=grid, scale=scale, cosine=cosine, pad=pad
        )

    return call


def by_loops(
    window: tuple[int, int], shift: tuple[int, int], grid: bool, cosine: bool, mask: float = 100.0
) -> Callable[..., Tensor]:
    """The definition token by token: who shares a group with whom, at what offset, and who is masked."""

    def call(qkv: Tensor, bias: Tensor, pad: Tensor, scale: Tensor) -> Tensor:
        batch, height, width, _ = qkv.shape
        ph, pw = (-(-n // w) * w for n, w in zip((height, width), window, strict=True))
        rows, cols = ph // window[0], pw // window[1]
        tokens = [(y, x) for y in range(ph) for x in range(pw)]
        values = [qkv[:, y, x] if y < height and x < width else pad.expand(batch, -1) for y, x in tokens]
        q, k, v = torch.stack(values).view(-1, batch, 3, HEADS, DIM).unbind(2)
        if cosine:
            q, k = (t / t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in (q, k))
        place = {}  # token -> its group and its place inside the group
        for y, x in tokens:
            sy, sx = (y - shift[0]) % ph, (x - shift[1]) % pw
            near = (sy // window[0], sx // window[1]), (sy % window[0], sx % window[1])
            spread = (sy % rows, sx % cols), (sy // rows, sx // cols)
            place[y, x] = spread if grid else near
        out = []
        for y in range(height):
            for x in range(width):
                group, (iy, ix) = place[y, x]
                keys = [p for p in tokens if place[p][0] == group]
                at = [tokens.index(p) for p in keys]
                inside = [place[p][1] for p in keys]
                entry = [(iy - jy + window[0] - 1) * (2 * window[1] - 1) + ix - jx + window[1] - 1 for jy, jx in inside]
                apart = [(y < shift[0]) != (p[0] < shift[0]) or (x < shift[1]) != (p[1] < shift[1]) for p in keys]
                scores = (q[tokens.index((y, x))] * k[at]).sum(-1) * scale + bias[entry][:, None]
                weights = (scores - mask * torch.tensor(apart)[:, None, None]).softmax(0)
                out.append((weights[..., None] * v[at]).sum(0).flatten(1))
        return torch.stack(out, 1).view(batch, height, width, -1)

    return call


@pytest.fixture(params=["cpu", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    monkeypatch.setenv("STRIATE_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize(("size", "window", "shift", "grid", "cosine"), CASES)
def test_every_path_is_the_definition(path, size, window, shift, grid, cosine) -> None:
    tensors = inputs(size, window)
    want = run(by_loops(window, shift, grid, cosine), tensors)
    for got, right in zip(run(op(window, shift, grid, cosine), tensors), want, strict=True):
        # windows of one token have no gradient of their scores, but rounding
        assert (relative(got, right) if right.any() else got.abs().max()) < EXACT


@pytest.mark.parametrize("matrices", [1, 3, 4], ids=["one-head", "groups-and-a-half", "two-groups"])
@pytest.mark.parametrize(("size", "window", "shift", "grid", "cosine"), CASES[1:4] + CASES[10:12])
@pytest.mark.usefixtures("poisoned")
def test_chunks_of_any_size(matrices, size, window, shift, grid, cosine, monkeypatch) -> None:
    """Chunks of heads of one window, of one window and of several, the last ones smaller."""
    tensors = inputs(size, window, batch=3)
    want = run(by_loops(window, shift, grid, cosine), tensors)
    monkeypatch.setenv("STRIATE_BACKEND", "cpu")
    scores = (window[0] * window[1]) ** 2 * 8
    monkeypatch.setattr(cpu, "CHUNK_BYTES", matrices * scores // torch.get_num_threads())
    assert worst(run(op(window, shift, grid, cosine), tensors), want) < EXACT


def test_a_backward_on_other_threads(monkeypatch) -> None:
    """The number of threads decides the chunks, and what the forward keeps lies in their order."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 4 * 144 * 8)
    tensors = inputs((7, 9), (3, 4), batch=3)
    want = run(by_loops((3, 4), (1, 2), False, False), tensors)

    def forward_on_others(*args: Tensor) -> Tensor:
        torch.set_num_threads(threads + 1)
        try:
            return op((3, 4), (1, 2))(*args)
        finally:
            torch.set_num_threads(threads)

    assert worst(run(forward_on_others, tensors), want) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 40.0, 95.0, 3000.0, -40.0, -95.0, -3000.0])
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_scores_of_any_level(shift, level, dtype, monkeypatch) -> None:
    """A constant in all scores changes nothing: not even where exponentials leave the range of the numbers."""
    monkeypatch.setenv("STRIATE_BACKEND", "cpu")
    rerun: list[bool] = []
    right = cpu._attend

    def attend(*args: Any, bounded: bool = False) -> Any:
        rerun.append(bounded)
        return right(*args, bounded=bounded)

    monkeypatch.setattr(cpu, "_attend", attend)
    tensors = [t.to(dtype) for t in inputs((7, 9), (3, 4))]
    want = run(by_loops((3, 4), shift, False, False), [t.double() for t in tensors])
    tensors[1] = tensors[1] + level
    limit = EXACT if dtype == torch.float64 else 1e-6
    limit = max(limit, abs(level) * torch.finfo(dtype).eps)
    got = run(op((3, 4), shift), tensors)
    errors = [relative(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) < 8 * limit
    assert rerun == ([False, True] if abs(level) > 90 else [False])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_outweigh_the_mask(dtype, path) -> None:
    """A seam takes 100 off a score, and no more than that: what is greater by more attends across it."""
    tensors = [t.to(dtype) for t in inputs((7, 9), (3, 4))]
    tensors[0] = tensors[0] * 16
    want = run(by_loops((3, 4), (1, 2), False, False), [t.double() for t in tensors])
    unmasked = by_loops((3, 4), (1, 2), False, False, mask=0.0)(*(t.double() for t in tensors))
    never = by_loops((3, 4), (1, 2), False, False, mask=1e9)(*(t.double() for t in tensors))
    assert min(relative(want[0], other) for other in (unmasked, never)) > 1e-2
    errors = [relative(a, b) for a, b in zip(run(op((3, 4), (1, 2)), tensors), want, strict=True)]
    limit = 1e7 * torch.finfo(dtype).eps  # scores of 1000 have few digits after the point, and what differs has fewer
    assert errors[0] < 1e-3 * limit
    assert max(errors) < limit


@pytest.mark.parametrize("channel", [0, HEADS * DIM, 2 * HEADS * DIM], ids=["query", "key", "value"])
def test_a_nan_stays_in_its_window(channel, path) -> None:
    tensors = inputs((6, 8), (3, 4))
    tensors[0][0, 0, 0, channel] = float("nan")
    out = op((3, 4))(*tensors)
    assert out[0, :3, :4].isnan().any()
    out[0, :3, :4] = 0
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_an_empty_batch(shift, path) -> None:
    tensors = inputs((7, 9), (3, 4))
    tensors[0] = tensors[0][:0]
    out, *grads = run(op((3, 4), shift), tensors)
    assert out.shape == (0, 7, 9, HEADS * DIM)
    assert [grad.shape for grad in grads] == [t.shape for t in tensors]
    assert not any(grad.any() for grad in grads)
    with torch.no_grad():
        assert op((3, 4), shift)(*tensors).shape == out.shape


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_inference_computes_what_training_does(shift) -> None:
    tensors = [t.requires_grad_() for t in inputs((7, 9), (3, 4))]
    call = op((3, 4), shift)
    with torch.no_grad():
        got = call(*tensors)
    assert not got.requires_grad
    assert torch.equal(got, call(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype) -> None:
    tensors = [t.float() for t in inputs((7, 9), (3, 4))]
    tensors[0] = tensors[0].to(dtype)

    def call(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return op((3, 4), (1, 2))(*args)

    assert worst(run(call, tensors), run(op((3, 4), (1, 2)), tensors)) == 0


@pytest.mark.parametrize("given", [(0,), (0, 1), (0, 2), (0, 3)])
def test_optional_inputs(given, monkeypatch) -> None:
    """Without bias: none is added; without pad: zeros; without scale: head_dim ** -0.5, or 1 for cosine attention."""
    window, shift = (3, 4), (1, 2)
    qkv, bias, pad, scale = inputs((7, 9), window)
    for cosine in (False, True):
        factor = torch.tensor([1.0 if cosine else DIM**-0.5] * HEADS, dtype=torch.float64)
        filled = [qkv, torch.zeros_like(bias), torch.zeros_like(pad), factor]
        call = [t if i in given else None for i, t in enumerate((qkv, bias, pad, scale))]
        want = [t if i in given else f for i, (t, f) in enumerate(zip((qkv, bias, pad, scale), filled, strict=True))]
        for path in ("cpu", "reference"):
            monkeypatch.setenv("STRIATE_BACKEND", path)
            out = op(window, shift, cosine=cosine)(*call)
            assert relative(out, by_loops(window, shift, False, cosine)(*want)) < EXACT


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
@pytest.mark.parametrize("cosine", [False, True])
def test_gradients_of_qkv_alone(shift, cosine, path) -> None:
    qkv, bias, pad, _ = inputs((7, 9), (3, 4))
    factor = torch.full((HEADS,), 1.0 if cosine else DIM**-0.5, dtype=torch.float64)
    fixed = torch.zeros_like(bias), torch.zeros_like(pad), factor
    want = run(lambda x: by_loops((3, 4), shift, False, cosine)(x, *fixed), [qkv])
    assert worst(run(lambda x: op((3, 4), shift, cosine=cosine)(x, None, None, None), [qkv]), want) < EXACT


@pytest.mark.parametrize("index", range(4))
def test_gradient_of_one_input_alone(index, path) -> None:
    tensors = inputs((7, 9), (3, 4))
    tensors[index].requires_grad_()
    out = op((3, 4), (1, 2))(*tensors)
    out.pow(2).sum().backward()
    want = run(lambda *t: by_loops((3, 4), (1, 2), False, False)(*t).pow(2).sum(), [t.detach() for t in tensors])
    factor = torch.randn((), generator=torch.Generator().manual_seed(7), dtype=torch.float64)  # the probe of `run`
    assert relative(tensors[index].grad * factor, want[1 + index]) < EXACT


@pytest.mark.parametrize("learned", [True, False], ids=["bias", "no-bias"])
def test_a_number_as_scale(learned, path) -> None:
    qkv, bias, pad, _ = inputs((7, 9), (3, 4))
    scale = torch.full((HEADS,), 0.7, dtype=torch.float64)
    table = bias if learned else torch.zeros_like(bias)

    def loops(qkv: Tensor, pad: Tensor, table: Tensor) -> Tensor:
        return by_loops((3, 4), (1, 2), False, False)(qkv, table, pad, scale)

    def call(qkv: Tensor, pad: Tensor, table: Tensor) -> Tensor:
        return op((3, 4), (1, 2))(qkv, table if learned else None, pad, 0.7)

    count = 4 if learned else 3  # output, gradients of qkv and pad, and of the table where there is one
    assert worst(run(call, [qkv, pad, table])[:count], run(loops, [qkv, pad, table])[:count]) < EXACT


def test_gradcheck_of_the_definition(monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "reference")
    tensors = [t.requires_grad_() for t in inputs((3, 4), (2, 3), batch=1)]
    for cosine in (False, True):
        assert torch.autograd.gradcheck(op((2, 3), (1, 1), cosine=cosine), tensors, fast_mode=True)


def wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    right = partition.group_mask
    monkeypatch.setattr(reference, "group_mask", lambda size, window, shift, *rest: right(size, window, (2, 2), *rest))


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "group_mask", lambda *args: torch.zeros(1, 1, 1))


def wrong_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.expand_bias
    monkeypatch.setattr(reference, "expand_bias", lambda table, window: right(table, window).transpose(1, 2))


def roll_before_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.pad_map

    def rolled(x: Tensor, window: Any, value: Any) -> Tensor:
        return right(x.roll((-1, -2), (1, 2)), window, value).roll((1, 2), (1, 2))

    monkeypatch.setattr(reference, "pad_map", rolled)


def zero_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.pad_map
    monkeypatch.setattr(reference, "pad_map", lambda x, window, value: right(x, window))


def other_roll_back(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.merge
    monkeypatch.setattr(
        reference, "merge", lambda groups, size, window, shift, interval: right(groups, size, window, (0, 0))
    )


@pytest.mark.parametrize(
    "mutate", [wrong_mask, no_mask, wrong_offset, roll_before_padding, zero_padding, other_roll_back]
)
def test_the_comparison_sees_a_wrong_definition(mutate, monkeypatch) -> None:
    monkeypatch.setenv("STRIATE_BACKEND", "reference")
    tensors = inputs((7, 9), (3, 4))
    want = by_loops((3, 4), (1, 2), False, False)(*tensors)
    assert relative(op((3, 4), (1, 2))(*tensors), want) < EXACT
    mutate(monkeypatch)
    assert relative(op((3, 4), (1, 2))(*tensors), want) > 1e-4


@pytest.mark.parametrize("change", ["bias", "pad", "scale", "shift", "grid", "cosine"])
def test_the_comparison_sees_every_argument(change, path) -> None:
    tensors = inputs((7, 9), (3, 4))
    shift = (0, 0) if change == "grid" else (1, 2)
    want = run(by_loops((3, 4), shift, False, False), tensors)
    if change in ("bias", "pad", "scale"):
        i = ("qkv", "bias", "pad", "scale").index(change)
        tensors[i] = tensors[i].roll(1, 0)
    options = {"shift": {"shift": (1, 1)}, "grid": {"grid": True}, "cosine": {"cosine": True}}.get(change, {})
    got = run(op((3, 4), **{"shift": shift, **options}), tensors)
    assert all(relative(a, b) > 1e-4 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-6)])
def test_reduced_precision(path, dtype, limit) -> None:
    """Inputs are rounded first, so that only the arithmetic differs; a bfloat16 has 8 bits."""
    tensors = [t.to(dtype) for t in inputs((7, 9), (3, 4))]
    got = run(op((3, 4), (1, 2)), tensors)
    assert {t.dtype for t in got} == {dtype}
    want = run(by_loops((3, 4), (1, 2), False, False), [t.double() for t in tensors])
    errors = [relative(a, b) for a, b in zip(got, want, strict=True)]
    assert errors[0] < limit
    assert max(errors) < 4 * limit
    wrong = run(op((3, 4), (1, 1)), tensors)
    assert all(relative(a, b) > 4 * limit for a, b in zip(wrong, want, strict=True))


def test_half_precision_maps_with_float_parameters(path) -> None:
    """Autocast: qkv is bfloat16, bias, pad and scale stay float32."""
    tensors = inputs((7, 9), (3, 4), dtype=torch.float32)
    tensors[0] = tensors[0].bfloat16()
    got = run(op((3, 4), (1, 2)), tensors)
    want = run(by_loops((3, 4), (1, 2), False, False), [t.double() for t in tensors])
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, *[torch.float32] * 3]
    assert worst(got, want) < 4e-2


def test_views_are_taken_as_they_are(path) -> None:
    tensors = inputs((7, 9), (3, 4))
    want = run(op((3, 4), (1, 2)), tensors)
    strange = tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strange.is_contiguous()
    assert worst(run(op((3, 4), (1, 2)), [strange, *tensors[1:]]), want) < EXACT


def test_compile_as_one_graph_for_any_size() -> None:
    torch.compiler.reset()
    call = op((3, 4), (1, 2))
    graph = torch.compile(call, fullgraph=True, backend="aot_eager")

    def compiled(qkv: Tensor, *others: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(qkv, (1, 2))  # fails if the graph would serve one size only
        return graph(qkv, *others)

    for size in [(7, 9), (6, 8)]:
        tensors = inputs(size, (3, 4))
        assert worst(run(compiled, tensors), run(call, tensors)) < EXACT


@pytest.mark.parametrize("index", range(4))
def test_functional_gradient_of_one_input(index) -> None:
    tensors = inputs((7, 9), (3, 4))
    call = op((3, 4), (1, 2))

    def loss(*args: Tensor) -> Tensor:
        return call(*args).pow(2).sum()

    got = torch.func.grad(loss, argnums=index)(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    want = torch.autograd.grad(loss(*leaves), leaves[index])[0]
    assert relative(got, want) < EXACT


@pytest.mark.parametrize("index", range(4))
def test_vmap_over_one_input(index) -> None:
    tensors = inputs((7, 9), (3, 4))
    stack = torch.stack([tensors[index], tensors[index].flip(0), -tensors[index]])
    call = op((3, 4), (1, 2))
    dims = tuple(0 if i == index else None for i in range(4))
    got = torch.vmap(call, in_dims=dims)(*[stack if i == index else t for i, t in enumerate(tensors)])
    want = torch.stack([call(*[s if i == index else t for i, t in enumerate(tensors)]) for s in stack])
    assert relative(got, want) < EXACT


def test_gradients_per_sample() -> None:
    qkv, bias, pad, scale = inputs((7, 9), (3, 4), batch=3)
    call = op((3, 4), (1, 2))

    def loss(bias: Tensor, one: Tensor) -> Tensor:
        return call(one[None], bias, pad, scale).pow(2).sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(bias, qkv)
    want = torch.stack([torch.func.grad(loss)(bias, one) for one in qkv])
    assert relative(got, want) < EXACT


def test_training_after_inference_mode() -> None:
    tensors = inputs((5, 11), (3, 4))  # a size no other test uses: tables are cached by size
    call = op((3, 4), (1, 2))
    with torch.inference_mode():
        want = call(*tensors)
    assert relative(run(call, tensors)[0], want) < EXACT


@torch.no_grad()
def test_a_parameter_may_change_between_calls() -> None:
    """The CPU path keeps the scores that a bias table has made: never for other numbers, masks, windows or dtypes."""
    torch.manual_seed(0)
    qkv, table, _, _ = inputs((6, 6), (2, 3))
    bias = torch.nn.Parameter(table)

    def check(window: tuple[int, int], shift: tuple[int, int], x: Tensor = qkv, limit: float = EXACT) -> None:
        y = cpu.window_attention(x, bias, HEADS, window, shift, (1, 1), False, 0.5, False, None)
        expected = reference.window_attention(
            x, bias.to(x.dtype), HEADS, window, shift, (1, 1), False, 0.5, False, None
        )
        assert relative(y, expected) < limit

    for window, shift in [((2, 3), (0, 0)), ((3, 2), (0, 0)), ((2, 3), (0, 1)), ((2, 3), (1, 0)), ((2, 3), (0, 0))]:
        check(window, shift)
    bias.data.mul_(2)
    check((2, 3), (0, 0))
    bias.add_(1 + torch.rand_like(bias))
    check((2, 3), (0, 0), qkv.float(), 1e-5)
    check((2, 3), (0, 0))


@pytest.mark.parametrize("shift", [0, 6])
@pytest.mark.parametrize("learned", [True, False], ids=["bias", "no-bias"])
def test_training_keeps_nothing_of_the_size_of_the_scores(shift, learned) -> None:
    qkv = torch.randn(1, 48, 48, 3 * 32, requires_grad=True)
    bias = torch.randn(23 * 23, 4, requires_grad=True) if learned else None

    def call() -> Tensor:
        return window_attention(qkv, bias, num_heads=4, window=12, shift=shift)

    kept = saved_bytes(call, skip=[qkv])
    scores = 48 * 48 * 144 * 4 * 4
    assert 0 < kept < scores / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRIATE_BACKEND", "reference")
        assert saved_bytes(call, skip=[qkv]) > scores


class _Storages(TorchDispatchMode):
    """Bytes of every storage that an operator returns something of."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            self.kept.append(t)
            self.bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize(("shift", "grid"), [(0, False), (3, False), (0, True)])
def test_inference_holds_a_few_windows_at_a_time(shift, grid, monkeypatch) -> None:
    """Besides the output, nothing of the size of the map: no rolled, permuted or split copy, and no scores."""
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 4 * 49 * 49 * 4 // torch.get_num_threads())  # four heads of a window
    qkv, bias = torch.randn(2, 56, 56, 3 * 64), torch.randn(13 * 13, 4)

    def call() -> Tensor:
        with torch.no_grad():
            return window_attention(qkv, bias, num_heads=4, window=7, shift=shift, grid=grid)

    call()  # tables are cached
    with _Storages() as seen:
        out = call()
    mask_and_bias = 4 * 4 * 49 * 49 * 4
    allowed = {out.untyped_storage().data_ptr(), qkv.untyped_storage().data_ptr()}
    others = [size for address, size in seen.bytes.items() if address not in allowed]
    assert 0 < max(others) <= mask_and_bias < out.nbytes / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 4}, r"qkv \(2, 7, 9, 18\) must be \(B, H, W, 3 \* C\) with C a multiple of num_heads=4"),
        ({"qkv": torch.randn(7, 9, 18)}, r"qkv \(7, 9, 18\) must be \(B, H, W, 3 \* C\)"),
        ({"window": 0}, r"window=0; give a positive integer"),
        ({"shift": 3}, r"shift=\(3, 3\) must be at least 0 and smaller than window=\(3, 4\)"),
        ({"shift": (0, -1)}, r"shift=\(0, -1\) must be at least 0"),
        ({"grid": True, "shift": 1}, r"shift=\(1, 1\) with grid=True.*only windows of neighbours shift"),
        ({"bias": torch.randn(34, 2)}, r"bias \(34, 2\) must be \(35, 2\) for window \(3, 4\): resize the table"),
        ({"pad": torch.randn(6)}, r"pad \(6,\) must be \(18,\)"),
    ],
)
def test_arguments_are_checked(change, message) -> None:
    arguments = {"qkv": torch.randn(2, 7, 9, 18), "num_heads": 2, "window": (3, 4), **change}
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)


def test_scores_are_softmax_weights_of_values() -> None:
    """Equal queries and keys: every token is the mean of its window."""
    v = torch.randn(1, 4, 4, 6, dtype=torch.float64)
    qkv = torch.cat((torch.zeros_like(v), torch.zeros_like(v), v), -1)
    means = F.avg_pool2d(v.permute(0, 3, 1, 2), 2).repeat_interleave(2, 2).repeat_interleave(2, 3).permute(0, 2, 3, 1)
    assert relative(window_attention(qkv, num_heads=2, window=2), means) < EXACT


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(12, 18), (7, 11), (3, 2)])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_dilated_groups_by_loops(path, size, mask_padding, monkeypatch) -> None:
    """Tokens `interval` apart inside blocks of `window * interval`, with and without the keys of the padding."""
    monkeypatch.setenv("STRIATE_BACKEND", path)
    window, interval = (3, 2), (2, 3)
    qkv, bias, pad, _ = inputs(size, window)
    (h, w), (rows, cols) = size, partition.padded_size(size, partition.block_size(window, interval))
    full = pad_by_hand(qkv, (rows, cols), pad)
    table = bias.view(2 * window[0] - 1, 2 * window[1] - 1, HEADS)
    dim = qkv.shape[-1] // (3 * HEADS)
    want = torch.zeros(qkv.shape[0], rows, cols, HEADS, dim, dtype=qkv.dtype)
    q, k, v = full.view(*full.shape[:3], 3, HEADS, dim).unbind(3)
    block = window[0] * interval[0], window[1] * interval[1]
    for y, x in itertools.product(range(h), range(w)):
        top, left = y // block[0] * block[0] + y % interval[0], x // block[1] * block[1] + x % interval[1]
        keys = [(top + i * interval[0], left + j * interval[1]) for i in range(window[0]) for j in range(window[1])]
        place = (y - top) // interval[0], (x - left) // interval[1]
        scores = []
        for n, (ky, kx) in enumerate(keys):
            offset = place[0] - n // window[1] + window[0] - 1, place[1] - n % window[1] + window[1] - 1
            score = (q[:, y, x] * k[:, ky, kx]).sum(-1) * 0.3 + table[offset]
            scores.append(score - 1e6 if mask_padding and (ky >= h or kx >= w) else score)
        weights = torch.stack(scores, -1).softmax(-1)
        values = torch.stack([v[:, ky, kx] for ky, kx in keys], -2)
        want[:, y, x] = (weights[..., None] * values).sum(-2)
    got = window_attention(
        qkv, bias, num_heads=HEADS, window=window, interval=interval, scale=0.3, pad=pad, mask_padding=mask_padding
    )
    assert relative(got, want[:, :h, :w].flatten(3)) < EXACT


def pad_by_hand(x: Tensor, size: tuple[int, int], value: Tensor) -> Tensor:
    full = value.expand(x.shape[0], *size, -1).clone()
    full[:, : x.shape[1], : x.shape[2]] = x
    return full
