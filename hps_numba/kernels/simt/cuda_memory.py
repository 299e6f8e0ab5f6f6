"""Memory operations of ``simt.reference`` for a GPU, as PTX (``simt.ptx`` says why)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from hps_numba.kernels.compiler.numba_cuda import intrinsic, make_array, populate_array, types
from hps_numba.kernels.simt.ptx import asm

__all__ = ["instruction", "load_two_words", "memory_names"]

_64, _32, _16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
_VOID = ir.VoidType()
_INT = types.int64
LOCAL_WORDS = 16  # maximum of ``local_words``
#: type of a register by its letter in constraints
_REGISTERS = {"l": _64, "r": _32, "h": _16}


def _widened(builder: Any, value: Any) -> Any:
    return value if value.type == _64 else builder.zext(value, _64)


def _narrowed(builder: Any, value: Any, register: str) -> Any:
    return value if register == "l" else builder.trunc(value, _REGISTERS[register])


def _load(text: str, register: str = "l") -> Any:
    """``ld`` of one value, widened to int64."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            loaded = asm(builder, _REGISTERS[register], f"{text} $0, [$1];", f"={register},l,~{{memory}}", list(args))
            return _widened(builder, loaded)

        return _INT(_INT), codegen

    return load


def _store(text: str, register: str = "l") -> Any:
    """``st`` of the low bits of an int64."""

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            value = _narrowed(builder, args[1], register)
            asm(builder, _VOID, f"{text} [$0], $1;", f"l,{register},~{{memory}}", [args[0], value])
            return context.get_dummy_value()

        return types.void(_INT, _INT), codegen

    return store


def load_two_words(text: str) -> Any:
    """``ld`` of 16 bytes as two int64."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            kind = ir.LiteralStructType([_64, _64])
            loaded = asm(builder, kind, f"{text} {{$0, $1}}, [$2];", "=l,=l,l,~{memory}", list(args))
            both = context.get_constant_undef(signature.return_type)
            both = builder.insert_value(both, builder.extract_value(loaded, 0), 0)
            return builder.insert_value(both, builder.extract_value(loaded, 1), 1)

        return types.UniTuple(_INT, 2)(_INT), codegen

    return load


def _atomic(text: str, register: str = "l", operands: int = 1) -> Any:
    """``atom`` with one or two operands; returns what was there."""

    def codegen(context, builder, signature, args):
        values = [_narrowed(builder, arg, register) for arg in args[1:]]
        places = ", ".join(f"${i + 2}" for i in range(operands))
        constraints = f"={register},l,{','.join([register] * operands)},~{{memory}}"
        old = asm(builder, _REGISTERS[register], f"{text} $0, [$1], {places};", constraints, [args[0], *values])
        return _widened(builder, old)

    if operands == 1:

        @intrinsic
        def atomic(typingctx, address, value):
            return _INT(_INT, _INT), codegen

        return atomic

    @intrinsic
    def compare_and_swap(typingctx, address, expected, value):
        return _INT(_INT, _INT, _INT), codegen

    return compare_and_swap


def instruction(text: str) -> Any:
    """An instruction without operands; none if there is no text."""

    @intrinsic
    def do(typingctx):
        def codegen(context, builder, signature, args):
            if text:
                asm(builder, _VOID, text, "~{memory}", [])
            return context.get_dummy_value()

        return types.void(), codegen

    return do


@intrinsic
def _local_words(typingctx, count):
    kind = types.Array(_INT, 1, "C")

    def codegen(context, builder, signature, args):
        words = cgutils.alloca_once(builder, ir.ArrayType(_64, LOCAL_WORDS))
        array = make_array(kind)(context, builder)
        eight = context.get_constant(types.intp, 8)
        first = builder.bitcast(words, _64.as_pointer())
        populate_array(array, data=first, shape=[args[0]], strides=[eight], itemsize=eight, meminfo=None)
        return array._getvalue()

    return kind(_INT), codegen


@intrinsic
def _float_bits(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], _32), _64)

    return _INT(types.float32), codegen


@intrinsic
def _bits_float(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], _32), _F32)

    return types.float32(_INT), codegen


@intrinsic
def _clock_ns(typingctx):
    def codegen(context, builder, signature, args):
        return asm(builder, _64, "mov.u64 $0, %globaltimer;", "=l,~{memory}", [])

    return _INT(), codegen


def memory_names() -> dict[str, Any]:
    """Loads, stores, atomic operations and fences by their names in ``simt.reference``."""
    return {
        "ld64": _load("ld.relaxed.gpu.global.b64"),
        "ld64_host": _load("ld.relaxed.sys.global.b64"),
        "st64_host": _store("st.relaxed.sys.global.b64"),
        "ld32": _load("ld.relaxed.gpu.global.b32", "r"),
        "ld16": _load("ld.relaxed.gpu.global.u16", "h"),
        "ld8": _load("ld.relaxed.gpu.global.u8", "h"),
        "st64": _store("st.relaxed.gpu.global.b64"),
        "st32": _store("st.relaxed.gpu.global.b32", "r"),
        "st16": _store("st.global.b16", "h"),
        "st8": _store("st.global.b8", "h"),
        "cas32": _atomic("atom.relaxed.gpu.global.cas.b32", "r", 2),
        "cas64": _atomic("atom.relaxed.gpu.global.cas.b64", "l", 2),
        "add32": _atomic("atom.relaxed.gpu.global.add.u32", "r"),
        "add64": _atomic("atom.relaxed.gpu.global.add.u64"),
        "min64": _atomic("atom.relaxed.gpu.global.min.s64"),
        "max64": _atomic("atom.relaxed.gpu.global.max.s64"),
        "fence": instruction("fence.acq_rel.gpu;"),
        "fence_host": instruction("fence.acq_rel.sys;"),
        "clock_ns": _clock_ns,
        # that of a block keeps the order in which this thread's loads are done, which is all a reader needs of it; one for the
        # device also waits for the answers that were written: lookups take 7 to 11 % longer on an H200
        "read_fence": instruction("fence.acq_rel.cta;"),
        "local_words": _local_words,
        "float_bits": _float_bits,
        "bits_float": _bits_float,
    }
