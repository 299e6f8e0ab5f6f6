"""Estimated time of a lookup on a GPU that reads its misses from the host store: interpolated from measurements.

Times of one call on an H200 with PCIe 5 (53 to 55 GB/s), int64 keys, float32 rows, a host store of 1.2 M rows in pinned memory,
everything in one kernel. The launch is included; the insertion is not, as it may overlap with the following work.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["ASSUMPTIONS", "lookup_seconds"]

_KEYS = (1024, 16_384, 131_072, 1_048_576)
_MISS_RATES = (0.0, 0.01, 0.05, 0.1, 0.5)
_DIMS = (32, 128)
#: microseconds by dim, keys of a call, and miss rate
_MICROS = np.array(
    [
        [[21, 20, 25, 26, 26], [23, 20, 27, 30, 60], [27, 32, 56, 91, 351], [118, 116, 276, 540, 2650]],
        [[20, 23, 26, 29, 39], [23, 26, 33, 43, 122], [60, 56, 108, 190, 859], [318, 318, 867, 1621, 6698]],
    ],
    np.float64,
)
ASSUMPTIONS = (
    "times: one NVIDIA H200, PCIe 5, float32 rows, int64 keys, 1.2 M rows in pinned host memory, one call at a time,"
    " insertion of missed rows not included; interpolated between measurements over keys, miss rate and width; calls of fewer"
    " than 1,024 keys are taken as 1,024, rows of fewer than 32 floats as 32",
    "tables of 4 GiB and more are slower: their rows cross the bus at 30 to 46 M rows/s",
)


def lookup_seconds(keys: int, hit_rate: float, dim: int) -> float:
    """Estimated seconds of a lookup; fewer than 1,024 keys are taken as 1,024, and larger sizes are extrapolated.

    Args:
        keys: of the call.   hit_rate: share of them that are in the cache.   dim: floats in a row.
    """
    miss_rate = min(max(1 - hit_rate, 0.0), 1.0)
    by_dim = [_micros_by_keys(table, keys, miss_rate) for table in _MICROS]
    narrow, wide = by_dim
    if dim >= _DIMS[1]:
        return wide * dim / _DIMS[1] * 1e-6
    share = max(0.0, (dim - _DIMS[0]) / (_DIMS[1] - _DIMS[0]))
    return (narrow + share * (wide - narrow)) * 1e-6


def _micros_by_keys(table: np.ndarray, keys: int, miss_rate: float) -> float:
    micros = [_micros_by_misses(line, miss_rate) for line in table]
    if keys >= _KEYS[-1]:
        return micros[-1] * keys / _KEYS[-1]
    return float(np.interp(math.log(max(keys, 1)), np.log(_KEYS), micros))


def _micros_by_misses(line: np.ndarray, miss_rate: float) -> float:
    if miss_rate <= _MISS_RATES[-1]:
        return float(np.interp(miss_rate, _MISS_RATES, line))
    slope = (line[-1] - line[-2]) / (_MISS_RATES[-1] - _MISS_RATES[-2])
    return float(line[-1] + slope * (miss_rate - _MISS_RATES[-1]))
