"""Pooled lookups on a GPU: how parts of rows are loaded, several rows in flight; 16-byte loads where the width allows them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from hps_numba.kernels.compiler.numba_cuda import intrinsic, types
from hps_numba.kernels.dtypes import FLOAT32
from hps_numba.kernels.layouts.pooling import DEFAULT_ROW, NO_ROW, THREADS, fits_shared
from hps_numba.kernels.simt.cuda_parts import Shape, arithmetic_names, part_names, sum_names
from hps_numba.kernels.simt.ptx import asm, load, opaque, shuffled

__all__ = ["pool_names"]

_64, _32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_INT, _FLOAT = types.int64, types.float32
_IN_FLIGHT = 4


class _StoredRows:
    """Rows as a cache stores them, in code that is being built."""

    def __init__(self, shape: Shape, stored: int, scale_at: int, row_stride: int) -> None:
        self._shape, self._stored, self._scale_at, self._stride = shape, stored, scale_at, row_stride

    def load(self, builder: Any, source: Any, active: Any) -> Any:
        """The part of the row at ``source``; undefined if not ``active``."""
        scale = None
        if self._scale_at:
            address = builder.add(source, ir.Constant(_64, self._scale_at))
            (bits,) = load(builder, "gpu", 4, address, builder.zext(active, _32))
            scale = builder.bitcast(bits, _F32)
        return self._shape.pack(builder, self._shape.load(builder, "gpu", self._stored, source, active, scale))

    def of_lane(self, builder: Any, args: Any, d: int) -> tuple[Any, Any]:
        """``(address, exists)`` of the row that lane ``number + d`` found; ``args``: of ``load_four``."""
        _four, rows, row, number = args
        lane = builder.add(builder.trunc(number, _32), ir.Constant(_32, d))
        found = shuffled(builder, row, lane, self._shape.lanes)
        offset = builder.mul(builder.zext(found, _64), ir.Constant(_64, self._stride))
        return builder.add(rows, offset), builder.icmp_signed("!=", found, ir.Constant(_32, NO_ROW))


def _number(number: int, *, known: bool) -> Any:
    """An intrinsic that gives a number which the compiler knows, or does not."""

    @intrinsic
    def give(typingctx):
        def codegen(context, builder, signature, args):
            return ir.Constant(_64, number) if known else opaque(builder, number, _64)

        return _INT(), codegen

    return give


def _of_lane(shape: Shape, kind: Any) -> Any:
    """An intrinsic that gives what another lane of the tile has, of 32 bits."""

    @intrinsic
    def of_lane(typingctx, value, number):
        def codegen(context, builder, signature, args):
            return shuffled(builder, args[0], builder.trunc(args[1], _32), shape.lanes)

        return kind(kind, _INT), codegen

    return of_lane


def _in_registers(shape: Shape, rows: _StoredRows) -> dict[str, Any]:
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
            return pack(builder, [ir.Constant(_F32, 0.0)] * (_IN_FLIGHT * shape.size))

        return kind(_INT), codegen

    @intrinsic
    def load_four(typingctx, four, start, row, number):
        def codegen(context, builder, signature, args):
            found = [rows.of_lane(builder, args, d) for d in range(_IN_FLIGHT)]
            return pack(builder, [value for row in found for value in shape.unpack(builder, rows.load(builder, *row))])

        return kind(kind, _INT, types.int32, _INT), codegen

    @intrinsic
    def part_of(typingctx, four, d):
        def codegen(context, builder, signature, args):
            four, d = args
            values = [builder.extract_value(four, i) for i in range(_IN_FLIGHT * shape.size)]
            chosen = values[-shape.size :]
            for i in reversed(range(_IN_FLIGHT - 1)):
                is_it = builder.icmp_signed("==", d, ir.Constant(_64, i))
                part = values[shape.size * i : shape.size * (i + 1)]
                chosen = [builder.select(is_it, value, other) for value, other in zip(part, chosen, strict=True)]
            return shape.pack(builder, chosen)

        return shape.type(kind, _INT), codegen

    @intrinsic
    def await_four(typingctx, later):
        def codegen(context, builder, signature, args):
            return context.get_dummy_value()

        return types.void(_INT), codegen

    return {"new_four": new_four, "load_four": load_four, "part_of": part_of, "await_four": await_four}


def _in_shared(shape: Shape, rows: _StoredRows) -> dict[str, Any]:
    """Four rows in flight to shared memory, where each lane reads what it requested: meanwhile they take no registers.

    ``cp.async.cg``, which brings 16 bytes from the second-level cache (PTX ISA, "cp.async"): the first-level cache is not
    coherent. A buffer has places of 16 bytes: for each row, each access to it and each thread.
    """
    access = 16 * THREADS
    place = access * shape.accesses
    buffer = _IN_FLIGHT * place
    four_floats = ir.LiteralStructType([_F32] * 4)

    @intrinsic
    def new_four(typingctx, number):
        def codegen(context, builder, signature, args):
            module, name = builder.module, "rows_in_flight"
            memory = module.globals.get(name)
            if memory is None:
                memory = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), 2 * buffer), name, addrspace=3)
                memory.linkage, memory.align = "internal", 16
                memory.initializer = ir.Constant(memory.value_type, ir.Undefined)
            thread = asm(builder, _32, "mov.u32 $0, %tid.x;", "=r", [], volatile=False)
            offset = builder.mul(builder.trunc(args[0], _32), ir.Constant(_32, buffer))
            offset = builder.add(offset, builder.mul(thread, ir.Constant(_32, 16)))
            return builder.add(builder.ptrtoint(memory, _32), offset)

        return types.int32(_INT), codegen

    @intrinsic
    def load_four(typingctx, four, start, row, number):
        def codegen(context, builder, signature, args):
            text = "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.cg.shared.global [$0], [$1], 16; }"
            found = [rows.of_lane(builder, args, d) for d in range(_IN_FLIGHT)]
            for d, (row, exists) in enumerate(found):
                for number, (element, inside) in enumerate(shape.places(builder, exists)):
                    source = builder.add(row, builder.mul(element, ir.Constant(_64, 4)))
                    target = builder.add(args[0], ir.Constant(_32, place * d + access * number))
                    asm(builder, ir.VoidType(), text, "r,l,r,~{memory}", [target, source, inside])
            asm(builder, ir.VoidType(), "cp.async.commit_group;", "~{memory}", [])
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
                loaded = asm(builder, four_floats, text, "=f,=f,=f,=f,r,~{memory}", [at])
                values += [builder.extract_value(loaded, i) for i in range(4)]
            return shape.pack(builder, values)

        return shape.type(types.int32, _INT), codegen

    @intrinsic
    def await_four(typingctx, later):
        def codegen(context, builder, signature, args):
            asm(builder, ir.VoidType(), "cp.async.wait_group $0;", "n,~{memory}", [args[0]])
            return context.get_dummy_value()

        return types.void(_INT), codegen

    return {"new_four": new_four, "load_four": load_four, "part_of": part_of, "await_four": await_four}


def _load_names(shape: Shape, rows: _StoredRows) -> dict[str, Any]:
    """Loads of one row, from the cache and from host memory."""

    def is_above(builder, source, number):
        return builder.icmp_unsigned(">", source, ir.Constant(_64, number))

    @intrinsic
    def load_part(typingctx, part, source):
        def codegen(context, builder, signature, args):
            return rows.load(builder, args[1], is_above(builder, args[1], 0))

        return shape.type(shape.type, _INT), codegen

    @intrinsic
    def host_part(typingctx, part, source, default):
        def codegen(context, builder, signature, args):
            part, source, default = args
            has_row = is_above(builder, source, DEFAULT_ROW)
            loaded = shape.load(builder, "sys", FLOAT32, source, has_row, None)
            keep = builder.icmp_unsigned("==", source, ir.Constant(_64, 0))
            values = [
                builder.select(keep, old, builder.select(has_row, new, default))
                for old, new in zip(shape.unpack(builder, part), loaded, strict=True)
            ]
            return shape.pack(builder, values)

        return shape.type(shape.type, _INT, _FLOAT), codegen

    return {"load_part": load_part, "host_part": host_part}


def _await_names(shape: Shape) -> dict[str, Any]:
    """Waits for loads, and the choice of one of four parts."""

    def await_all(context, builder, signature, parts):
        """A fence that is hardly ever executed, but whose condition needs every element: loads are issued in order."""
        mixed = ir.Constant(_32, 0)
        for part in parts:
            for value in shape.unpack(builder, part):
                mixed = builder.xor(mixed, builder.bitcast(value, _32))
        text = "{ .reg .pred p; setp.eq.u32 p, $0, 0x9E3779B9; @p fence.acq_rel.gpu; }"
        asm(builder, ir.VoidType(), text, "r,~{memory}", [mixed])
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

    return {"await_part": await_part, "await_parts": await_parts, "pick_part": pick_part}


def pool_names(constants: dict[str, Any], out_vector: bool, copies: bool) -> dict[str, Any]:
    """The functions of ``cache.parts`` and the constants of ``cache.pooling`` on a GPU, by name.

    ``out_vector``: answers are 16-byte aligned.   ``copies``: the chip copies to shared memory asynchronously.
    """
    shape = Shape(constants["DIM"])
    rows = _StoredRows(shape, constants["ROW_TYPE"], constants["SCALE_AT"], constants["ROW_STRIDE"])
    in_flight = _in_shared if copies and fits_shared(shape.dim, constants["ROW_TYPE"]) else _in_registers
    return {
        "POOL_LANES": shape.lanes,
        "POOL_TILES": 32 // shape.lanes,
        "POOL_DEPTH": _IN_FLIGHT,
        "POOL_MANY": True,
        "rows_in_flight": _number(_IN_FLIGHT, known=False),
        "steps_of_tile": _number(shape.lanes, known=shape.lanes <= 2 * _IN_FLIGHT),
        "word_of_lane": _of_lane(shape, types.int32),
        "float_of_lane": _of_lane(shape, _FLOAT),
        **_load_names(shape, rows),
        **_await_names(shape),
        **in_flight(shape, rows),
        **part_names(shape, constants["OUT_TYPE"], out_vector),
        **sum_names(shape),
        **arithmetic_names(),
    }
