"""Parts of rows in the registers of a GPU, for ``kernels.cache.pooling``: 16-byte loads where width and alignment allow them.

A part is ``size`` float32 in registers. If the width is a multiple of 4, a lane has 4 elements side by side, and the next 4 a
tile further on; else single elements, a tile apart. Elements beyond the width are carried along and never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from hps_numba.kernels.cache.pooling import NO_ROW, THREADS, fits_shared, pool_lanes
from hps_numba.kernels.compiler.numba_cuda import intrinsic, types
from hps_numba.kernels.dtypes import FLOAT32
from hps_numba.kernels.simt.cuda_dtypes import BYTES, bits_of, floats_of, load, store

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


def _shuffle(builder: Any, shape: _Shape, value: Any, number: Any, register: str) -> Any:
    """32 bits of lane ``number`` of the tile: a number that is known takes no register."""
    kind = ir.FunctionType(value.type, [value.type, _32])
    text = f"shfl.sync.idx.b32 $0, $1, $2, {(32 - shape.lanes) << 8 | 31}, -1;"
    call = ir.InlineAsm(kind, text, f"={register},{register},r", side_effect=True)
    return builder.call(call, [value, number], attrs=("convergent",))


def _of_lane(shape: _Shape, kind: Any, register: str) -> Any:
    """An intrinsic that gives what another lane of the tile has, of 32 bits."""

    @intrinsic
    def of_lane(typingctx, value, number):
        def codegen(context, builder, signature, args):
            return _shuffle(builder, shape, args[0], builder.trunc(args[1], _32), register)

        return kind(kind, _INT), codegen

    return of_lane


def _known(number: int) -> Any:
    """An intrinsic that gives a number which the compiler knows."""

    @intrinsic
    def known(typingctx):
        def codegen(context, builder, signature, args):
            return ir.Constant(_64, number)

        return _INT(), codegen

    return known


def _in_registers(shape: _Shape, row_of_lane: Any, load_stored: Any) -> dict[str, Any]:
    """Four rows in flight, each lane's part of them in registers."""
    kind = types.UniTuple(_FLOAT, _IN_FLIGHT * shape.size)

    def pack(builder, values):
        four = ir.Constant(ir.ArrayType(_F32, len(values)), ir.Undefined)
        for i, value in enumerate(values):
            four = builder.insert_value(four, value, i)
        return four

    @intrinsic
    def new_four(typingctx, number):
        def codegen(context, builder, signature, args):
            return pack(builder, [_constant(0.0)] * (_IN_FLIGHT * shape.size))

        return kind(_INT), codegen

    @intrinsic
    def load_four(typingctx, four, rows, row, number):
        def codegen(context, builder, signature, args):
            rows = [row_of_lane(builder, args, d) for d in range(_IN_FLIGHT)]
            return pack(builder, [value for row in rows for value in shape.unpack(builder, load_stored(builder, *row))])

        return kind(kind, _INT, types.int32, _INT), codegen

    @intrinsic
    def part_of(typingctx, four, d):
        def codegen(context, builder, signature, args):
            four, d = args
            values = [builder.extract_value(four, i) for i in range(_IN_FLIGHT * shape.size)]
            chosen = values[-shape.size :]
            for i in reversed(range(_IN_FLIGHT - 1)):
                it = builder.icmp_signed("==", d, ir.Constant(_64, i))
                part = values[shape.size * i : shape.size * (i + 1)]
                chosen = [builder.select(it, value, other) for value, other in zip(part, chosen, strict=True)]
            return shape.pack(builder, chosen)

        return shape.type(kind, _INT), codegen

    @intrinsic
    def await_four(typingctx, later):
        def codegen(context, builder, signature, args):
            return context.get_dummy_value()

        return types.void(_INT), codegen

    return {"new_four": new_four, "load_four": load_four, "part_of": part_of, "await_four": await_four}


def _in_shared(shape: _Shape, row_of_lane: Any, load_stored: Any) -> dict[str, Any]:
    """Four rows in flight to shared memory, where each lane reads what it asked for: in the meantime they take no registers.

    ``cp.async.cg``, which brings 16 bytes from the second-level cache (PTX ISA, "cp.async"): the first-level cache is not
    coherent. A room has places of 16 bytes: for each row, each access of it and each thread.
    """
    access = 16 * THREADS
    place = access * shape.accesses
    room = _IN_FLIGHT * place
    four_floats = ir.LiteralStructType([_F32] * 4)

    @intrinsic
    def new_four(typingctx, number):
        def codegen(context, builder, signature, args):
            module, name = builder.module, "rows_in_flight"
            memory = module.globals.get(name)
            if memory is None:
                memory = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), 2 * room), name, addrspace=3)
                memory.linkage, memory.align = "internal", 16
                memory.initializer = ir.Constant(memory.value_type, ir.Undefined)
            thread = _asm(builder, _32, "mov.u32 $0, %tid.x;", "=r", [], volatile=False)
            offset = builder.mul(builder.trunc(args[0], _32), ir.Constant(_32, room))
            offset = builder.add(offset, builder.mul(thread, ir.Constant(_32, 16)))
            return builder.add(builder.ptrtoint(memory, _32), offset)

        return types.int32(_INT), codegen

    @intrinsic
    def load_four(typingctx, four, rows, row, number):
        def codegen(context, builder, signature, args):
            text = "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.cg.shared.global [$0], [$1], 16; }"
            found = [row_of_lane(builder, args, d) for d in range(_IN_FLIGHT)]
            for d, (row, there) in enumerate(found):
                for number, (element, inside) in enumerate(shape.places(builder, there)):
                    source = builder.add(row, builder.mul(element, ir.Constant(_64, 4)))
                    target = builder.add(args[0], ir.Constant(_32, place * d + access * number))
                    _asm(builder, ir.VoidType(), text, "r,l,r,~{memory}", [target, source, inside], volatile=True)
            _asm(builder, ir.VoidType(), "cp.async.commit_group;", "~{memory}", [], volatile=True)
            return args[0]

        return types.int32(types.int32, _INT, types.int32, _INT), codegen

    @intrinsic
    def part_of(typingctx, four, d):
        def codegen(context, builder, signature, args):
            source = builder.add(args[0], builder.mul(builder.trunc(args[1], _32), ir.Constant(_32, place)))
            values = []
            for number in range(shape.accesses):
                at = builder.add(source, ir.Constant(_32, access * number))
                text = "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];"
                got = _asm(builder, four_floats, text, "=f,=f,=f,=f,r,~{memory}", [at], volatile=True)
                values += [builder.extract_value(got, i) for i in range(4)]
            return shape.pack(builder, values)

        return shape.type(types.int32, _INT), codegen

    @intrinsic
    def await_four(typingctx, later):
        def codegen(context, builder, signature, args):
            _asm(builder, ir.VoidType(), "cp.async.wait_group $0;", "n,~{memory}", [args[0]], volatile=True)
            return context.get_dummy_value()

        return types.void(_INT), codegen

    return {"new_four": new_four, "load_four": load_four, "part_of": part_of, "await_four": await_four}


def _loads(shape: _Shape, stored: int, scale_at: int, row_stride: int, copies: bool) -> dict[str, Any]:
    def is_above(builder, source, least):
        return builder.icmp_unsigned(">", source, ir.Constant(_64, least))

    def load_stored(builder, source, wanted):
        scale = None
        if scale_at:
            address = builder.add(source, ir.Constant(_64, scale_at))
            (bits,) = load(builder, "gpu", 4, address, builder.zext(wanted, _32))
            scale = builder.bitcast(bits, _F32)
        return shape.pack(builder, shape.load(builder, "gpu", stored, source, wanted, scale))

    def row_of_lane(builder, args, d):
        """``(address, is there)`` of the row that lane ``number + d`` found; ``args``: of ``load_four``."""
        _four, rows, row, number = args
        place = builder.add(builder.trunc(number, _32), ir.Constant(_32, d))
        found = _shuffle(builder, shape, row, place, "r")
        offset = builder.mul(builder.zext(found, _64), ir.Constant(_64, row_stride))
        return builder.add(rows, offset), builder.icmp_signed("!=", found, ir.Constant(_32, NO_ROW))

    @intrinsic
    def load_part(typingctx, part, source):
        def codegen(context, builder, signature, args):
            return load_stored(builder, args[1], is_above(builder, args[1], 0))

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

    in_flight = _in_shared if copies and fits_shared(shape.dim, stored) else _in_registers
    return {
        "steps_of_tile": _opaque(shape.lanes) if shape.lanes > 2 * _IN_FLIGHT else _known(shape.lanes),
        "word_of_lane": _of_lane(shape, types.int32, "r"),
        "float_of_lane": _of_lane(shape, _FLOAT, "f"),
        "load_part": load_part,
        **in_flight(shape, row_of_lane, load_stored),
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
    def turned_part(typingctx, part):
        def codegen(context, builder, signature, args):
            return each(builder, args, lambda value: builder.bitcast(builder.not_(builder.bitcast(value, _32)), _F32))

        return shape.type(shape.type), codegen

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
    def sum_part(typingctx, sums, part):
        def codegen(context, builder, signature, args):
            return each(builder, args, lambda old, value: _float(builder, "add", old, value))

        return shape.type(shape.type, shape.type), codegen

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
        "turned_part": turned_part,
        "fill_part": fill_part,
        "add_part": add_part,
        "sum_part": sum_part,
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


def pool_names(constants: dict[str, Any], out_vector: bool, copies: bool) -> dict[str, Any]:
    """What takes the place of names of ``cache.pooling`` on a GPU; ``out_vector``: answers are 16-byte aligned; ``copies``: the
    chip copies to shared memory by itself."""
    shape = _Shape(constants["DIM"])
    numbers = {"POOL_LANES": shape.lanes, "POOL_TILES": 32 // shape.lanes, "POOL_DEPTH": _IN_FLIGHT, "POOL_MANY": True}
    loads = _loads(shape, constants["ROW_TYPE"], constants["SCALE_AT"], constants["ROW_STRIDE"], copies)
    return numbers | loads | _sums(shape, constants["OUT_TYPE"], out_vector) | _arithmetic()
