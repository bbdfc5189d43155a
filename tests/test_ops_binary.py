"""Binary operators: signs, packing, and products of bits on every path of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from striate.ops import (
    binary_linear,
    binary_projection,
    binary_sign,
    explain,
    pack_signs,
    packed_matmul,
    softmax_aware,
    unpack_signs,
)
from striate.ops.binary import counting, cpu, popcount

SIZES = [(1, 1, 1), (5, 63, 7), (6, 64, 8), (7, 65, 3), (33, 200, 129), (4, 448, 5), (70, 576, 66)]
WAYS = {"fours": counting.fours, "words": counting.words}
ENGINES = (*WAYS, "int8", "float")


@pytest.fixture(params=["reference", *ENGINES])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setenv("STRIATE_BACKEND", "reference")
        return request.param
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 4000)  # a few rows of the matrices here
    way = WAYS.get(request.param)
    monkeypatch.setattr(counting, "best", lambda length: way)
    monkeypatch.setattr(cpu, "_popcount", lambda: popcount if way else None)
    monkeypatch.setattr(cpu, "_takes_int8", lambda rows: rows > 0 and request.param == "int8")
    return request.param


def signs(*shape: int) -> Tensor:
    return torch.where(torch.rand(shape) > 0.5, 1.0, -1.0)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers of which a tenth are exact zeros, and one of every three rows has none."""
    x = torch.randn(shape, dtype=torch.float64)
    x[torch.rand(shape) < 0.1] = 0
    x[..., ::3, :] = torch.where(x[..., ::3, :] == 0, 1.0, x[..., ::3, :])
    return x.to(dtype)


def plain_projection(
    x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor, slope: Tensor, offset: Tensor, shift: Any
) -> Tensor:
    y = torch.sign(x if shift is None else x + shift) @ w.T * scale + bias
    y = y + shortcut.repeat(*[1] * (x.ndim - 1), len(w) // shortcut.shape[-1])
    return F.prelu(y.movedim(-1, 1), slope).movedim(1, -1) + offset


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 300])
def test_packing_round_trip(length) -> None:
    want = signs(3, 5, length)
    words = pack_signs(want)
    assert words.dtype == torch.int64
    assert words.shape == (3, 5, -(-length // 64))
    assert torch.equal(unpack_signs(words, length), want)
    assert torch.equal(unpack_signs(words, length, torch.int8), want.to(torch.int8))


def test_layout_of_a_word() -> None:
    """Bit i of a word is its i-th sign; the sign bit of the integer is the 64th; zeros fill the rest."""
    x = -torch.ones(2, 70)
    x[0, 0] = x[0, 2] = x[1, 63] = x[1, 69] = 1
    assert pack_signs(x).tolist() == [[5, 0], [-(2**63), 1 << 5]]
    assert pack_signs(torch.tensor([[0.0, 2.0]])).tolist() == [[2]]


@pytest.mark.parametrize(("m", "length", "n"), SIZES)
def test_products_of_words_are_exact(m, length, n, engine) -> None:
    a, b = signs(m, length), signs(n, length)
    got = packed_matmul(pack_signs(a), pack_signs(b), length)
    assert got.dtype == torch.int32
    assert torch.equal(got, (a @ b.T).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "length", "n"), SIZES)
def test_linear_is_exact_zeros_included(m, length, n, dtype, engine) -> None:
    x, w = activations(2, m, length, dtype=dtype), signs(n, length)
    got = binary_linear(x, pack_signs(w), torch.ones(n, dtype=dtype))
    assert got.dtype == dtype
    assert torch.equal(got, torch.sign(x) @ w.to(dtype).T)


@pytest.mark.parametrize("length", [236, 240, 244, 256, 300, 504, 512, 2000, 2**15 - 1])
def test_no_counter_overflows(length, engine) -> None:
    """Rows that agree, and rows that differ, everywhere."""
    w = signs(3, length)
    x = torch.cat((w, -w, torch.ones(1, length), -torch.ones(1, length))) * 0.1
    assert torch.equal(binary_linear(x, pack_signs(w), torch.ones(3)), torch.sign(x) @ w.T)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("binary_input", [True, False])
def test_scale_and_bias_are_rounded_alike_on_every_path(binary_input, with_bias, engine) -> None:
    x, w, scale, bias = activations(40, 100), signs(30, 100), torch.rand(30), torch.randn(30)
    bias = bias if with_bias else None
    got = binary_linear(x, pack_signs(w), scale, bias, binary_input=binary_input)
    want = F.linear(torch.sign(x) if binary_input else x, w) * scale
    assert torch.equal(got, want if bias is None else want + bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("binary_input", [True, False])
def test_short_types_are_rounded_once(binary_input, dtype, engine) -> None:
    x, w = activations(9, 300, dtype=dtype), signs(30, 300)
    scale, bias = torch.rand(30).to(dtype), torch.randn(30).to(dtype)
    got = binary_linear(x, pack_signs(w), scale, bias, binary_input=binary_input)
    wide = torch.sign(x).float() if binary_input else x.float()
    assert torch.equal(got, (F.linear(wide, w) * scale.float() + bias.float()).to(dtype))


def test_nan_is_no_sign(engine) -> None:
    x, w = activations(4, 70), signs(3, 70)
    x[1, 5] = float("nan")
    zero = x.clone()
    zero[1, 5] = 0
    got, want = (binary_linear(t, pack_signs(w), torch.ones(3)) for t in (x, zero))
    assert torch.equal(got, want)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("repeats", [1, 4])
def test_projection(repeats, dtype, shifted, engine) -> None:
    x, w = activations(2, 37, 100, dtype=dtype), signs(24, 100).to(dtype)
    scale, bias, slope, offset = (torch.randn(24, dtype=dtype) for _ in range(4))
    shift = torch.randn(100, dtype=dtype) if shifted else None
    shortcut = torch.randn(2, 37, 24 // repeats, dtype=dtype)
    got = binary_projection(x, pack_signs(w), scale, bias, shortcut, slope, offset, shift)
    assert torch.equal(got, plain_projection(x, w, scale, bias, shortcut, slope, offset, shift))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 2, 3, 64)])
def test_leading_shapes(shape, engine) -> None:
    x, w = torch.randn(shape), signs(5, 64)
    assert torch.equal(binary_linear(x, pack_signs(w), torch.ones(5)), torch.sign(x) @ w.T)


def test_strided_inputs(engine) -> None:
    x, w = activations(100, 40).T, signs(100, 10)
    words = pack_signs(w.T).repeat_interleave(2, 1)[:, ::2]
    assert not any(t.is_contiguous() for t in (x, words))
    assert torch.equal(binary_linear(x, words, torch.ones(10)), torch.sign(x) @ w)
    assert torch.equal(packed_matmul(words, words, 100), (w.T @ w).int())


def test_results_do_not_depend_on_threads() -> None:
    before, results = torch.get_num_threads(), []
    x, words = activations(999, 384), pack_signs(signs(384, 384))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(binary_linear(x, words, torch.rand(384, generator=torch.Generator().manual_seed(0))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_several_threads_may_call_at_once(engine) -> None:
    x, w = activations(500, 200), signs(200, 200)
    words, want, wrong = pack_signs(w), torch.sign(x) @ w.T, []

    def call() -> None:
        for _ in range(5):
            if not torch.equal(binary_linear(x, words, torch.ones(200)), want):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, torch
from striate.ops import binary_linear, pack_signs
torch.set_num_threads(1)  # PyTorch's own threads do not outlive a fork
torch.get_num_threads = lambda: 2
x, words = torch.randn(2000, 256), pack_signs(torch.randn(256, 256))
want = binary_linear(x, words, torch.ones(256))
child = os.fork()
same = torch.equal(binary_linear(x, words, torch.ones(256)), want)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_process_has_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], timeout=100, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_kept_of_words_follows_them(engine) -> None:
    x, w = activations(6, 128), signs(4, 128)
    words = pack_signs(w)
    for binary_input in (True, False):
        first = binary_linear(x, words, torch.ones(4), binary_input=binary_input)
        words.copy_(~words)
        assert torch.equal(binary_linear(x, words, torch.ones(4), binary_input=binary_input), -first)


def test_kept_weights_die_with_the_words() -> None:
    words = pack_signs(signs(4, 128))
    binary_linear(activations(6, 128), words, torch.ones(4))
    assert words in cpu._kept
    count = len(cpu._kept)
    del words
    assert len(cpu._kept) == count - 1


def test_inference_mode_and_autocast(engine) -> None:
    w = signs(7, 300)
    want = None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        x, words = activations(5, 300), pack_signs(w)
        for binary_input in (True, False):
            got = binary_linear(x, words, torch.ones(7), binary_input=binary_input)
            with torch.autocast("cpu", enabled=False):
                want = (torch.sign(x) if binary_input else x) @ w.T
            assert (got - want).abs().max() < 1e-4


def test_without_numba_it_says_so_once(monkeypatch, caplog) -> None:
    cpu._popcount.cache_clear()
    monkeypatch.setitem(sys.modules, "striate.ops.binary.popcount", None)
    try:
        for _ in range(2):
            binary_linear(torch.randn(3, 64), pack_signs(signs(2, 64)), torch.ones(2))
    finally:
        cpu._popcount.cache_clear()
    assert caplog.text.count("pip install striate[binary]") == 1


def test_no_gradient_is_a_clear_error(engine) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    words = pack_signs(signs(4, 64))
    for call in (
        lambda: binary_linear(x, words, torch.ones(4)),
        lambda: binary_linear(x, words, torch.ones(4), binary_input=False),
        lambda: binary_projection(x, words, *torch.ones(2, 4), x[:, :4], *torch.ones(2, 4)),
    ):
        with pytest.raises(RuntimeError, match="packed layers are for inference; train the unpacked model"):
            (call().sum() + 0 * x.sum()).backward()


@pytest.mark.parametrize("op", ["packed_matmul", "binary_linear", "binary_projection"])
def test_compiles_and_exports(op) -> None:
    torch.compiler.reset()
    w = pack_signs(signs(8, 100))
    ones = torch.ones(8)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "packed_matmul": lambda x: packed_matmul(pack_signs(x), w, 100),
        "binary_linear": lambda x: binary_linear(x, w, ones, ones),
        "binary_projection": lambda x: binary_projection(x, w, ones, ones, x[:, :4], ones, ones),
    }
    call = calls[op]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        x = activations(rows, 100)
        assert torch.equal(compiled(x), call(x))


# ------------------------------------------------------------------------------------------------ signs and estimators


@pytest.mark.parametrize("estimator", ["clip", "polynomial"])
def test_sign_and_its_gradient(estimator) -> None:
    x = torch.tensor([-2.0, -1.0, -0.75, -0.0, 0.0, 0.25, 1.0, 1.5], requires_grad=True)
    y = binary_sign(x, estimator)
    assert y.tolist() == [-1, -1, -1, 0, 0, 1, 1, 1]
    (grad,) = torch.autograd.grad(y, x, torch.full_like(x, 3.0))
    slopes = {"clip": [0, 0, 1, 1, 1, 1, 0, 0], "polynomial": [0, 0, 0.5, 2, 2, 1.5, 0, 0]}
    assert grad.tolist() == [3 * slope for slope in slopes[estimator]]
    got = torch.vmap(torch.func.grad(lambda t: binary_sign(t, estimator)))(x.detach())
    assert got.tolist() == slopes[estimator]


def test_softmax_aware_keeps_what_has_a_quarter_of_the_largest_weight() -> None:
    scores = torch.tensor([[0.0, -1.38, -1.39, -5.0], [3.0, 3.0, 1.7, 1.6]], dtype=torch.float64, requires_grad=True)
    weights = softmax_aware(scores)
    assert weights.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    probe = torch.randn_like(scores)
    (got,) = torch.autograd.grad(weights, scores, probe)
    (want,) = torch.autograd.grad(scores.softmax(-1), scores, probe)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_sign(torch.ones(2), "ste"), "estimator='ste' is unknown; use one of clip, polynomial"),
        (lambda: unpack_signs(torch.zeros(2, 1), 5), r"words \(2, 1\) torch.float32 cannot hold 5 signs"),
        (lambda: unpack_signs(torch.zeros(2, 1, dtype=torch.int64), 65), r"pack_signs gives int64 \(…, 2\)"),
        (lambda: packed_matmul(*torch.zeros(2, 1, 2, 1, dtype=torch.int64), 5), r"a \(1, 2, 1\) must be a matrix"),
        (lambda: linear_of(x=torch.ones(3, 4, dtype=torch.int64)), "must be a floating-point tensor"),
        (lambda: linear_of(x=torch.ones(3, 65)), "cannot hold 65 signs"),
        (lambda: linear_of(scale=torch.ones(3)), r"scale \(3,\) torch.float32 must be \(2,\) torch.float32"),
        (lambda: linear_of(bias=torch.ones(2).double()), r"bias \(2,\) torch.float64 must be \(2,\) torch.float32"),
        (lambda: projection_of(shortcut=torch.ones(2, 3)), r"shortcut \(2, 3\) must be \(3, 'C'\)"),
        (lambda: projection_of(shortcut=torch.ones(3, 3)), "with C a divisor of 2"),
        (lambda: projection_of(shift=torch.ones(3)), r"shift \(3,\) must be \(4,\)"),
    ],
)
def test_bad_input_is_a_clear_error(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def linear_of(**changes: Tensor) -> Tensor:
    given: dict[str, Any] = dict(x=torch.ones(3, 4), words=pack_signs(torch.ones(2, 4)), scale=torch.ones(2))
    return binary_linear(**{**given, **changes})


def projection_of(**changes: Tensor) -> Tensor:
    given: dict[str, Any] = dict(x=torch.ones(3, 4), words=pack_signs(torch.ones(2, 4)), shortcut=torch.ones(3, 2))
    vectors = dict.fromkeys(("scale", "bias", "slope", "offset"), torch.ones(2))
    return binary_projection(**{**given, **vectors, **changes})


def test_explain() -> None:
    words = pack_signs(torch.ones(2, 4))
    assert explain(binary_linear, torch.ones(3, 4), words, torch.ones(2)).startswith("binary_linear: cpu (")
    assert os.environ.get("STRIATE_BACKEND", "") == ""


def test_popcount_is_a_module_with_numba() -> None:
    """What runs by default here: an absent numba would leave its path untested."""
    assert isinstance(cpu._popcount(), ModuleType)


@pytest.mark.parametrize(
    ("capability", "rows", "takes"),
    [("AVX2", 127, False), ("AVX2", 128, True), ("AVX512", 1, True), ("AVX512", 0, False)],
)
def test_few_rows_are_multiplied_as_floats_where_that_is_faster(capability, rows, takes, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu._takes_int8(rows) == takes


@pytest.mark.parametrize(
    ("features", "length", "way"),
    [
        ("+sse4.2,+avx,+avx2", 2**15 - 1, counting.fours),
        ("+sse4.2,+avx,+avx2", 2**15, counting.words),  # more than a 16-bit integer counts
        ("+avx2,+avx512f,-avx512vpopcntdq", 64, counting.fours),
        ("+avx2,+avx512f,+avx512vpopcntdq", 64, counting.words),
        ("+sse4.2,+avx,-avx2", 64, counting.words),
        ("+neon", 64, counting.words),
    ],
)
def test_the_way_of_counting_follows_the_cpu(features, length, way, monkeypatch) -> None:
    monkeypatch.setattr(counting.numba.config, "CPU_FEATURES", features)
    assert counting.best(length) is way
