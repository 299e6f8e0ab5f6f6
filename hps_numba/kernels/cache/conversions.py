"""Conversions of row elements: how a cache stores float32, and how an answer is written. Integer arithmetic on float bits.

=============  ======  =======================================================================================
stored as      bytes   value
=============  ======  =======================================================================================
float32        4       itself
float16        2       rounded to nearest even
bfloat16       2       rounded to nearest even
int8           1       q * scale, scale = max|v| / 127 (HugeCTR HPS multiplies by 127 / max|v|)
float8_e4m3    1       e4m3(q) * scale, scale = max(max|v| / 448, 1 / (448 * 512))
=============  ======  =======================================================================================

The scale of a row is a float32 that follows its elements. The same functions run as plain Python and compiled, so CPU and GPU
store the same bytes. Bits are int64 in 0..2**32-1, halves and bytes int64 in 0..2**16-1 and 0..255, scales float32.

*Why integers.* Rounding is that of IEEE 754 to the last bit on every machine: no step passes through a subnormal float32, which
a process may have told its processor to flush to zero.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.simt.reference import bits_float, float_bits

__all__ = [
    "bfloat16_of",
    "float8_of",
    "float16_of",
    "float_of_bfloat16",
    "float_of_float8",
    "float_of_float16",
    "float_of_int8",
    "int8_of",
    "scale_of",
]

_E4M3_MAX = np.float32(448.0)
_E4M3_MIN_SCALE = np.float32(1.0 / (448.0 * 512.0))
_INT8_MAX = np.float32(127.0)
_ONE, _ZERO = np.float32(1.0), np.float32(0.0)
_HALF = np.float32(0.5)


def _round_shift(bits, shift):
    """``bits >> shift``, rounded to nearest even."""
    return (bits + (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift


def float16_of(bits):
    """Bits of the float16 nearest to a float32."""
    sign = (bits >> 16) & 0x8000
    size = bits & 0x7FFFFFFF
    if size >= 0x7F800000:
        return sign | (0x7E00 if size > 0x7F800000 else 0x7C00)
    if size < 0x38800000:  # below 2**-14: a subnormal half, counted in units of 2**-24
        shift = 126 - (size >> 23)
        if shift > 24:
            return sign
        return sign | _round_shift((size & 0x7FFFFF) | 0x800000, shift)
    half = _round_shift(size - 0x38000000, 13)
    return sign | (half if half < 0x7C00 else 0x7C00)


def float_of_float16(half):
    """Bits of the float32 that equals a float16."""
    sign = (half & 0x8000) << 16
    size = half & 0x7FFF
    if size >= 0x7C00:
        return sign | 0x7F800000 | ((size & 0x3FF) << 13)
    if size < 0x400:
        return sign | float_bits(np.float32(size) * np.float32(2.0**-24))
    return sign | ((size << 13) + 0x38000000)


def bfloat16_of(bits):
    """Bits of the bfloat16 nearest to a float32."""
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        return (bits >> 16) | 0x40
    return _round_shift(bits, 16) & 0xFFFF


def float_of_bfloat16(bits):
    """Bits of the float32 that equals a bfloat16."""
    return bits << 16


def scale_of(largest, is_int8):
    """Scale (float32) of a row by the bits of its largest absolute value."""
    size = bits_float(largest)
    if is_int8:
        return size / _INT8_MAX if size > _ZERO else _ONE
    scale = size / _E4M3_MAX
    return scale if scale > _E4M3_MIN_SCALE else _E4M3_MIN_SCALE


def int8_of(bits, scale):
    """``v / scale`` rounded to the nearest integer, halves away from 0, as a byte; at most 127, as is NaN."""
    value = bits_float(bits) / scale
    size = bits_float(float_bits(value) & 0x7FFFFFFF)
    if not size <= _INT8_MAX:  # also NaN
        size = _INT8_MAX
    whole = np.int64(size)
    if size - np.float32(whole) >= _HALF:
        whole += 1
    return -whole & 0xFF if value < _ZERO else whole


def float_of_int8(byte, scale):
    """Bits of ``q * scale``."""
    return float_bits(np.float32(byte - 256 if byte >= 128 else byte) * scale)


def float8_of(bits, scale):
    """``v / scale`` as float8 e4m3 (round to nearest even, at most 448); NaN stays NaN."""
    value = float_bits(bits_float(bits) / scale)
    sign = (value >> 24) & 0x80
    size = value & 0x7FFFFFFF
    if size > 0x7F800000:
        return sign | 0x7F
    if size < 0x3C800000:  # below 2**-6: subnormal, counted in units of 2**-9
        shift = 141 - (size >> 23)
        if shift > 24:
            return sign
        return sign | _round_shift((size & 0x7FFFFF) | 0x800000, shift)
    byte = _round_shift(size - 0x3C000000, 20)
    return sign | (byte if byte < 0x7E else 0x7E)


def float_of_float8(byte, scale):
    """Bits of ``e4m3 * scale``."""
    size = byte & 0x7F
    if size == 0x7F:
        return 0x7FC00000
    if size < 8:
        value = np.float32(size) * np.float32(2.0**-9)
    else:
        value = bits_float((size << 20) + 0x3C000000)
    return float_bits(value * scale) | ((byte & 0x80) << 24)
