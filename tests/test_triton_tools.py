"""The tools that test the Triton kernels find the faults they are there for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from helpers import relative
from striate.ops import _aot, _triton
from triton_tools import OutOfBoundsError, RaceError, interpreted, metered, mutated, poisoned

BLOCK = tl.constexpr(16)


@triton.jit
def _twice(x):
    y = x + x
    return y


@triton.jit
def _softmax_kernel(x, out, columns, stride, width: tl.constexpr):
    """Softmax of each row of x, times 2; a program a row."""
    row = tl.program_id(0)
    column = tl.arange(0, width)
    inside = column < columns
    scores = tl.load(x + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    e = tl.exp(scores - tl.max(scores, 0))
    e = e / e.sum(0)
    tl.store(out + row * columns + column, _twice(e).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _matmul_kernel(a, b, out, depth: tl.constexpr):
    """a (16, depth) times b (depth, 16), a slice of 16 at a time."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, depth, BLOCK):
        x = tl.load(a + row[:, None] * depth + k + column[None, :])
        y = tl.load(b + (k + row)[:, None] * BLOCK + column[None, :])
        total = tl.dot(x, y, total)
    tl.store(out + row[:, None] * BLOCK + column[None, :], total.to(out.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(a, b, out, n: tl.constexpr):
    """One row of `out` for each operation on bfloat16 vectors."""
    i = tl.arange(0, n)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + n + i, x * y)
    tl.store(out + 2 * n + i, -x)
    tl.store(out + 3 * n + i, tl.where(x < y, x, y))
    tl.store(out + 4 * n + i, tl.maximum(x, y) - 1.5)
    tl.store(out + 5 * n + i, tl.abs(x))
    tl.store(out + 6 * n + i, tl.cumsum(x, 0) * 0 + tl.sum(x, 0))
    tl.store(out + 7 * n + i, x.to(tl.float16).to(tl.int32).to(tl.bfloat16))


@triton.jit
def _cast_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def _shift_kernel(x, out, n):
    """out[i] = x[i], one element a program."""
    i = tl.program_id(0)
    value = tl.load(x + i)
    tl.store(out + i, value)


@triton.jit
def _atomic_kernel(x, total, n: tl.constexpr):
    tl.atomic_add(total, tl.sum(tl.load(x + tl.program_id(0) * n + tl.arange(0, n)), 0))


def softmax(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _softmax_kernel[(x.shape[0],)](x, out, x.shape[1], x.stride(0), width=32, num_warps=1)
    return out


def matmul(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(16, 16)
    _matmul_kernel[(1,)](a, b, out, a.shape[1], num_warps=4)
    return out


# ------------------------------------------------------------------------------------------------------- interpreter


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_kernels_compute_what_they_say(dtype: torch.dtype, tolerance: float) -> None:
    x, a, b = (torch.randn(shape).to(dtype) for shape in ((5, 27), (16, 48), (48, 16)))
    with interpreted():
        assert _triton.interpreting()
        assert relative(softmax(x), 2 * x.double().softmax(-1)) < tolerance
        assert relative(matmul(a, b), a.double() @ b.double()) < tolerance
    assert not _triton.interpreting()


def test_bfloat16_as_torch_computes_it() -> None:
    a, b = torch.randn(2, 64).bfloat16()
    out = torch.empty(8, 64, dtype=torch.bfloat16)
    with interpreted():
        _arithmetic_kernel[(1,)](a, b, out, 64)
    total = a.float().sum().bfloat16().expand(64)
    want = [a + b, a * b, -a, torch.minimum(a, b), torch.maximum(a, b) - 1.5, a.abs(), total, a.int().bfloat16()]
    for got, wanted in zip(out, want, strict=True):
        assert torch.equal(got, wanted)


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    random = torch.randn(500) * 10.0 ** torch.randint(-42, 38, (500,))
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-45, 0.0, torch.inf])
    almost_infinite = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a NaN
    x = torch.cat([random, ties, -ties, almost_infinite, torch.full((511,), torch.nan)])
    out = torch.empty(1024, dtype=torch.bfloat16)
    with interpreted():
        _cast_kernel[(1,)](x, out, 1024)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    stock = InterpreterBuilder().cast_impl(TensorHandle(random.numpy(), tl.float32), tl.bfloat16).data
    assert (stock != random.bfloat16().view(torch.uint16).numpy()).mean() > 0.3, "nothing to repair any more"


def test_accumulating_in_bfloat16_is_seen() -> None:
    a, b = torch.randn(16, 1024).bfloat16(), torch.randn(1024, 16).bfloat16()
    with (
        interpreted(),
        mutated(_matmul_kernel, "tl.dot(x, y, total)", "tl.dot(x, y, total).to(tl.bfloat16).to(tl.float32)"),
    ):
        assert relative(matmul(a, b), a.double() @ b.double()) > 5e-3


def test_interpreter_and_compiler_share_a_process() -> None:
    x = torch.randn(3, 20)
    meta = torch.empty(3, 20, device="meta")
    first = _aot.compile_launch("window_attention", "softmax", "sm_90", lambda: softmax(meta))
    with interpreted(), interpreted():
        want = softmax(x)
    with mutated(_softmax_kernel, "float32", "float64"):
        other = _aot.compile_launch("window_attention", "softmax", "sm_90", lambda: softmax(meta))
    assert other != first
    assert _aot.compile_launch("window_attention", "softmax", "sm_90", lambda: softmax(meta)) == first
    with interpreted():
        assert torch.equal(softmax(x), want)


def test_everything_is_as_before_after_an_error() -> None:
    before = JITFunction.run, JITFunction.__call__, tl.load, tl.tensor.sum, torch.empty, Tensor.new_empty
    with pytest.raises(ZeroDivisionError), interpreted(), poisoned(), metered():
        raise ZeroDivisionError
    assert before == (JITFunction.run, JITFunction.__call__, tl.load, tl.tensor.sum, torch.empty, Tensor.new_empty)


def test_wrong_launches() -> None:
    x = torch.randn(16)
    with pytest.raises(ValueError, match=r"enter interpreted\(\) first"), metered():
        pass
    with interpreted():
        with pytest.raises(KeyError, match="_shift_kernel has no parameter warps"):
            _shift_kernel[(1,)](x, x.clone(), 16, warps=4)
        with pytest.raises(ValueError, match="x is on meta"):
            _shift_kernel[(1,)](x.to("meta"), x, 16)
        with pytest.raises(TypeError, match="missing a required argument"):
            _shift_kernel[(1,)](x, x)


# --------------------------------------------------------------------------------------------------- bounds and races


def shift(source: Tensor, out: Tensor) -> None:
    _shift_kernel[(8,)](source, out, 8)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tl.load(x + i)", "tl.load(x + i + 1)", "load of element 8 of x, which spans 8"),
        ("tl.load(x + i)", "tl.load(x + i - 1)", "load of element -1 of x, which spans 8"),
        ("tl.store(out + i,", "tl.store(out + 2 * i,", "store of element 8 of out, which spans 8"),
        ("tl.load(x + i)", "tl.load(x - (n.to(tl.int64) << 40) + i)", "far outside every argument"),
    ],
)
def test_out_of_bounds(old: str, new: str, message: str) -> None:
    with interpreted():
        shift(torch.randn(8), torch.empty(8))
        with mutated(_shift_kernel, old, new), pytest.raises(OutOfBoundsError, match=message):
            shift(torch.randn(8), torch.empty(8))


def test_bounds_are_those_of_the_view() -> None:
    whole = torch.randn(40)
    with interpreted():
        shift(whole[8:16], torch.empty(8))
        shift(whole[::2][:8], torch.empty(8))  # contiguity is the business of the launcher
        with pytest.raises(OutOfBoundsError, match=r"_shift_kernel, program \(7, 0, 0\): load of element 7"):
            shift(whole[8:15], torch.empty(8))


def test_mask_edge() -> None:
    x = torch.randn(4, 27)
    with interpreted(), mutated(_softmax_kernel, "column < columns", "column <= columns"):
        message = "load of element 108 of x, which spans 108"
        with pytest.raises(OutOfBoundsError, match=message):
            softmax(x)


@pytest.mark.parametrize(
    ("old", "new", "shared", "message"),
    [
        ("tl.store(out + i,", "tl.store(out + i // 2,", False, "store of elements of out that another program writes"),
        ("tl.load(x + i)", "tl.load(x + i // 2)", True, "load of elements of x that another program writes"),
        (
            "tl.load(x + i)",
            "tl.load(x + tl.minimum(i + 1, 7))",
            True,
            "store of elements of out that another program reads",
        ),
    ],
)
def test_races_between_programs(old: str, new: str, shared: bool, message: str) -> None:
    x = torch.randn(8)
    with interpreted(), metered():
        shift(x, x)
        with mutated(_shift_kernel, old, new), pytest.raises(RaceError, match=message):
            shift(x, x if shared else torch.empty(8))
        with (
            mutated(_shift_kernel, "tl.store(out + i, value)", "tl.store(out + tl.arange(0, 4) // 2, tl.arange(0, 4))"),
            pytest.raises(RaceError, match="lanes of one store"),
        ):
            _shift_kernel[(1,)](x, torch.empty(8), 8)


def test_atomics_do_not_race_with_each_other() -> None:
    x, total = torch.ones(64), torch.zeros(1)
    message = "load of elements of total that another program changes atomically"
    with interpreted(), metered() as meter:
        _atomic_kernel[(4,)](x, total, 16)
        assert total.item() == 64
        assert meter.writes(total) == 4
        with mutated(_atomic_kernel, "tl.sum(", "tl.load(total) + tl.sum("), pytest.raises(RaceError, match=message):
            _atomic_kernel[(4,)](x, total, 16)


def test_overflow_of_int32() -> None:
    x = torch.randn(8)
    with interpreted(), metered(), mutated(_shift_kernel, "x + i", "x + (i + 1) * 1073741824 * 4"):
        message = "int32 overflow"
        with pytest.raises(AssertionError, match=message):
            shift(x, torch.empty(8))


# ------------------------------------------------------------------------------------------------------------- meter


def test_counts_are_exact() -> None:
    a, b = torch.randn(16, 48), torch.randn(48, 16)
    with interpreted(), metered() as meter:
        out = matmul(a, b)
        assert (meter.reads(a), meter.reads(b), meter.writes(out), meter.reads(out)) == (1, 1, 1, 0)
        assert (meter.bytes_read, meter.bytes_written) == (2 * 16 * 48 * 4, 16 * 16 * 4)
        with mutated(
            _matmul_kernel,
            "tl.load(a + row[:, None] * depth + k + column[None, :])",
            "tl.load(a + row[:, None] * 0 + column)",
        ):
            matmul(a, b)
        assert meter.bytes_read == (2 * 16 * 48 + 3 * 16 + 48 * 16) * 4
    assert meter.reads(a) == 1 + torch.tensor(3 * 16 / (16 * 48)).item()  # 3 loads of the 16 elements of half a row
    assert torch.equal(meter.read_counts(a)[0, :17], torch.tensor([4] * 16 + [1]))
    assert torch.equal(meter.read_counts(a.T)[:, 0], meter.read_counts(a)[0])
    assert meter.reads(a[1:]) == 1
    assert meter.reads(torch.randn(3)) == 0


def test_a_mean_of_one_does_not_hide_a_hole() -> None:
    x = torch.randn(8)
    with interpreted(), metered() as meter, mutated(_shift_kernel, "tl.load(x + i)", "tl.load(x + (i | 1))"):
        shift(x, torch.empty(8))
    assert meter.reads(x) == 1
    assert meter.read_counts(x).tolist() == [0, 2] * 4


# -------------------------------------------------------------------------------------------------- mutation, poison


def test_mutated_restores_and_refuses() -> None:
    x = torch.randn(2, 20)
    with interpreted():
        want = softmax(x)
        with mutated(_softmax_kernel, "tl.exp(", "tl.exp2("):
            assert relative(softmax(x), want) > 1e-2
        assert torch.equal(softmax(x), want)
    message = "'nowhere' is not in the source of _softmax_kernel"
    with pytest.raises(ValueError, match=message), mutated(_softmax_kernel, "nowhere", ""):
        pass


@pytest.mark.parametrize(
    "make", [lambda t: torch.empty_like(t), lambda t: t.new_empty(t.shape), lambda t: torch.empty(t.shape)]
)
def test_unwritten_output_is_seen(make: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8)
    with interpreted(), poisoned():
        out = make(x)
        shift(x, out)
        assert torch.equal(out, x)
        with mutated(_shift_kernel, "value)", "value, mask=i != 5)"):
            out = make(x)
            shift(x, out)
        assert np.flatnonzero(out.isnan()).tolist() == [5]
        assert torch.empty(3, dtype=torch.int32).eq(-(2**31)).all()


@triton.jit
def _promotion_kernel(a, b, c, out, n: tl.constexpr):
    """float16 or int32 by turns, the same operands under several rules, addresses in two tensors at once."""
    i = tl.arange(0, n)
    x, y, k = tl.load(a + i), tl.load(b + i), tl.load(c + i)
    tl.store(out + i, x * y)
    tl.store(out + n + i, x / y)  # float32, unlike the product
    tl.store(out + 2 * n + i, x + k)
    tl.store(out + 3 * n + i, k * 2 + k / 2)
    tl.store(out + 4 * n + i, tl.load(tl.where(i % 2 == 0, a, b) + i))


def test_operands_are_promoted_by_every_rule_each_time() -> None:
    a, b, c = torch.randn(16).half(), torch.randn(16).half(), torch.arange(16, dtype=torch.int32)
    want = [(a * b).float(), a.float() / b.float(), (a + c.half()).float(), 2.5 * c]
    want.append(torch.where(c % 2 == 0, a, b).float())
    for _ in range(2):
        out = torch.empty(5, 16)
        with interpreted():
            _promotion_kernel[(1,)](a, b, c, out, 16)
        for got, wanted in zip(out, want, strict=True):
            assert torch.equal(got, wanted)
