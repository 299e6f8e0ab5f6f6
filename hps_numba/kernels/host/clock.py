"""The time in host kernels."""

from __future__ import annotations

import time

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["HAS_CLOCK", "monotonic_ns"]

_WORD, _INT = ir.IntType(64), ir.IntType(32)
_MONOTONIC: int | None = getattr(time, "CLOCK_MONOTONIC", None)
#: the system has a clock that kernels can read; Windows has none of this kind
HAS_CLOCK = _MONOTONIC is not None and hasattr(time, "clock_gettime")


@intrinsic
def monotonic_ns(typingctx):
    """Nanoseconds of a clock that only goes forward; 0 without ``HAS_CLOCK``."""

    def codegen(context, builder, signature, args):
        if not HAS_CLOCK:
            return ir.Constant(_WORD, 0)
        pair = ir.ArrayType(_WORD, 2)  # seconds and nanoseconds
        place = cgutils.alloca_once(builder, pair)
        kind = ir.FunctionType(_INT, [_INT, pair.as_pointer()])
        read = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(read, [ir.Constant(_INT, _MONOTONIC), place])
        now = builder.load(place)
        seconds, rest = builder.extract_value(now, 0), builder.extract_value(now, 1)
        return builder.add(builder.mul(seconds, ir.Constant(_WORD, 1_000_000_000)), rest)

    return types.int64(), codegen
