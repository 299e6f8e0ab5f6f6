"""Parts of rows in the registers of a GPU, and arithmetic on them: ``cache.parts`` but for what loads them.

A part is ``size`` float32 in registers. If the width is a multiple of 4, a lane has 4 elements side by side, and the next 4 a
tile further on; else single elements, a tile apart. Elements beyond the width are carried along and never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from hps_numba.kernels.compiler.numba_cuda import intrinsic, types
from hps_numba.kernels.layouts.pooling import pool_lanes
from hps_numba.kernels.simt.cuda_dtypes import BYTES, bits_of, floats_of
from hps_numba.kernels.simt.ptx import asm, load, rounded, store

__all__ = ["Shape", "arithmetic_names", "part_names", "sum_names"]

_64, _32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_INT, _FLOAT = types.int64, types.float32


class Shape:
    """Which elements of a row the lanes of a tile have."""

    def __init__(self, dim: int) -> None:
        self.dim, self.lanes = dim, pool_lanes(dim)
        self.together = 4 if dim % 4 == 0 else 1  # elements of one access
        self.accesses = -(-dim // (self.lanes * self.together))
        self.size = self.accesses * self.together
        self.type = types.UniTuple(_FLOAT, self.size)
        self.kind = ir.ArrayType(_F32, self.size)

    def places(self, builder: Any, active: Any) -> list[tuple[Any, Any]]:
        """``(first element, is inside the row and active)`` of each access of this lane."""
        lane = asm(builder, _32, "mov.u32 $0, %laneid;", "=r", [], volatile=False)
        lane = builder.and_(lane, ir.Constant(_32, self.lanes - 1))
        found = []
        for number in range(self.accesses):
            element = builder.mul(builder.add(lane, ir.Constant(_32, self.lanes * number)), ir.Constant(_32, self.together))
            inside = active
            if (number + 1) * self.lanes * self.together > self.dim:
                inside = builder.and_(inside, builder.icmp_unsigned("<", element, ir.Constant(_32, self.dim)))
            found.append((builder.zext(element, _64), builder.zext(inside, _32)))
        return found

    def load(self, builder: Any, scope: str, stored: int, source: Any, active: Any, scale: Any) -> list[Any]:
        """The part of a row, as float32 values."""
        size = BYTES[stored]
        values = []
        for element, inside in self.places(builder, active):
            address = builder.add(source, builder.mul(element, ir.Constant(_64, size)))
            loaded = load(builder, scope, size * self.together, address, inside)
            values += floats_of(builder, stored, loaded, self.together, scale, any_nan=True)
        return values

    def store(self, builder: Any, out: int, vector: bool, target: Any, values: list[Any]) -> None:
        """Write the elements of an answer that lie inside the row."""
        size, together = BYTES[out], self.together if vector else 1
        for number, (element, inside) in enumerate(self.places(builder, ir.Constant(ir.IntType(1), 1))):
            address = builder.add(target, builder.mul(element, ir.Constant(_64, size)))
            for i in range(0, self.together, together):
                first = number * self.together + i
                words = bits_of(builder, out, values[first : first + together])
                store(builder, "", size * together, builder.add(address, ir.Constant(_64, size * i)), words, inside)

    def unpack(self, builder: Any, part: Any) -> list[Any]:
        """The values of a part."""
        return [builder.extract_value(part, i) for i in range(self.size)]

    def pack(self, builder: Any, values: list[Any]) -> Any:
        """A part of values."""
        part = ir.Constant(self.kind, ir.Undefined)
        for i, value in enumerate(values):
            part = builder.insert_value(part, value, i)
        return part

    def each(self, builder: Any, parts: Any, do: Callable[..., Any]) -> Any:
        """A part of what ``do`` makes of the values of parts, element by element."""
        columns = zip(*(self.unpack(builder, part) for part in parts), strict=True)
        return self.pack(builder, [do(*values) for values in columns])


def part_names(shape: Shape, out: int, vector: bool) -> dict[str, Any]:
    """Parts made, inverted and stored, by their names in ``cache.parts``.

    ``out``: type of answers.   ``vector``: they are 16-byte aligned.
    """

    @intrinsic
    def new_part(typingctx):
        def codegen(context, builder, signature, args):
            return shape.pack(builder, [ir.Constant(_F32, 0.0)] * shape.size)

        return shape.type(), codegen

    @intrinsic
    def fill_part(typingctx, part, value):
        def codegen(context, builder, signature, args):
            return shape.pack(builder, [args[1]] * shape.size)

        return shape.type(shape.type, _FLOAT), codegen

    @intrinsic
    def inverted_part(typingctx, part):
        def codegen(context, builder, signature, args):
            return shape.each(builder, args, lambda value: builder.bitcast(builder.not_(builder.bitcast(value, _32)), _F32))

        return shape.type(shape.type), codegen

    @intrinsic
    def put_part(typingctx, target, sums):
        def codegen(context, builder, signature, args):
            shape.store(builder, out, vector, args[0], shape.unpack(builder, args[1]))
            return context.get_dummy_value()

        return types.void(_INT, shape.type), codegen

    return {"new_part": new_part, "fill_part": fill_part, "inverted_part": inverted_part, "put_part": put_part}


def sum_names(shape: Shape) -> dict[str, Any]:
    """Sums and maxima of parts, by their names in ``cache.parts``."""

    @intrinsic
    def add_part(typingctx, sums, part, weight):
        def codegen(context, builder, signature, args):
            def add(old, value):
                return rounded(builder, "add", old, rounded(builder, "mul", value, args[2]))

            return shape.each(builder, args[:2], add)

        return shape.type(shape.type, shape.type, _FLOAT), codegen

    @intrinsic
    def sum_part(typingctx, sums, part):
        def codegen(context, builder, signature, args):
            return shape.each(builder, args, lambda old, value: rounded(builder, "add", old, value))

        return shape.type(shape.type, shape.type), codegen

    @intrinsic
    def max_part(typingctx, sums, part):
        def codegen(context, builder, signature, args):
            def larger(old, value):
                taken = builder.or_(builder.fcmp_ordered(">", value, old), builder.fcmp_unordered("uno", value, value))
                return builder.select(taken, value, old)

            return shape.each(builder, args, larger)

        return shape.type(shape.type, shape.type), codegen

    @intrinsic
    def divide_part(typingctx, sums, divisor):
        def codegen(context, builder, signature, args):
            return shape.each(builder, args[:1], lambda value: rounded(builder, "div", value, args[1]))

        return shape.type(shape.type, _FLOAT), codegen

    return {"add_part": add_part, "sum_part": sum_part, "max_part": max_part, "divide_part": divide_part}


def arithmetic_names() -> dict[str, Any]:
    """Rounded operations on float32, by their names in ``cache.parts``."""

    def two(operation: str) -> Any:
        @intrinsic
        def operation_of(typingctx, a, b):
            def codegen(context, builder, signature, args):
                return rounded(builder, operation, *args)

            return _FLOAT(_FLOAT, _FLOAT), codegen

        return operation_of

    @intrinsic
    def root_rounded(typingctx, a):
        def codegen(context, builder, signature, args):
            return rounded(builder, "sqrt", args[0])

        return _FLOAT(_FLOAT), codegen

    return {
        "multiply_rounded": two("mul"),
        "add_rounded": two("add"),
        "divide_rounded": two("div"),
        "root_rounded": root_rounded,
    }
