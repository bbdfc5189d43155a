"""Instructions that numba does not offer by itself, for the kernels in `counting.py` and `popcount.py`.

`Bytes` are 32 bytes in a vector register. Positions in an array count its elements in memory order, unchecked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

_I8, _I32 = ir.IntType(8), ir.IntType(32)
_VECTOR, _HALF = ir.VectorType(_I8, 32), ir.VectorType(_I8, 16)
_SCALARS = {"float32": ir.FloatType(), "float64": ir.DoubleType()}


class _Bytes(types.Type):
    """Numba's type of 32 bytes."""

    def __init__(self) -> None:
        super().__init__("Bytes")


_bytes = _Bytes()


@register_model(_Bytes)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, _VECTOR)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, position: Any, to: ir.Type) -> Any:
    """Where `array`, of type `kind`, has the element at `position`."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [position]), to.as_pointer())


@intrinsic
def count_ones(context: Any, word: Any) -> Any:
    """Number of ones of an unsigned integer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return word(word), generate


@intrinsic
def signs_of_eight(context: Any, x: Any, i: Any, y: Any, j: Any) -> Any:
    """Two bytes: their bits tell which of `x[i : i + 8] + y[j : j + 8]` are positive, and which are either sign."""
    eight = ir.VectorType(_SCALARS[x.dtype.name], 8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = (_pointer(context, builder, signature.args[k], args[k], args[k + 1], eight) for k in (0, 2))
        total, zero = builder.fadd(*(builder.load(p, align=1) for p in pointers)), ir.Constant(eight, None)
        found = [builder.bitcast(builder.fcmp_ordered(order, total, zero), _I8) for order in (">", "!=")]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.uint8, 2)(x, types.intp, y, types.intp), generate


@intrinsic
def no_bytes(context: Any) -> Any:
    """32 zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_VECTOR, None)

    return _bytes(), generate


@intrinsic
def load(context: Any, array: Any, i: Any) -> Any:
    """Bytes `array[i : i + 32]`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], args[0], args[1], _VECTOR), align=1)

    return _bytes(array, types.intp), generate


@intrinsic
def load_twice(context: Any, array: Any, i: Any) -> Any:
    """Bytes `array[i : i + 16]` in both halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = builder.load(_pointer(context, builder, signature.args[0], args[0], args[1], _HALF), align=1)
        return builder.shuffle_vector(half, half, ir.Constant(ir.VectorType(_I32, 32), 2 * [*range(16)]))

    return _bytes(array, types.intp), generate


@intrinsic
def take_twice(context: Any, array: Any, i: Any, j: Any, both: Any, upper: Any) -> Any:
    """`array[i : i + 32] -= 2 x` and `array[j : j + 32] -= 2 y`, of 16-bit integers, for numbers of 0 to 255.

    `both` has bytes `x + 16 y`, and `upper` the sum of `sixteenth` of what was added up there, modulo 256. Of the two
    bytes in a word, the first is of the first 16 numbers, the second of the others.
    """
    word = ir.VectorType(ir.IntType(16), 16)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(word, [value] * 16)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def less_sixteen_times(number: Any, taken: Any) -> Any:  # modulo 256
            return builder.and_(builder.sub(number, builder.shl(taken, constant(4))), constant(255))

        both, upper = (builder.bitcast(number, word) for number in args[3:])
        y1 = builder.lshr(upper, constant(8))  # nothing but `y` was shifted into the second byte
        x1 = less_sixteen_times(builder.lshr(both, constant(8)), y1)
        y0 = less_sixteen_times(upper, x1)  # and `x` from the second into the first
        x0 = less_sixteen_times(both, y0)
        for position, parts in ((args[1], (x0, x1)), (args[2], (y0, y1))):
            for k, part in enumerate(parts):
                ahead = builder.add(position, ir.Constant(position.type, 16 * k))
                pointer = _pointer(context, builder, signature.args[0], args[0], ahead, word)
                total = builder.sub(builder.load(pointer, align=2), builder.shl(part, constant(1)))
                builder.store(total, pointer, align=2)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, _bytes, _bytes), generate


@intrinsic
def add_tables(context: Any, to: Any, i: Any, table: Any, j: Any, k: Any) -> Any:
    """`to[i : i + 16] = table[j : j + 16] + table[k : k + 16]`, of bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sources = (_pointer(context, builder, signature.args[2], args[2], at, _HALF) for at in args[3:])
        total = builder.add(*(builder.load(source, align=1) for source in sources))
        builder.store(total, _pointer(context, builder, signature.args[0], args[0], args[1], _HALF), align=1)
        return context.get_dummy_value()

    return types.none(to, types.intp, table, types.intp, types.intp), generate


@intrinsic
def plus_looked_up(context: Any, total: Any, table: Any, index: Any) -> Any:
    """`total + table[index]` byte by byte: 16 entries in each half of `table`, numbers of 0 to 15 in `index`. AVX2."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR])
        shuffle = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pshuf.b")
        return builder.add(args[0], builder.call(shuffle, args[1:]))

    return _bytes(_bytes, _bytes, _bytes), generate


@intrinsic
def plus(context: Any, a: Any, b: Any) -> Any:
    """`a + b` byte by byte, modulo 256."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(*args)

    return _bytes(_bytes, _bytes), generate


@intrinsic
def sixteenth(context: Any, x: Any) -> Any:
    """Words of two bytes divided by 16: cheaper than bytes, of which AVX2 shifts none."""
    word = ir.VectorType(ir.IntType(16), 16)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shifted = builder.lshr(builder.bitcast(args[0], word), ir.Constant(word, [4] * 16))
        return builder.bitcast(shifted, _VECTOR)

    return _bytes(_bytes), generate


@intrinsic
def expect_write(context: Any, array: Any, i: Any) -> Any:
    """Have the cache line of `array[i]` at hand when it is written; nothing happens if there is no such element."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _I8)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, _I32(1), _I32(2), _I32(1)])  # write, soon again, data
        return context.get_dummy_value()

    return types.none(array, types.intp), generate
