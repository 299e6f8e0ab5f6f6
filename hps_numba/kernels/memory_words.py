"""Raw memory for host kernels: ordered loads and stores, prefetch and row copies, as numba intrinsics on addresses.

Addresses are plain integers, so that one compiled kernel serves every array kind and no reference count is touched without
the GIL. LLVM gives the memory order on every processor it targets (x86-64, aarch64); nothing here is architecture code.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "add_word",
    "copy_row",
    "exchange_word",
    "fill_row",
    "full_fence",
    "load_word",
    "load_word_acquire",
    "prefetch",
    "store_word",
    "store_word_release",
]

_WORD = ir.IntType(64)
_FLOAT = ir.FloatType()
_INT = types.int64


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def load_word(typingctx, address):
    """The int64 at ``address``, unordered but never torn."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0], _WORD), "monotonic", 8)

    return _INT(_INT), codegen


@intrinsic
def load_word_acquire(typingctx, address):
    """The int64 at ``address``; what was written before its release is visible after."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0], _WORD), "acquire", 8)

    return _INT(_INT), codegen


@intrinsic
def store_word(typingctx, address, value):
    """Store an int64, unordered but never torn."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], _pointer(builder, args[0], _WORD), "monotonic", 8)
        return context.get_dummy_value()

    return types.void(_INT, _INT), codegen


@intrinsic
def store_word_release(typingctx, address, value):
    """Store an int64 after everything written before it."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], _pointer(builder, args[0], _WORD), "release", 8)
        return context.get_dummy_value()

    return types.void(_INT, _INT), codegen


@intrinsic
def exchange_word(typingctx, address, value):
    """Store an int64 and return what was there, sequentially consistent."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("xchg", _pointer(builder, args[0], _WORD), args[1], "seq_cst")

    return _INT(_INT, _INT), codegen


@intrinsic
def add_word(typingctx, address, value):
    """Add to an int64 and return what was there, sequentially consistent."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _WORD), args[1], "seq_cst")

    return _INT(_INT, _INT), codegen


@intrinsic
def full_fence(typingctx):
    """No load or store moves over it, in either direction."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at ``address`` ahead of its use; any address is allowed."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)
        builder.call(call, [builder.inttoptr(args[0], byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(_INT), codegen


def _copy_loop(builder, target, source, count, lanes):
    """Copy ``count`` vectors of ``lanes`` floats; returns the addresses after them."""
    vector = ir.VectorType(_FLOAT, lanes)
    width = ir.Constant(_WORD, 4 * lanes)
    with cgutils.for_range(builder, count, intp=_WORD) as loop:
        offset = builder.mul(loop.index, width)
        value = builder.load(_pointer(builder, builder.add(source, offset), vector), align=4)
        builder.store(value, _pointer(builder, builder.add(target, offset), vector), align=4)
    moved = builder.mul(count, width)
    return builder.add(target, moved), builder.add(source, moved)


@intrinsic
def copy_row(typingctx, target, source, size):
    """Copy ``size`` bytes (a multiple of 4) of float32: 64 bytes a step, then 4."""

    def codegen(context, builder, signature, args):
        target, source, size = args
        target, source = _copy_loop(builder, target, source, builder.lshr(size, ir.Constant(_WORD, 6)), 16)
        rest = builder.and_(size, ir.Constant(_WORD, 63))
        _copy_loop(builder, target, source, builder.lshr(rest, ir.Constant(_WORD, 2)), 1)
        return context.get_dummy_value()

    return types.void(_INT, _INT, _INT), codegen


@intrinsic
def fill_row(typingctx, target, value, size):
    """Write the float32 ``value`` to ``size`` bytes (a multiple of 4)."""

    def codegen(context, builder, signature, args):
        target, value, size = args
        with cgutils.for_range(builder, builder.lshr(size, ir.Constant(_WORD, 2)), intp=_WORD) as loop:
            place = builder.add(target, builder.mul(loop.index, ir.Constant(_WORD, 4)))
            builder.store(value, _pointer(builder, place, _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(_INT, types.float32, _INT), codegen
