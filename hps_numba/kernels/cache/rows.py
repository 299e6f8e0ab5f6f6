"""Copies of rows: from the cache to the answer, from the host store to answer and stage, from the stage to the cache.

Every lane of a tile moves its share of the elements. These versions are for any number of lanes; ``simt.cuda_rows`` has faster
ones for a GPU.

Constants bound when a kernel is specialized: DIM, LANES, ROW_TYPE (how the cache stores rows), OUT_TYPE (of answers),
SCALE_AT (offset in bytes of the scale in a stored row, or 0).
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.conversions import (
    bfloat16_of,
    float8_of,
    float16_of,
    float_of_bfloat16,
    float_of_float8,
    float_of_float16,
    float_of_int8,
    int8_of,
    scale_of,
)
from hps_numba.kernels.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT8
from hps_numba.kernels.simt.reference import (
    bits_float,
    float_bits,
    lane,
    ld8,
    ld16,
    ld32,
    max_in_tile,
    shfl,
    st8,
    st16,
    st32,
    tile_in_warp,
    tiles_in_warp,
)

__all__ = [
    "copy_from_cache",
    "copy_from_host",
    "copy_rows",
    "element_of_row",
    "fill_answer",
    "put_answer",
    "scale_of_row",
    "store_in_cache",
]

DIM, LANES, GROUP, SCALE_AT, OUT_STRIDE = 1, 1, 1, 0, 4
ROW_TYPE = OUT_TYPE = FLOAT32


def scale_of_row(source):
    """Scale of a stored row, 1 if its type has none."""
    if ROW_TYPE >= INT8:
        return bits_float(ld32(source + SCALE_AT))
    return np.float32(1.0)


def element_of_row(source, element, scale):
    """Bits of the float32 that an element of a stored row stands for."""
    if ROW_TYPE == FLOAT32:
        return ld32(source + 4 * element)
    if ROW_TYPE == FLOAT16:
        return float_of_float16(ld16(source + 2 * element))
    if ROW_TYPE == BFLOAT16:
        return float_of_bfloat16(ld16(source + 2 * element))
    if ROW_TYPE == INT8:
        return float_of_int8(ld8(source + element), scale)
    return float_of_float8(ld8(source + element), scale)


def put_answer(target, element, bits):
    """Write an element of an answer.   **Writes:** target."""
    if OUT_TYPE == FLOAT32:
        st32(target + 4 * element, bits)
    elif OUT_TYPE == FLOAT16:
        st16(target + 2 * element, float16_of(bits))
    else:
        st16(target + 2 * element, bfloat16_of(bits))


def copy_from_cache(target, source):
    """The answer from a stored row.   **Writes:** target."""
    scale = scale_of_row(source)
    for element in range(lane(), DIM, LANES):
        put_answer(target, element, element_of_row(source, element, scale))


def copy_rows(target, source):
    """The answers of a warp: ``source`` is each lane's stored row or 0, ``target`` the answer of the warp's first lane.

    **Writes:** target.
    """
    for first in range(0, GROUP, tiles_in_warp()):
        number = first + tile_in_warp()
        row = shfl(source, number)
        if row != 0:
            copy_from_cache(target + number * OUT_STRIDE, row)


def copy_from_host(target, stage, source):
    """The answer from a row of the host store, and the row itself to the stage; 0: neither.   **Writes:** target, stage."""
    for element in range(lane(), DIM, LANES):
        bits = ld32(source + 4 * element)
        if target != 0:
            put_answer(target, element, bits)
        if stage != 0:
            st32(stage + 4 * element, bits)


def fill_answer(target, default):
    """The answer for a key that is in no tier.   **Writes:** target."""
    bits = float_bits(default)
    for element in range(lane(), DIM, LANES):
        put_answer(target, element, bits)


def store_in_cache(target, source):
    """Store a float32 row in the cache.   **Writes:** target."""
    scale = np.float32(1.0)
    if ROW_TYPE >= INT8:
        largest = 0
        for element in range(lane(), DIM, LANES):
            largest = max(largest, ld32(source + 4 * element) & 0x7FFFFFFF)
        scale = scale_of(max_in_tile(largest), ROW_TYPE == INT8)
        st32(target + SCALE_AT, float_bits(scale))
    for element in range(lane(), DIM, LANES):
        bits = ld32(source + 4 * element)
        if ROW_TYPE == FLOAT32:
            st32(target + 4 * element, bits)
        elif ROW_TYPE == FLOAT16:
            st16(target + 2 * element, float16_of(bits))
        elif ROW_TYPE == BFLOAT16:
            st16(target + 2 * element, bfloat16_of(bits))
        elif ROW_TYPE == INT8:
            st8(target + element, int8_of(bits, scale))
        else:
            st8(target + element, float8_of(bits, scale))
