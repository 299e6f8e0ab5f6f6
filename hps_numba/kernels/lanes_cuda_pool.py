"""Parts of rows in the registers of a GPU, for ``cache_pool``: 16-byte loads where width and alignment allow them.

A part is ``size`` float32 in registers. If the width is a multiple of 4, a lane has 4 elements side by side, and the next 4 a
tile further on; else single elements, a tile apart. Elements beyond the width are carried along and never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from hps_numba.kernels.cache_pool import pool_lanes
from hps_numba.kernels.lanes_cuda_types import BYTES, bits_of, floats_of, load, store
from hps_numba.kernels.numba_cuda import intrinsic, types
from hps_numba.kernels.row_elements import FLOAT32

__all__ = ["pool_names"]

_64, _32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_INT, _FLOAT = types.int64, types.float32
_IN_FLIGHT = 4


def _asm(builder: Any, result: Any, text: str, constraints: str, args: list[Any], *, volatile: bool) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=volatile), args)


def _float(builder: Any, operation: str, *args: Any) -> Any:
    """One rounded operation: what says how it is rounded is not joined with another (PTX ISA, "mad/fma")."""
    constraints = ",".join(["=f"] + ["f"] * len(args))
    places = ", ".join(f"${i + 1}" for i in range(len(args)))
    return _asm(builder, _F32, f"{operation}.rn.f32 $0, {places};", constraints, list(args), volatile=False)


def _constant(value: float) -> Any:
    return ir.Constant(_F32, value)


class _Shape:
    """Which elements of a row the lanes of a tile have."""

    def __init__(self, dim: int) -> None:
        self.dim, self.lanes = dim, pool_lanes(dim)
        self.together = 4 if dim % 4 == 0 else 1  # elements of one access
        self.accesses = -(-dim // (self.lanes * self.together))
        self.size = self.accesses * self.together
        self.type = types.UniTuple(_FLOAT, self.size)
        self.kind = ir.ArrayType(_F32, self.size)

    def places(self, builder: Any, wanted: Any) -> list[tuple[Any, Any]]:
        """``(first element, is inside the row and wanted)`` of each access of this lane."""
        lane = _asm(builder, _32, "mov.u32 $0, %laneid;", "=r", [], volatile=False)
        lane = builder.and_(lane, ir.Constant(_32, self.lanes - 1))
        found = []
        for number in range(self.accesses):
            element = builder.mul(builder.add(lane, ir.Constant(_32, self.lanes * number)), ir.Constant(_32, self.together))
            inside = wanted
            if (number + 1) * self.lanes * self.together > self.dim:
                inside = builder.and_(inside, builder.icmp_unsigned("<", element, ir.Constant(_32, self.dim)))
            found.append((builder.zext(element, _64), builder.zext(inside, _32)))
        return found

    def load(self, builder: Any, scope: str, stored: int, source: Any, wanted: Any, scale: Any) -> list[Any]:
        """The part of a row, as float32 values."""
        size = BYTES[stored]
        values = []
        for element, inside in self.places(builder, wanted):
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


def _opaque(number: int) -> Any:
    """An intrinsic that gives a number which the compiler does not know."""

    @intrinsic
    def unknown(typingctx):
        def codegen(context, builder, signature, args):
            return _asm(builder, _64, f"mov.u64 $0, {number};", "=l", [], volatile=True)

        return _INT(), codegen

    return unknown


def _loads(shape: _Shape, stored: int, scale_at: int) -> dict[str, Any]:
    def is_above(builder, source, least):
        return builder.icmp_unsigned(">", source, ir.Constant(_64, least))

    @intrinsic
    def load_part(typingctx, part, source):
        def codegen(context, builder, signature, args):
            wanted = is_above(builder, args[1], 0)
            scale = None
            if scale_at:
                address = builder.add(args[1], ir.Constant(_64, scale_at))
                (bits,) = load(builder, "gpu", 4, address, builder.zext(wanted, _32))
                scale = builder.bitcast(bits, _F32)
            return shape.pack(builder, shape.load(builder, "gpu", stored, args[1], wanted, scale))

        return shape.type(shape.type, _INT), codegen

    @intrinsic
    def behind_part(typingctx, part, source, default):
        def codegen(context, builder, signature, args):
            part, source, default = args
            wanted = is_above(builder, source, 1)
            loaded = shape.load(builder, "sys", FLOAT32, source, wanted, None)
            known = builder.icmp_unsigned("==", source, ir.Constant(_64, 0))
            values = [
                builder.select(known, old, builder.select(wanted, new, default))
                for old, new in zip(shape.unpack(builder, part), loaded, strict=True)
            ]
            return shape.pack(builder, values)

        return shape.type(shape.type, _INT, _FLOAT), codegen

    def await_all(context, builder, signature, parts):
        """A fence that is hardly ever executed, but whose condition needs every element: loads are issued in order."""
        mixed = ir.Constant(_32, 0)
        for part in parts:
            for value in shape.unpack(builder, part):
                mixed = builder.xor(mixed, builder.bitcast(value, _32))
        text = "{ .reg .pred p; setp.eq.u32 p, $0, 0x9E3779B9; @p fence.acq_rel.gpu; }"
        _asm(builder, ir.VoidType(), text, "r,~{memory}", [mixed], volatile=True)
        return context.get_dummy_value()

    @intrinsic
    def await_part(typingctx, part):
        return types.void(shape.type), await_all

    @intrinsic
    def await_parts(typingctx, first, second, third, fourth):
        """Of different parts: equal ones would cancel out."""
        return types.void(*[shape.type] * _IN_FLIGHT), await_all

    @intrinsic
    def pick_part(typingctx, first, second, third, fourth, number):
        def codegen(context, builder, signature, args):
            *parts, last = (shape.unpack(builder, part) for part in args[:-1])
            for i, part in reversed(list(enumerate(parts))):
                chosen = builder.icmp_signed("==", args[-1], ir.Constant(_64, i))
                last = [builder.select(chosen, value, other) for value, other in zip(part, last, strict=True)]
            return shape.pack(builder, last)

        return shape.type(*[shape.type] * _IN_FLIGHT, _INT), codegen

    return {
        "steps_of_tile": _opaque(shape.lanes),
        "load_part": load_part,
        "behind_part": behind_part,
        "await_part": await_part,
        "await_parts": await_parts,
        "pick_part": pick_part,
        "rows_in_flight": _opaque(_IN_FLIGHT),
    }


def _sums(shape: _Shape, out: int, vector: bool) -> dict[str, Any]:
    def each(builder, parts, do: Callable[..., Any]):
        columns = zip(*(shape.unpack(builder, part) for part in parts), strict=True)
        return shape.pack(builder, [do(*values) for values in columns])

    @intrinsic
    def new_part(typingctx):
        def codegen(context, builder, signature, args):
            return shape.pack(builder, [_constant(0.0)] * shape.size)

        return shape.type(), codegen

    @intrinsic
    def fill_part(typingctx, part, value):
        def codegen(context, builder, signature, args):
            return shape.pack(builder, [args[1]] * shape.size)

        return shape.type(shape.type, _FLOAT), codegen

    @intrinsic
    def add_part(typingctx, sums, part, weight):
        def codegen(context, builder, signature, args):
            def add(old, value):
                return _float(builder, "add", old, _float(builder, "mul", value, args[2]))

            return each(builder, args[:2], add)

        return shape.type(shape.type, shape.type, _FLOAT), codegen

    @intrinsic
    def max_part(typingctx, sums, part):
        def codegen(context, builder, signature, args):
            def larger(old, value):
                taken = builder.or_(builder.fcmp_ordered(">", value, old), builder.fcmp_unordered("uno", value, value))
                return builder.select(taken, value, old)

            return each(builder, args, larger)

        return shape.type(shape.type, shape.type), codegen

    @intrinsic
    def divide_part(typingctx, sums, divisor):
        def codegen(context, builder, signature, args):
            return each(builder, args[:1], lambda value: _float(builder, "div", value, args[1]))

        return shape.type(shape.type, _FLOAT), codegen

    @intrinsic
    def put_part(typingctx, target, sums):
        def codegen(context, builder, signature, args):
            shape.store(builder, out, vector, args[0], shape.unpack(builder, args[1]))
            return context.get_dummy_value()

        return types.void(_INT, shape.type), codegen

    return {
        "new_part": new_part,
        "fill_part": fill_part,
        "add_part": add_part,
        "max_part": max_part,
        "divide_part": divide_part,
        "put_part": put_part,
    }


def _arithmetic() -> dict[str, Any]:
    def two(operation: str) -> Any:
        @intrinsic
        def rounded(typingctx, a, b):
            def codegen(context, builder, signature, args):
                return _float(builder, operation, *args)

            return _FLOAT(_FLOAT, _FLOAT), codegen

        return rounded

    @intrinsic
    def root_rounded(typingctx, a):
        def codegen(context, builder, signature, args):
            return _float(builder, "sqrt", args[0])

        return _FLOAT(_FLOAT), codegen

    return {
        "multiply_rounded": two("mul"),
        "add_rounded": two("add"),
        "divide_rounded": two("div"),
        "root_rounded": root_rounded,
    }


def pool_names(constants: dict[str, Any], out_vector: bool) -> dict[str, Any]:
    """What takes the place of names of ``cache_pool`` on a GPU; ``out_vector``: answers are 16-byte aligned."""
    shape = _Shape(constants["DIM"])
    numbers = {"POOL_LANES": shape.lanes, "POOL_TILES": 32 // shape.lanes, "POOL_DEPTH": _IN_FLIGHT, "POOL_MANY": True}
    loads = _loads(shape, constants["ROW_TYPE"], constants["SCALE_AT"])
    return numbers | loads | _sums(shape, constants["OUT_TYPE"], out_vector) | _arithmetic()
