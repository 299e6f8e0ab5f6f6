"""Raw memory for host kernels: ordered loads and stores, prefetch and row copies, as numba intrinsics on addresses.

Addresses are plain integers, so that one compiled kernel serves every kind of array and no reference count is touched without
the GIL. LLVM provides the memory order on every processor it targets (x86-64, aarch64); nothing here depends on one.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "add_word",
    "array_address",
    "compare_word",
    "copy_row",
    "exchange_word",
    "fill_row",
    "float_pointer",
    "full_fence",
    "load_float",
    "load_word",
    "load_word_acquire",
    "pieces",
    "pointer",
    "prefetch",
    "prefetch_row",
    "read_fence",
    "store_float",
    "store_word",
    "store_word_release",
    "stream_row",
]

_WORD = ir.IntType(64)
_FLOAT = ir.FloatType()
_INT = types.int64


def pointer(builder, address, kind):
    """For intrinsics: an address as a pointer to values of an LLVM type."""
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def array_address(typingctx, array):
    """Address of the first element of an array."""

    def codegen(context, builder, signature, args):
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(struct.data, _WORD)

    return _INT(array), codegen


@intrinsic
def float_pointer(typingctx, address):
    """``address`` as a pointer to float32, for ``numba.carray``."""

    def codegen(context, builder, signature, args):
        return pointer(builder, args[0], _FLOAT)

    return types.CPointer(types.float32)(_INT), codegen


@intrinsic
def load_float(typingctx, address):
    """The float32 at ``address``."""

    def codegen(context, builder, signature, args):
        return builder.load(pointer(builder, args[0], _FLOAT))

    return types.float32(_INT), codegen


@intrinsic
def store_float(typingctx, address, value):
    """Store a float32."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], _FLOAT))
        return context.get_dummy_value()

    return types.void(_INT, types.float32), codegen


@intrinsic
def load_word(typingctx, address):
    """The int64 at ``address``, unordered but never torn."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(pointer(builder, args[0], _WORD), "monotonic", 8)

    return _INT(_INT), codegen


@intrinsic
def load_word_acquire(typingctx, address):
    """The int64 at ``address``; what was written before its release is visible after."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(pointer(builder, args[0], _WORD), "acquire", 8)

    return _INT(_INT), codegen


@intrinsic
def store_word(typingctx, address, value):
    """Store an int64, unordered but never torn."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], pointer(builder, args[0], _WORD), "monotonic", 8)
        return context.get_dummy_value()

    return types.void(_INT, _INT), codegen


@intrinsic
def store_word_release(typingctx, address, value):
    """Store an int64 after everything written before it."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], pointer(builder, args[0], _WORD), "release", 8)
        return context.get_dummy_value()

    return types.void(_INT, _INT), codegen


@intrinsic
def exchange_word(typingctx, address, value):
    """Store an int64 and return what was there, sequentially consistent."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("xchg", pointer(builder, args[0], _WORD), args[1], "seq_cst")

    return _INT(_INT, _INT), codegen


@intrinsic
def add_word(typingctx, address, value):
    """Add to an int64 and return what was there, sequentially consistent."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], _WORD), args[1], "seq_cst")

    return _INT(_INT, _INT), codegen


@intrinsic
def compare_word(typingctx, address, expected, value):
    """Store an int64 if ``expected`` is there and return what was there, sequentially consistent."""

    def codegen(context, builder, signature, args):
        pair = builder.cmpxchg(pointer(builder, args[0], _WORD), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return _INT(_INT, _INT, _INT), codegen


@intrinsic
def full_fence(typingctx):
    """No load or store moves across it, in either direction."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def read_fence(typingctx):
    """No load or store after it is done before the loads that come before it."""

    def codegen(context, builder, signature, args):
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), codegen


def _prefetch(builder, address):
    byte = ir.IntType(8).as_pointer()
    i32 = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)
    builder.call(call, [builder.inttoptr(address, byte), read, keep, data])


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at ``address`` ahead of its use; any address is allowed."""

    def codegen(context, builder, signature, args):
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(_INT), codegen


def pieces(builder, size, piece, smallest=4):
    """For intrinsics: cut ``size`` bytes, a multiple of 4, into vectors of 16, 8, 4, 2 and 1 floats.

    ``piece(offset, floats)`` builds the code for one of them.
    One loop over 512 bytes and a ladder of halves below: rows of one width take the same few branches every time.
    """
    with cgutils.for_range(builder, builder.lshr(size, ir.Constant(_WORD, 9)), intp=_WORD) as loop:
        start = builder.shl(loop.index, ir.Constant(_WORD, 9))
        for step in range(0, 512, 64):
            piece(builder.add(start, ir.Constant(_WORD, step)), 16)
    offset = builder.and_(size, ir.Constant(_WORD, -512))
    part = 256
    while part >= smallest:
        bit = builder.and_(size, ir.Constant(_WORD, part))
        with builder.if_then(builder.icmp_unsigned("!=", bit, ir.Constant(_WORD, 0))):
            for step in range(0, part, 64):
                piece(builder.add(offset, ir.Constant(_WORD, step)), min(part // 4, 16))
        offset = builder.add(offset, bit)
        part //= 2


@intrinsic
def copy_row(typingctx, target, source, size):
    """Copy ``size`` bytes (a multiple of 4) of float32."""

    def codegen(context, builder, signature, args):
        target, source, size = args

        def piece(offset, floats):
            vector = ir.VectorType(_FLOAT, floats)
            value = builder.load(pointer(builder, builder.add(source, offset), vector), align=4)
            builder.store(value, pointer(builder, builder.add(target, offset), vector), align=4)

        pieces(builder, size, piece)
        return context.get_dummy_value()

    return types.void(_INT, _INT, _INT), codegen


@intrinsic
def stream_row(typingctx, target, source, size):
    """As ``copy_row`` for a ``target`` and ``size`` that are multiples of 64, past the caches; a ``full_fence`` must follow."""

    def codegen(context, builder, signature, args):
        target, source, size = args
        past_caches = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])

        def piece(offset, floats):
            vector = ir.VectorType(_FLOAT, floats)
            value = builder.load(pointer(builder, builder.add(source, offset), vector), align=4)
            store = builder.store(value, pointer(builder, builder.add(target, offset), vector), align=4 * floats)
            store.set_metadata("nontemporal", past_caches)

        pieces(builder, size, piece, 64)
        return context.get_dummy_value()

    return types.void(_INT, _INT, _INT), codegen


@intrinsic
def fill_row(typingctx, target, value, size):
    """Write the float32 ``value`` to ``size`` bytes (a multiple of 4)."""

    def codegen(context, builder, signature, args):
        target, value, size = args

        def piece(offset, floats):
            vector = ir.VectorType(_FLOAT, floats)
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            mask = ir.Constant(ir.VectorType(ir.IntType(32), floats), [0] * floats)
            splat = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)
            builder.store(splat, pointer(builder, builder.add(target, offset), vector), align=4)

        pieces(builder, size, piece)
        return context.get_dummy_value()

    return types.void(_INT, types.float32, _INT), codegen


@intrinsic
def prefetch_row(typingctx, address, size):
    """``prefetch`` for the cache lines of a row of ``size`` bytes, at most its first eight."""

    def codegen(context, builder, signature, args):
        address, size = args
        first = builder.and_(address, ir.Constant(_WORD, -64))
        end = builder.add(address, size)

        def from_line(number):
            line = builder.add(first, ir.Constant(_WORD, 64 * number))
            with builder.if_then(builder.icmp_signed("<", line, end)):
                _prefetch(builder, line)
                if number < 7:  # beyond, the processor has seen where this goes
                    from_line(number + 1)

        from_line(0)
        return context.get_dummy_value()

    return types.void(_INT, _INT), codegen
