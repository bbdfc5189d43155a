"""The Triton kernels of packed binary products, in the interpreter, against the products of float64."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import relative
from striate.ops import binary_linear, explain, pack_signs, packed_matmul
from striate.ops.binary import kernels, reference
from striate.ops.binary import triton as path
from triton_tools import OutOfBoundsError, interpreted, metered, mutated, poisoned

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # rounding a result to bfloat16: 2e-3
SIZES = [(5, 7, 1), (3, 65, 63), (1, 1, 64), (70, 67, 130), (9, 5, 320)]  # M, N, K; packing takes 4 words at a time
PACK, COUNT, MULTIPLY = (
    kernels._pack_signs_kernel, kernels._packed_matmul_kernel, kernels._binary_weight_linear_kernel,
)  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def with_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, a third of them zeros of either sign."""
    x = random(*shape, dtype=dtype)
    kind = torch.randint(6, shape, generator=torch.Generator().manual_seed(1))
    return torch.where(kind == 0, torch.tensor(0.0, dtype=dtype), torch.where(kind == 1, -0.0 * x.abs(), x))


def signs(x: Tensor) -> Tensor:
    """Weights as they are packed: zeros count as -1."""
    return torch.where(x > 0, 1.0, -1.0).double()


def layer(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, binary_input: bool = True
) -> Tensor:
    scale = torch.ones(len(weight)) if scale is None else scale
    scale, bias = scale.to(x.dtype), None if bias is None else bias.to(x.dtype)
    words = pack_signs(weight)
    with interpreted(), poisoned():
        return binary_linear(x, words, scale, bias, binary_input=binary_input)


def exact(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product of real numbers in float64, with scale and bias in the dtype of `x`."""
    y = x.double() @ signs(weight).mT * scale.to(x.dtype).double()
    return y if bias is None else y + bias.to(x.dtype).double()


# ---------------------------------------------------------------------------------------------------- binary inputs


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_products_of_words_are_exact(m, n, k) -> None:
    a, b = random(m, k), random(n, k + 1)[:, :k]
    with interpreted(), poisoned():
        got = packed_matmul(pack_signs(a), pack_signs(b), k)
    assert got.dtype == torch.int32
    assert torch.equal(got.double(), signs(a) @ signs(b).mT)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_products_of_binary_inputs_are_exact(m, n, k, dtype) -> None:
    x, weight = with_zeros(m, k, dtype=dtype), random(n, k)
    got, dots = layer(x, weight), torch.sign(x).double() @ signs(weight).mT
    assert got.dtype == dtype
    assert torch.equal(got, dots.to(dtype))
    scale, bias = random(n), random(n + 1)[:n]
    scaled = dots.float() * scale.to(dtype).float()
    assert torch.equal(layer(x, weight, scale), scaled.to(dtype)), "rounded once"
    assert torch.equal(layer(x, weight, scale, bias), (scaled + bias.to(dtype).float()).to(dtype))


def test_what_has_no_sign_counts_as_zero() -> None:
    x = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3e38]])
    weight = torch.eye(8) * 2 - 1
    want = torch.sign(x) @ weight.mT
    assert torch.equal(layer(x, weight), want)
    assert torch.equal(layer(torch.zeros(3, 8), weight), torch.zeros(3, 8))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packing(dtype) -> None:
    for rows, columns in ((11, 300), (8, 64), (1, 1)):
        x = with_zeros(rows, columns, dtype=dtype)
        with interpreted(), poisoned():
            packed, nonzero, counts = path.launch_pack(x)
        assert torch.equal(packed, pack_signs(x))
        assert torch.equal(nonzero, pack_signs(x.abs()))
        assert torch.equal(counts, (x != 0).sum(1, dtype=torch.int32))


# ------------------------------------------------------------------------------------------------------ real inputs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_products_of_real_inputs(m, n, k, dtype) -> None:
    x, weight, scale, bias = with_zeros(m, k, dtype=dtype), random(n, k), random(n), random(n + 1)[:n]
    for added in (None, bias):
        got = layer(x, weight, scale, added, binary_input=False)
        assert got.dtype == dtype
        assert relative(got, exact(x, weight, scale, added)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile(dtype, monkeypatch) -> None:
    x, weight, scale, bias = random(130, 70, dtype=dtype), random(131, 70), random(131), random(132)[:131]
    want, tiles = exact(x, weight, scale, bias), set()
    for programs in (1, path.PROGRAMS):
        monkeypatch.setattr(path, "PROGRAMS", programs)
        with interpreted():
            tiles.add(path.tile_of(x, torch.empty(130, 131))[:2])
        assert relative(layer(x, weight, scale, bias, binary_input=False), want) < TOLERANCE[dtype]
    assert tiles == {tile[:2] for tile in path.TABLE["sm_80"][x.element_size()]}


LOSS = {
    torch.float32: ("tl.trans(value)", "tl.trans(value.to(tl.float16).to(tl.float32))"),
    torch.float16: ("input_precision=PRECISION)", "input_precision=PRECISION).to(tl.float16).to(tl.float32)"),
    torch.bfloat16: ("input_precision=PRECISION)", "input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)"),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_sees_lower_precision(dtype) -> None:
    x, weight = random(16, 1280, dtype=dtype), random(16, 1280)
    want = exact(x, weight, torch.ones(16), None)
    assert relative(layer(x, weight, binary_input=False), want) < TOLERANCE[dtype]
    with mutated(MULTIPLY, *LOSS[dtype]):
        assert relative(layer(x, weight, binary_input=False), want) > TOLERANCE[dtype]


# ----------------------------------------------------------------------------------------------- shapes and layouts


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 5, 70), (0, 70), (2, 0, 70), (3, 0)])
def test_any_shape(shape, binary_input) -> None:
    x, weight = with_zeros(*shape), random(9, shape[-1])
    scale, bias = random(9), random(10)[:9]
    got = layer(x, weight, scale, bias, binary_input)
    want = exact(torch.sign(x) if binary_input else x, weight, scale, bias)
    assert got.shape == (*shape[:-1], 9)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_no_rows_and_no_columns() -> None:
    words = pack_signs(random(5, 70))
    with interpreted():
        assert packed_matmul(words, words[:0], 70).shape == (5, 0)
        assert packed_matmul(words[:0], words, 70).shape == (0, 5)
        assert binary_linear(random(3, 70), words[:0], torch.ones(0)).shape == (3, 0)


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize(
    "x", [with_zeros(5, 7, 140)[..., 70:], with_zeros(5, 70, 7).mT, with_zeros(70, 9).T, with_zeros(9, 140)[:, ::2],
          with_zeros(1, 70).expand(9, 70)],
    ids=["part of the channels", "channels outside", "transposed", "every other", "expanded"],
)  # fmt: skip
def test_any_layout(x, binary_input) -> None:
    weight, pairs = random(9, 70), torch.stack([random(9), random(10)[:9]], 1)
    got = layer(x, weight, pairs[:, 0], pairs[:, 1], binary_input)
    assert torch.equal(got, layer(x.contiguous(), weight, *pairs.T.contiguous(), binary_input))
    strided = torch.stack([pack_signs(weight)] * 2, -1)[..., 0]
    with interpreted():
        again = binary_linear(x, strided, pairs[:, 0], pairs[:, 1], binary_input=binary_input)
        assert torch.equal(again, got)
        assert torch.equal(packed_matmul(strided, strided, 70), packed_matmul(pack_signs(weight), strided, 70))


@pytest.mark.parametrize("binary_input", [True, False])
def test_rows_more_than_2_to_the_31_elements_apart(binary_input) -> None:
    """Memory that nothing touches lies between the rows."""
    stride, weight = 2**30 + 8, random(5, 70)
    x = torch.empty(2 * stride + 70, dtype=torch.float16).as_strided((3, 70), (stride, 1))
    x.copy_(with_zeros(3, 70))
    assert torch.equal(layer(x, weight, binary_input=binary_input), layer(x.clone(), weight, binary_input=binary_input))
    kernel = PACK if binary_input else MULTIPLY
    with mutated(kernel, "row.to(tl.int64) * row_stride", "row * row_stride"), pytest.raises(OutOfBoundsError):
        layer(x, weight, binary_input=binary_input)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packing_reads_once(dtype) -> None:
    x = with_zeros(11, 300, dtype=dtype)
    with interpreted(), metered() as meter:
        packed, nonzero, counts = path.launch_pack(x)
    assert (meter.read_counts(x) == 1).all()
    assert all((meter.write_counts(t) == 1).all() for t in (packed, nonzero, counts))
    assert meter.bytes_read == x.numel() * x.element_size()
    assert meter.bytes_written == (2 * packed.numel() * 8) + counts.numel() * 4


def test_words_are_read_once_per_tile() -> None:
    a, b = pack_signs(random(130, 140)), pack_signs(random(70, 140))
    with interpreted(), metered() as meter:
        out = path.launch_packed_matmul(a, b, 140)
    assert (meter.read_counts(a) == 2).all()
    assert (meter.read_counts(b) == 3).all()
    assert (meter.write_counts(out) == 1).all()


@pytest.mark.parametrize("binary_input", [True, False])
def test_nothing_is_unpacked_in_memory(binary_input) -> None:
    x, words, scale = with_zeros(130, 140), pack_signs(random(70, 140)), random(70)
    with interpreted(), metered() as meter:
        out = path.launch_binary_linear(x, words, scale, scale, binary_input)
    assert (meter.read_counts(x) == (1 if binary_input else 2)).all()
    assert (meter.read_counts(words if binary_input else words.view(torch.int32)) == 3).all()
    assert (meter.read_counts(scale) == 2 * 3).all()
    assert (meter.write_counts(out) == 1).all()
    planes = 2 * 130 * 3 * 8 + 130 * 4
    assert meter.bytes_written == out.numel() * 4 + (planes if binary_input else 0)


# --------------------------------------------------------------------------------------------------------- mutations

POPCOUNT, PACKED, UNPACK, AFFINE = kernels._popcount, kernels._pack, kernels._unpack, kernels._affine
MUTATIONS: list[tuple[bool, Any, str, str]] = [
    (True, PACK, "(column < columns)[None, :]", "(column < 64 * words)[None, :]"),  # the tail is not masked
    (True, PACK, "positive | _pack(value < 0.0, ROWS, WORDS)", "positive"),  # negative ones count as zeros
    (True, PACK, "count += ", "count = "),  # the last words' alone
    (True, PACK, "value > 0.0", "value >= 0.0"),
    (True, PACK, "tl.store(signs + place, positive", "tl.store(signs + place, either"),
    (True, PACK, "tl.store(nonzero + place, either", "tl.store(nonzero + place, positive"),
    (True, PACKED, "tl.arange(0, 64)", "(63 - tl.arange(0, 64))"),
    (True, POPCOUNT, "x = (x & 0x3333", "x = (x & 0x3313"),
    (True, POPCOUNT, "(x + (x >> 4))", "x"),
    (True, COUNT, "if ACTIVATIONS:\n            bits &=", "if False:\n            bits &="),  # no plane of zeros
    (True, COUNT, "range(words)", "range(words - 1)"),
    (True, COUNT, "tl.load(weights + word,", "tl.load(weights + words - 1 - word,"),
    (True, COUNT, "- 2 * differ\n        result = _affine", "- differ\n        result = _affine"),
    (True, COUNT, "^ tl.load", "& tl.load"),
    (True, COUNT, "tl.load(counts + row, mask=there, other=0)[:, None]", "length"),
    (True, AFFINE, "total *= ", "total += 0 * "),  # no scale
    (True, AFFINE, "if bias is not None", "if False"),
    (False, AFFINE, "total *= ", "total += 0 * "),
    (False, AFFINE, "if bias is not None", "if False"),
    (False, AFFINE, "bias + column", "scale + column"),
    (False, MULTIPLY, "& (k < depth)[None, :]", "& (k < depth + row_stride)[None, :]"),  # into the next row
    (False, MULTIPLY, "range(words)", "range(words - 1)"),
    (False, MULTIPLY, "2 * word + half", "half"),  # the first word every time
    (False, MULTIPLY, "!= 0, 1.0, -1.0", "!= 0, 1.0, 0.0"),
    (False, UNPACK, "8 * tl.arange(0, 4)", "8 * (3 - tl.arange(0, 4))"),
    (False, UNPACK, "x >> 4", "x >> 5"),
    (False, UNPACK, "x >> 2", "x >> 1"),
    (False, UNPACK, "x >> 1)", "x >> 2)"),
]


def _mutant(binary_input: bool) -> tuple[Tensor, Tensor]:
    """A layer, computed where a row is followed by more numbers; and what it should be."""
    x, weight, scale, bias = with_zeros(6, 600)[:, :298], random(7, 298), random(7), random(8)[:7]
    want = exact(torch.sign(x) if binary_input else x, weight, scale, bias)
    x = torch.cat([x, random(6, 302).abs() + 1], 1)[:, :298]
    with contextlib.suppress(OutOfBoundsError):
        return layer(x, weight, scale, bias, binary_input), want
    return want * float("nan"), want


@pytest.mark.parametrize("binary_input", [True, False])
def test_the_kernels_of_the_mutations_are_right_without_them(binary_input) -> None:
    assert relative(*_mutant(binary_input)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("binary_input", "kernel", "old", "new"), MUTATIONS)
def test_the_comparison_sees_a_wrong_kernel(binary_input, kernel, old, new) -> None:
    with mutated(kernel, old, new):
        assert relative(*_mutant(binary_input)) > 1e-3


def test_a_wrong_length_of_words_is_seen() -> None:
    a, b = random(5, 130), random(7, 130)
    want = signs(a) @ signs(b).mT
    for old, new in (("length - 2", "length - 1"), ("word * step", "0 * step")):
        with mutated(COUNT, old, new), interpreted():
            assert not torch.equal(packed_matmul(pack_signs(a), pack_signs(b), 130).double(), want)


@pytest.mark.parametrize(
    ("binary_input", "kernel", "old", "new"),
    [
        (True, PACK, "row < rows", "row < rows + 1"),
        (True, PACK, "word < words", "word < words + 1"),
        (True, COUNT, "row < rows, column", "row < rows + 1, column"),
        (True, COUNT, "column < columns", "column < columns + 1"),
        (True, COUNT, "range(words)", "range(words + 1)"),
        (False, MULTIPLY, "row < rows, column", "row < rows + 1, column"),
        (False, MULTIPLY, "column < columns", "column < columns + 1"),
        (False, MULTIPLY, "range(words)", "range(words + 1)"),
        (False, MULTIPLY, "k < depth", "k <= depth"),
    ],
)
def test_a_tile_that_ends_late_is_seen(binary_input, kernel, old, new) -> None:
    with mutated(kernel, old, new), pytest.raises(OutOfBoundsError):
        layer(random(5, 70), random(7, 70), binary_input=binary_input)


# ---------------------------------------------------------------------------------------------------------- operators


def arguments(binary_input: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    scale, bias = random(9, dtype=dtype), random(10, dtype=dtype)[:9]
    return with_zeros(2, 3, 70, dtype=dtype), pack_signs(random(9, 70)), scale, bias, binary_input


class Layers(torch.nn.Module):
    """Both kinds of layers and a product of words."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", pack_signs(random(70, 70)))
        self.register_buffer("scale", random(70))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale.to(x.dtype)
        y = binary_linear(x, self.words, scale, scale)
        y = binary_linear(y, self.words, scale, binary_input=False)
        return y, packed_matmul(self.words, self.words[:5], 70)


@pytest.mark.parametrize("binary_input", [True, False])
def test_opcheck(binary_input) -> None:
    ops, (x, words, *rest) = torch.ops.striate, arguments(binary_input)
    with interpreted():
        torch.library.opcheck(ops.binary_linear.default, (x, words, *rest))
        torch.library.opcheck(ops.binary_linear.default, (x.mT.contiguous().mT, words, rest[0], None, binary_input))
        torch.library.opcheck(ops.packed_matmul.default, (words, words[:4], 70))


@pytest.mark.parametrize("inside", [contextlib.nullcontext, interpreted], ids=["plain", "kernels"])
@pytest.mark.parametrize("binary_input", [True, False])
def test_traces_know_the_layout(binary_input, inside) -> None:
    x, words, *rest = arguments(binary_input)
    fake = torch._subclasses.FakeTensorMode()
    for t in (x, x[0, 0], x.transpose(0, 1), x.new_empty(70, 9).T, x[:0]):
        with inside():
            real = torch.ops.striate.binary_linear(t, words, *rest), torch.ops.striate.packed_matmul(words, words, 70)
        with fake:
            traced = [fake.from_tensor(a) if isinstance(a, Tensor) else a for a in (t, words, *rest)]
            made = torch.ops.striate.binary_linear(*traced), torch.ops.striate.packed_matmul(traced[1], traced[1], 70)
        for a, b in zip(real, made, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_compiles_whole_for_changing_sizes() -> None:
    torch.compiler.reset()
    module = Layers()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with interpreted(), torch.no_grad():
        for n in (4, 7):
            for got, want in zip(compiled(with_zeros(n, 70)), module(with_zeros(n, 70)), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_programs_run_without_triton(dtype) -> None:
    x = with_zeros(2, 3, 70, dtype=dtype)
    with interpreted():
        program = torch.export.export(Layers(), (x,))
        want = Layers()(x)
    called = {str(node.target) for node in program.graph.nodes}
    assert {"striate.binary_linear.default", "striate.packed_matmul.default"} <= called
    got = program.module()(x)
    assert relative(got[0], want[0]) < TOLERANCE[dtype]
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("binary_input", [True, False])
def test_a_gradient_is_refused(binary_input) -> None:
    x, words, scale, bias, _ = arguments(binary_input)
    with interpreted():
        y = binary_linear(x.requires_grad_(), words, scale, bias, binary_input=binary_input)
        with pytest.raises(RuntimeError, match="for inference, they have no gradient; train the model before"):
            y.sum().backward()


def test_which_inputs_take_the_kernels() -> None:
    x, words, scale, bias, _ = arguments(True)

    def call(x: Tensor) -> Tensor:
        return binary_linear(x, words, scale.to(x.dtype), bias.to(x.dtype))

    with interpreted():
        assert explain(binary_linear, x, words, scale, bias) == "binary_linear: triton (a cpu tensor)"
        assert explain(packed_matmul, words, words, 70) == "packed_matmul: triton (a cpu tensor)"
        wide = x.double(), words, scale.double(), bias.double()
        assert explain(binary_linear, *wide) == "binary_linear: reference (no kernel for torch.float64)"
        assert torch.equal(call(x.double()), reference.binary_linear(*wide, True))
        assert torch.equal(torch.vmap(call)(x), call(x))
