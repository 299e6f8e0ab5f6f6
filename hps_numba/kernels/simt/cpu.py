"""The operations of ``simt.reference`` compiled for the CPU: atomic ones of the processor, for a tile of one lane."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from hps_numba.kernels.host.atomics import add_word, full_fence, load_word_acquire, read_fence, store_word_release

__all__ = ["LOCAL_WORDS", "NAMES"]

LOCAL_WORDS = 16  # maximum of ``local_words``

_64, _32 = ir.IntType(64), ir.IntType(32)
_INT = types.int64


def _at(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def _ld32(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.zext(builder.load_atomic(_at(builder, args[0], _32), "acquire", 4), _64)

    return _INT(_INT), codegen


@intrinsic
def _st32(typingctx, address, value):
    def codegen(context, builder, signature, args):
        builder.store_atomic(builder.trunc(args[1], _32), _at(builder, args[0], _32), "release", 4)
        return context.get_dummy_value()

    return types.void(_INT, _INT), codegen


@intrinsic
def _cas32(typingctx, address, expected, value):
    def codegen(context, builder, signature, args):
        old, new = (builder.trunc(arg, _32) for arg in args[1:])
        pair = builder.cmpxchg(_at(builder, args[0], _32), old, new, "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(pair, 0), _64)

    return _INT(_INT, _INT, _INT), codegen


@intrinsic
def _cas64(typingctx, address, expected, value):
    def codegen(context, builder, signature, args):
        pair = builder.cmpxchg(_at(builder, args[0], _64), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return _INT(_INT, _INT, _INT), codegen


@intrinsic
def _add32(typingctx, address, value):
    def codegen(context, builder, signature, args):
        old = builder.atomic_rmw("add", _at(builder, args[0], _32), builder.trunc(args[1], _32), "seq_cst")
        return builder.zext(old, _64)

    return _INT(_INT, _INT), codegen


def _rmw(operation):
    @intrinsic
    def rmw(typingctx, address, value):
        def codegen(context, builder, signature, args):
            return builder.atomic_rmw(operation, _at(builder, args[0], _64), args[1], "seq_cst")

        return _INT(_INT, _INT), codegen

    return rmw


@intrinsic
def _float_bits(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], _32), _64)

    return _INT(types.float32), codegen


@intrinsic
def _bits_float(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], _32), ir.FloatType())

    return types.float32(_INT), codegen


@intrinsic
def _ctz(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return _INT(_INT), codegen


@intrinsic
def _popcount(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return _INT(_INT), codegen


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


def _load(bits, signed=False):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            value = builder.load(_at(builder, args[0], ir.IntType(bits)))
            return builder.sext(value, _64) if signed else builder.zext(value, _64)

        return _INT(_INT), codegen

    return load


def _store(bits):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            builder.store(builder.trunc(args[1], ir.IntType(bits)), _at(builder, args[0], ir.IntType(bits)))
            return context.get_dummy_value()

        return types.void(_INT, _INT), codegen

    return store


#: what ``compiler.specialize`` binds in place of the operations of ``simt.reference``; the others are right for one lane
NAMES = {
    "ld64": load_word_acquire,
    "ld64_host": load_word_acquire,
    "st64": store_word_release,
    "st64_host": store_word_release,
    "ld32": _ld32,
    "st32": _st32,
    "cas32": _cas32,
    "cas64": _cas64,
    "add32": _add32,
    "add64": add_word,
    "min64": _rmw("min"),
    "max64": _rmw("max"),
    "fence": full_fence,
    "fence_host": full_fence,
    "read_fence": read_fence,
    "local_words": _local_words,
    "ctz": _ctz,
    "popcount": _popcount,
    "ld8": _load(8),
    "ld16": _load(16),
    "st8": _store(8),
    "st16": _store(16),
    "float_bits": _float_bits,
    "bits_float": _bits_float,
}
