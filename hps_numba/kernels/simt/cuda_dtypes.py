"""Conversions of row elements in the registers of a GPU: the bits of ``cache.conversions`` for all inputs, on every chip.

They are LLVM's integer and float operations, none of which may be fused with another or rounded otherwise; so they also run on
a CPU, where tests compare them bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from hps_numba.kernels.dtypes import BFLOAT16, ELEMENT_BYTES, FLOAT8_E4M3, FLOAT16, FLOAT32, INT8, TYPE_NUMBERS

__all__ = ["BYTES", "bits_of", "floats_of", "scale_of"]

_32, _16, _F32 = ir.IntType(32), ir.IntType(16), ir.FloatType()
#: bytes of an element, by the number of its type
BYTES = {TYPE_NUMBERS[name]: size for name, size in ELEMENT_BYTES.items()}
_NAN = 0x7FC00000


def _word(value: int) -> ir.Constant:
    return ir.Constant(_32, value)


def _float(value: float) -> ir.Constant:
    return ir.Constant(_F32, value)


def floats_of(builder: Any, stored: int, words: Sequence[Any], count: int, scale: Any, *, any_nan: bool = False) -> list[Any]:
    """The float32 that ``count`` stored elements stand for; ``scale`` (float32) if the type has one.

    ``any_nan``: a NaN may have any bits, as where it is added to others; that takes fewer registers.
    """
    if stored == FLOAT32:
        return [builder.bitcast(word, _F32) for word in words]
    if BYTES[stored] == 2:
        float16 = _float_of_float16_any_nan if any_nan else _float_of_float16
        float_of = float16 if stored == FLOAT16 else _float_of_bfloat16
        return [float_of(builder, words[i // 2], i % 2) for i in range(count)]
    if stored == INT8:
        words = [builder.xor(word, _word(0x80808080)) for word in words]
        return [builder.fmul(_whole(builder, words[i // 4], i % 4), scale) for i in range(count)]
    return [_float_of_float8(builder, words[i // 4], i % 4, scale) for i in range(count)]


def _float_of_float16(builder: Any, word: Any, half: int) -> Any:
    """By a multiplication, which is exact; then infinity and NaN get their exponent and keep the other bits."""
    top = word if half else builder.shl(word, _word(16))
    small = builder.and_(builder.ashr(top, _word(3)), _word(0x8FFFE000))
    value = builder.fmul(builder.bitcast(small, _F32), _float(2.0**112))
    bits = builder.bitcast(value, _32)
    size = builder.bitcast(builder.and_(bits, _word(0x7FFFFFFF)), _F32)
    beyond = builder.fcmp_ordered(">=", size, _float(65536.0))
    return builder.bitcast(builder.select(beyond, builder.or_(bits, _word(0x7F800000)), bits), _F32)


def _float_of_float16_any_nan(builder: Any, word: Any, half: int) -> Any:
    """By the instruction of the chip, which gives a NaN bits of its own."""
    bits = builder.trunc(builder.lshr(word, _word(16)) if half else word, _16)
    return builder.fpext(builder.bitcast(bits, ir.HalfType()), _F32)


def _float_of_bfloat16(builder: Any, word: Any, half: int) -> Any:
    bits = builder.and_(word, _word(0xFFFF0000)) if half else builder.shl(word, _word(16))
    return builder.bitcast(bits, _F32)


def _whole(builder: Any, word: Any, byte: int) -> Any:
    """An int8 as float32, from a word whose bytes are 128 too large: as the last bits of a float in which they count ones."""
    bits = builder.and_(builder.lshr(word, _word(8 * byte)), _word(0xFF))
    return builder.fsub(builder.bitcast(builder.or_(bits, _word(0x4B000000)), _F32), _float(2.0**23 + 128))


def _float_of_float8(builder: Any, word: Any, byte: int, scale: Any) -> Any:
    top = builder.shl(word, _word(24 - 8 * byte))
    small = builder.and_(builder.lshr(top, _word(4)), _word(0x07F00000))
    size = builder.fmul(builder.fmul(builder.bitcast(small, _F32), _float(2.0**120)), scale)
    value = builder.or_(builder.bitcast(size, _32), builder.and_(top, _word(0x80000000)))
    nan = builder.icmp_unsigned("==", small, _word(0x07F00000))
    return builder.bitcast(builder.select(nan, _word(_NAN), value), _F32)


def bits_of(builder: Any, kind: int, values: Sequence[Any], scale: Any = None) -> list[Any]:
    """Float32 as elements of a kind, in 32-bit words; if that is less than a word, in the lower end of one."""
    each = 4 // BYTES[kind]
    element = {
        FLOAT32: lambda value: builder.bitcast(value, _32),
        FLOAT16: lambda value: _float16_of(builder, value),
        BFLOAT16: lambda value: _bfloat16_of(builder, value),
        INT8: lambda value: _int8_of(builder, value, scale),
        FLOAT8_E4M3: lambda value: _float8_of(builder, value, scale),
    }[kind]
    words = []
    for first in range(0, len(values), each):
        word, *others = (element(value) for value in values[first : first + each])
        for i, other in enumerate(others, 1):
            word = builder.or_(word, builder.shl(other, _word(8 * BYTES[kind] * i)))
        words.append(word)
    return words


def _high_half(builder: Any, value: Any) -> Any:
    return builder.lshr(builder.bitcast(value, _32), _word(16))


def _float16_of(builder: Any, value: Any) -> Any:
    half = builder.zext(builder.bitcast(builder.fptrunc(value, ir.HalfType()), _16), _32)
    sign = builder.and_(_high_half(builder, value), _word(0x8000))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(nan, builder.or_(sign, _word(0x7E00)), half)


def _bfloat16_of(builder: Any, value: Any) -> Any:
    high = _high_half(builder, value)
    bits = builder.add(builder.bitcast(value, _32), builder.add(builder.and_(high, _word(1)), _word(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(nan, builder.or_(high, _word(0x40)), builder.lshr(bits, _word(16)))


def _size(builder: Any, value: Any) -> Any:
    """Bits of the absolute value."""
    return builder.and_(builder.bitcast(value, _32), _word(0x7FFFFFFF))


def _int8_of(builder: Any, value: Any, scale: Any) -> Any:
    value = builder.fdiv(value, scale)
    size = builder.bitcast(_size(builder, value), _F32)
    size = builder.select(builder.fcmp_ordered("<=", size, _float(127.0)), size, _float(127.0))
    whole = builder.fptosi(size, _32)
    left_over = builder.fsub(size, builder.sitofp(whole, _F32))
    whole = builder.add(whole, builder.zext(builder.fcmp_ordered(">=", left_over, _float(0.5)), _32))
    negative = builder.fcmp_ordered("<", value, _float(0.0))
    return builder.and_(builder.select(negative, builder.neg(whole), whole), _word(0xFF))


def _float8_of(builder: Any, value: Any, scale: Any) -> Any:
    value = builder.fdiv(value, scale)
    sign = builder.and_(builder.lshr(builder.bitcast(value, _32), _word(24)), _word(0x80))
    size = _size(builder, value)
    odd = builder.and_(builder.lshr(size, _word(20)), _word(1))
    normal = builder.sub(builder.add(size, odd), _word(0x3C000000 - 0x7FFFF))
    normal = builder.lshr(normal, _word(20))
    normal = builder.select(builder.icmp_unsigned("<", normal, _word(0x7E)), normal, _word(0x7E))
    # the last bits of floats from 2**14 on count units of 2**-9
    units = builder.sub(builder.bitcast(builder.fadd(builder.bitcast(size, _F32), _float(2.0**14)), _32), _word(0x46800000))
    byte = builder.select(builder.icmp_unsigned("<", size, _word(0x3C800000)), units, normal)
    nan = builder.icmp_unsigned(">", size, _word(0x7F800000))
    return builder.or_(sign, builder.select(nan, _word(0x7F), byte))


def scale_of(builder: Any, largest: Any, stored: int) -> Any:
    """Scale (float32) of a row by the bits of its largest absolute value."""
    size = builder.bitcast(largest, _F32)
    if stored == INT8:
        scale = builder.fdiv(size, _float(127.0))
        return builder.select(builder.fcmp_ordered(">", size, _float(0.0)), scale, _float(1.0))
    scale, minimum = builder.fdiv(size, _float(448.0)), _float(1.0 / (448.0 * 512.0))
    return builder.select(builder.fcmp_ordered(">", scale, minimum), scale, minimum)
