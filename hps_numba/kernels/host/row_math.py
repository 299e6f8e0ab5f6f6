"""Arithmetic on whole rows in raw memory, as numba intrinsics on addresses.

Vectors are written out: of a loop over floats at addresses, LLVM does not know that they do not overlap. Every operation is
rounded by itself (nothing is fused), so that the same bits come out with vectors of any width.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hps_numba.kernels.host.atomics import pieces, pointer

__all__ = ["adam_row", "add_to_row", "step_row", "sum_of_squares"]

_WORD = ir.IntType(64)
_FLOAT = ir.FloatType()
_INT, _REAL = types.int64, types.float32
_LANES = 16


def _load(builder, address, offset, floats):
    return builder.load(pointer(builder, builder.add(address, offset), ir.VectorType(_FLOAT, floats)), align=4)


def _store(builder, value, address, offset):
    builder.store(value, pointer(builder, builder.add(address, offset), value.type), align=4)


def _splat(builder, value, floats):
    vector = ir.VectorType(_FLOAT, floats)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), _numbers(0 for _ in range(floats)))


def _numbers(numbers):
    numbers = list(numbers)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(numbers)), numbers)


def _roots(builder, vector):
    kind = ir.FunctionType(vector.type, [vector.type])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.sqrt.v{vector.type.count}f32")
    return builder.call(function, [vector])


@intrinsic
def add_to_row(typingctx, target, source, size):
    """Add a row to another; ``size`` in bytes."""

    def codegen(context, builder, signature, args):
        target, source, size = args

        def piece(offset, floats):
            total = builder.fadd(_load(builder, target, offset, floats), _load(builder, source, offset, floats))
            _store(builder, total, target, offset)

        pieces(builder, size, piece)
        return context.get_dummy_value()

    return types.void(_INT, _INT, _INT), codegen


@intrinsic
def step_row(typingctx, new, old, gradient, factor, size):
    """``new = old - factor * gradient``, rows at addresses; ``size`` in bytes."""

    def codegen(context, builder, signature, args):
        new, old, gradient, factor, size = args

        def piece(offset, floats):
            step = builder.fmul(_splat(builder, factor, floats), _load(builder, gradient, offset, floats))
            _store(builder, builder.fsub(_load(builder, old, offset, floats), step), new, offset)

        pieces(builder, size, piece)
        return context.get_dummy_value()

    return types.void(_INT, _INT, _INT, _REAL, _INT), codegen


@intrinsic
def adam_row(typingctx, new, old, gradient, state, old_state, rate, epsilon, forget, forget_squares, size):
    """A step of Adam on a row; a state is the row of means and, behind it, that of squares. ``size`` of a row, in bytes."""

    def codegen(context, builder, signature, args):
        new, old, gradient, state, old_state, rate, epsilon, forget, forget_squares, size = args

        def moved(value, to, share):
            return builder.fadd(value, builder.fmul(builder.fsub(to, value), share))

        def piece(offset, floats):
            behind = builder.add(size, offset)
            some = _load(builder, gradient, offset, floats)
            mean = moved(_load(builder, old_state, offset, floats), some, _splat(builder, forget, floats))
            square = _load(builder, old_state, behind, floats)
            square = moved(square, builder.fmul(some, some), _splat(builder, forget_squares, floats))
            _store(builder, mean, state, offset)
            _store(builder, square, state, behind)
            root = _roots(builder, square)
            step = builder.fmul(_splat(builder, rate, floats), mean)
            step = builder.fdiv(step, builder.fadd(root, _splat(builder, epsilon, floats)))
            _store(builder, builder.fsub(_load(builder, old, offset, floats), step), new, offset)

        pieces(builder, size, piece)
        return context.get_dummy_value()

    return types.void(_INT, _INT, _INT, _INT, _INT, _REAL, _REAL, _REAL, _REAL, _INT), codegen


@intrinsic
def sum_of_squares(typingctx, row, size):
    """Sum of the squares of a row of ``size`` bytes: sixteen sums of every sixteenth element, added in halves.

    What is left behind whole sixteens is cut into eight, four, two and one; each piece goes to the first of the sums.
    """

    def codegen(context, builder, signature, args):
        row, size = args
        vector = ir.VectorType(_FLOAT, _LANES)
        zeros = ir.Constant(vector, [0.0] * _LANES)
        with builder.goto_entry_block():
            sums = builder.alloca(vector)
        builder.store(zeros, sums)

        def piece(offset, floats):
            some = _load(builder, row, offset, floats)
            some = builder.fmul(some, some)
            if floats < _LANES:
                wide = _numbers(min(lane, floats) for lane in range(_LANES))
                some = builder.shuffle_vector(some, ir.Constant(some.type, [0.0] * floats), wide)
            builder.store(builder.fadd(builder.load(sums), some), sums)

        pieces(builder, size, piece)
        total = builder.load(sums)
        half = _LANES // 2
        while half:
            low, high = (
                builder.shuffle_vector(total, ir.Constant(total.type, ir.Undefined), _numbers(range(start, start + half)))
                for start in (0, half)
            )
            total = builder.fadd(low, high)
            half //= 2
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return _REAL(_INT, _INT), codegen
