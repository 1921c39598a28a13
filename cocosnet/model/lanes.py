"""Sixteen numbers at once inside numba's kernels: the few vector operations that its compiler does not find by itself.

A value of `LANES` numbers (float32 or int32) is one AVX-512 register, two of AVX2, four of NEON; LLVM divides it as
the machine at hand needs. Memory is addressed by a pointer and an index into it, unchecked, so callers own the bounds,
and keep the array alive. (Arrays themselves would be counted, atomically, wherever they are passed on: that took most
of the time.) A set of lanes is an int64 with one bit a lane, lane 0 lowest.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from cocosnet.model.quick import LANES

LINE = 16  # float32 numbers that come into a processor's cache together
_WORD = {types.float32: ir.FloatType(), types.int32: ir.IntType(32)}
_LOOSE = ("contract", "reassoc", "nsz")  # sums may be reordered; NaN and infinity keep their meaning


class Vector(types.Type):
    """The type of LANES numbers of one dtype."""

    def __init__(self, dtype: types.Type):
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")

    @property
    def llvm(self) -> ir.VectorType:
        """How LLVM calls it."""
        return ir.VectorType(_WORD[self.dtype], LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector: Vector):
        super().__init__(manager, vector, vector.llvm)


FLOATS, INTS = Vector(types.float32), Vector(types.int32)


@intrinsic
def pointer(_typing, array):
    """Where a contiguous array begins; the pointer can be indexed."""

    def generate(context, builder, signature, values):
        return context.make_array(signature.args[0])(context, builder, value=values[0]).data

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def advanced(_typing, array, index):
    """The pointer to array[index]."""

    def generate(_context, builder, _signature, values):
        return builder.gep(values[0], [values[1]])

    return array(array, types.intp), generate


@intrinsic
def load(_typing, array, index):
    """array[index : index + LANES]; `array` is a pointer here and below."""

    def generate(context, builder, signature, values):
        return builder.load(_place(builder, signature, values), align=4)

    return Vector(array.dtype)(array, types.intp), generate


@intrinsic
def store(_typing, array, index, vector):
    """array[index : index + LANES] = vector."""

    def generate(context, builder, signature, values):
        builder.store(values[2], _place(builder, signature, values), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def fetch_ahead(_typing, array, index):
    """Have the cache line of array[index] brought near, which is about to be read; nothing waits for it."""

    def generate(context, builder, _signature, values):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.bitcast(builder.gep(values[0], [values[1]]), byte)
        builder.call(function, [place, word(0), word(3), word(1)])  # to be read, into the nearest cache, as data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def splat(_typing, number):
    """LANES times the same number."""

    def generate(_context, builder, signature, values):
        return _splat(builder, signature.return_type.llvm, values[0])

    return Vector(number)(number), generate


def _elementwise(operation: Callable) -> Callable:
    """An intrinsic of two vectors: `operation(builder, a, b)` gives the result."""

    @intrinsic
    def function(_typing, a, b):
        def generate(_context, builder, _signature, values):
            return operation(builder, *values)

        return a(a, b), generate

    return function


subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b))
add = _elementwise(lambda builder, a, b: builder.fadd(a, b))
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b))
# Of an unordered pair (NaN) both give b.
largest = _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
smallest = _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))


@intrinsic
def add_product(_typing, total, a, b):
    """total + a * b, rounded once where the processor can."""

    def generate(_context, builder, _signature, values):
        product = builder.fmul(values[1], values[2], flags=("contract",))
        return builder.fadd(values[0], product, flags=("contract",))

    return total(total, a, b), generate


@intrinsic
def number_pixels(_typing, ys, xs, columns):
    """Row * columns + column of rounded, whole positions: INTS of two FLOATS and an int32."""

    def generate(_context, builder, signature, values):
        rows, places = (builder.fptosi(v, INTS.llvm) for v in values[:2])
        return builder.add(builder.mul(rows, _splat(builder, INTS.llvm, values[2])), places)

    return INTS(ys, xs, types.int32), generate


@intrinsic
def equal(_typing, a, b):
    """The set of lanes in which two vectors are equal."""

    def generate(_context, builder, signature, values):
        compare = builder.fcmp_ordered if signature.args[0] == FLOATS else builder.icmp_signed
        return _set(builder, compare("==", *values))

    return types.int64(a, b), generate


@intrinsic
def greater(_typing, a, b):
    """The set of lanes in which a > b."""

    def generate(_context, builder, _signature, values):
        return _set(builder, builder.fcmp_ordered(">", *values))

    return types.int64(a, b), generate


@intrinsic
def replace(_typing, vector, lane, number):
    """The vector with another number in one lane.

    By comparison: LLVM would make a plain insertion into memory a store of four bytes, and the next read of the whole
    vector would have to wait for it.
    """

    def generate(_context, builder, signature, values):
        numbers = ir.Constant(INTS.llvm, list(range(LANES)))
        lane = _splat(builder, INTS.llvm, builder.trunc(values[1], ir.IntType(32)))
        other = _splat(builder, signature.return_type.llvm, values[2])
        return builder.select(builder.icmp_signed("==", numbers, lane), other, values[0])

    return vector(vector, types.intp, vector.dtype), generate


@intrinsic
def choose(_typing, lanes, a, b):
    """a in the lanes of a set, b in the others."""

    def generate(_context, builder, _signature, values):
        bits = builder.trunc(values[0], ir.IntType(LANES))
        return builder.select(builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES)), *values[1:])

    return a(types.int64, a, b), generate


@intrinsic
def held(_typing, ys, xs, own, own_ys, own_xs):
    """The set of lanes whose (y, x) is, bit by bit, one of own[own_ys : + LANES], own[own_xs : + LANES]."""

    def generate(_context, builder, _signature, values):
        y, x = (builder.bitcast(v, INTS.llvm) for v in values[:2])
        found = ir.Constant(ir.VectorType(ir.IntType(1), LANES), None)
        for lane in range(LANES):
            mine = []
            for start in values[3:]:
                at = builder.gep(values[2], [builder.add(start, ir.Constant(start.type, lane))])
                word = builder.load(builder.bitcast(at, ir.IntType(32).as_pointer()))
                mine.append(_splat(builder, INTS.llvm, word))
            differ = builder.or_(builder.xor(y, mine[0]), builder.xor(x, mine[1]))
            found = builder.or_(found, builder.icmp_signed("==", differ, ir.Constant(INTS.llvm, None)))
        return _set(builder, found)

    return types.int64(ys, xs, own, types.intp, types.intp), generate


@intrinsic
def least(_typing, vector):
    """The smallest of the numbers."""

    def generate(_context, builder, _signature, values):
        return _reduce(builder, "fmin", values[0])

    return types.float32(vector), generate


@intrinsic
def total(_typing, vector):
    """The sum of the numbers, halves added to halves: an order that no compiler may change."""

    def generate(_context, builder, _signature, values):
        rest, width = values[0], LANES
        while width > 1:
            width //= 2
            halves = [
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(start, start + width)))
                for start in (0, width)
            ]
            rest = builder.fadd(*(builder.shuffle_vector(rest, rest, half) for half in halves))
        return builder.extract_element(rest, ir.Constant(ir.IntType(32), 0))

    return types.float32(vector), generate


@intrinsic
def first(_typing, lanes):
    """The lowest lane of a set that is not empty."""

    def generate(_context, builder, _signature, values):
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def count(_typing, lanes):
    """How many lanes a set has."""

    def generate(_context, builder, _signature, values):
        return builder.ctpop(values[0])

    return types.int64(types.int64), generate


@intrinsic
def dot(_typing, a, at, b, place, blocks):
    """Sum over c < LANES * len(blocks) of a[at + c] * b[place + c]."""

    def generate(context, builder, signature, values):
        first_of, second_of = (_reader(builder, values[n]) for n in (0, 2))
        total = ir.Constant(FLOATS.llvm, None)
        for block in range(signature.args[4].count):
            product = builder.fmul(first_of(values[1], block), second_of(values[3], block), flags=_LOOSE)
            total = builder.fadd(total, product, flags=_LOOSE)
        return _reduce(builder, "fadd", total)

    return types.float32(a, types.intp, b, types.intp, blocks), generate


@intrinsic
def blended_dots(_typing, a, at, b, places, weights, blocks):
    """Of the sum over four n of weights[n] * b[places[n] + c], for c < LANES * len(blocks): its products with a[at + c]
    and its squares, each summed over c."""

    def generate(context, builder, signature, values):
        first_of, second_of = (_reader(builder, values[n]) for n in (0, 2))
        places, weights = (cgutils.unpack_tuple(builder, v, 4) for v in values[3:5])
        weights = [_splat(builder, FLOATS.llvm, weight) for weight in weights]
        totals = [ir.Constant(FLOATS.llvm, None)] * 2
        for block in range(signature.args[5].count):
            blend = ir.Constant(FLOATS.llvm, None)
            for place, weight in zip(places, weights):
                product = builder.fmul(weight, second_of(place, block), flags=_LOOSE)
                blend = builder.fadd(blend, product, flags=_LOOSE)
            products = [builder.fmul(factor, blend, flags=_LOOSE) for factor in (first_of(values[1], block), blend)]
            totals = [builder.fadd(total, product, flags=_LOOSE) for total, product in zip(totals, products)]
        sums = [_reduce(builder, "fadd", total) for total in totals]
        return context.make_tuple(builder, signature.return_type, sums)

    four = types.UniTuple(types.intp, 4), types.UniTuple(types.float32, 4)
    return types.UniTuple(types.float32, 2)(a, types.intp, b, *four, blocks), generate


def _place(builder, signature, values) -> ir.Value:
    """Where the vector at a pointer (first argument) plus an index (second) lies."""
    vector = Vector(signature.args[0].dtype).llvm
    return builder.bitcast(builder.gep(values[0], [values[1]]), vector.as_pointer())


def _reader(builder, base: ir.Value) -> Callable[[ir.Value, int], ir.Value]:
    """Reads vector number `block` from an index of a pointer on."""

    def read(index: ir.Value, block: int) -> ir.Value:
        at = builder.gep(base, [builder.add(index, ir.Constant(index.type, LANES * block))])
        return builder.load(builder.bitcast(at, FLOATS.llvm.as_pointer()), align=4)

    return read


def _splat(builder, vector: ir.VectorType, number: ir.Value) -> ir.Value:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    )


def _set(builder, flags: ir.Value) -> ir.Value:
    return builder.zext(builder.bitcast(flags, ir.IntType(LANES)), ir.IntType(64))


def _reduce(builder, operation: str, vector: ir.Value) -> ir.Value:
    """LLVM's sum ("fadd") or minimum ("fmin") of a vector."""
    word, inputs = vector.type.element, [vector.type]
    arguments = [vector]
    if operation == "fadd":
        inputs, arguments = [word, *inputs], [ir.Constant(word, -0.0), vector]
    name = f"llvm.vector.reduce.{operation}.v{LANES}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, inputs), name)
    flags = _LOOSE if operation == "fadd" else ("nnan", "nsz")
    return builder.call(function, arguments, fastmath=flags)
