"""Parts: the elements of a row that one lane of a pooled lookup holds, and arithmetic on them.

The functions here are for one lane that holds the whole row, an array. ``simt.cuda_pooling`` has those for a GPU, where a part
is in registers. Multiplication and addition are rounded separately, so that CPU and GPU agree bit for bit.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.rows import element_of_row, put_answer, scale_of_row
from hps_numba.kernels.layouts.pooling import DEFAULT_ROW, NO_ROW
from hps_numba.kernels.simt.reference import bits_float, ld32

__all__ = [
    "add_part",
    "add_rounded",
    "await_four",
    "await_part",
    "await_parts",
    "divide_part",
    "fill_part",
    "float_of_lane",
    "host_part",
    "inverted_part",
    "load_four",
    "load_part",
    "max_part",
    "multiply_rounded",
    "new_four",
    "new_part",
    "part_of",
    "pick_part",
    "put_part",
    "root_rounded",
    "rows_in_flight",
    "steps_of_tile",
    "sum_part",
    "word_of_lane",
]

# bound when specialized
DIM = 1
ROW_STRIDE = 4
POOL_LANES = POOL_DEPTH = 1  # lanes that share a bag, rows in flight (1 or 4)


def new_part():
    """A part, all 0."""
    return np.zeros(DIM, np.float32)


def load_part(part, source):
    """The part of a row of the cache; undefined if ``source`` is 0."""
    if source != 0:
        scale = scale_of_row(source)
        for element in range(DIM):
            part[element] = bits_float(element_of_row(source, element, scale))
    return part


def new_four(number):
    """Buffer ``number`` (0 or 1) for four rows in flight."""
    return np.zeros((4, DIM), np.float32)


def load_four(four, rows, row, number):
    """Start to load four rows, those of lane ``number`` of the tile and the next three.

    ``row`` is the number of the row that each lane found (int32, taken as unsigned), or NO_ROW.
    """
    for d in range(4):
        if row != NO_ROW:
            load_part(four[d], rows + np.int64(np.uint32(row)) * ROW_STRIDE)
    return four


def await_four(later):
    """Wait for four rows, after which ``later`` times four (0 or 1) have been started."""


def part_of(four, d):
    """The part of row ``d`` of four."""
    return four[d]


def word_of_lane(value, number):
    """The int32 that lane ``number`` of the tile has, of those that share a bag."""
    return value


def float_of_lane(value, number):
    """The float32 that lane ``number`` of the tile has."""
    return value


def pick_part(first, second, third, fourth, number):
    """One of the parts in flight."""
    return first


def rows_in_flight():
    """POOL_DEPTH, but not a constant to the compiler: a loop over the rows in flight is not unrolled."""
    return POOL_DEPTH


def steps_of_tile():
    """POOL_LANES, but not a constant to the compiler, as in ``rows_in_flight``."""
    return POOL_LANES


def await_part(part):
    """``await_parts`` of one: of sums, everything that was added."""


def await_parts(first, second, third, fourth):
    """Later loads are issued only after these parts have been loaded."""


def host_part(part, source, default):
    """The part of a float32 row, of ``default`` if ``source`` is DEFAULT_ROW; ``part`` itself if it is 0."""
    if source > DEFAULT_ROW:
        for element in range(DIM):
            part[element] = bits_float(ld32(source + 4 * element))
    elif source == DEFAULT_ROW:
        part[:] = np.float32(default)
    return part


def inverted_part(part):
    """All bits inverted; inverted twice, a part is itself again."""
    return part


def fill_part(part, value):
    """A part whose elements are all ``value``."""
    part[:] = np.float32(value)
    return part


def add_part(sums, part, weight):
    """``sums + part * weight``, both operations rounded."""
    for element in range(DIM):
        sums[element] = add_rounded(sums[element], multiply_rounded(part[element], weight))
    return sums


def sum_part(sums, part):
    """``add_part`` with a weight of 1."""
    return add_part(sums, part, np.float32(1.0))


def max_part(sums, part):
    """The larger of each two elements; NaN stays NaN."""
    for element in range(DIM):
        value = part[element]
        if value > sums[element] or value != value:
            sums[element] = value
    return sums


def divide_part(sums, divisor):
    """Each element by ``divisor``."""
    for element in range(DIM):
        sums[element] = divide_rounded(sums[element], divisor)
    return sums


def put_part(target, sums):
    """Write a part of an answer.   **Writes:** target."""
    bits = sums.view(np.uint32)
    for element in range(DIM):
        put_answer(target, element, np.int64(bits[element]))


def multiply_rounded(a, b):
    """``a * b`` in float32, never fused with an addition."""
    return np.float32(a) * np.float32(b)


def add_rounded(a, b):
    """``a + b`` in float32."""
    return np.float32(a) + np.float32(b)


def divide_rounded(a, b):
    """``a / b`` in float32."""
    return np.float32(a) / np.float32(b)


def root_rounded(a):
    """The square root in float32."""
    return np.sqrt(np.float32(a))
