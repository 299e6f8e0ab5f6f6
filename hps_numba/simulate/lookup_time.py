"""How long a lookup takes on a GPU that serves its misses from the host store itself: measured once, interpolated here.

Times of one call on an H200 behind PCIe 5 (bus 53 to 55 GB/s), int64 keys, float32 rows, a host store of 1.2 M rows in pinned
memory, everything in one kernel, launch included, insertion not: it may overlap with what comes next.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["ASSUMPTIONS", "lookup_seconds"]

_KEYS = (1024, 16_384, 131_072, 1_048_576)
_MISSED = (0.0, 0.01, 0.05, 0.1, 0.5)
_DIMS = (32, 128)
#: microseconds by dim, keys of a call, share of misses
_MICROS = np.array(
    [
        [[21, 20, 25, 26, 26], [23, 20, 27, 30, 60], [27, 32, 56, 91, 351], [118, 116, 276, 540, 2650]],
        [[20, 23, 26, 29, 39], [23, 26, 33, 43, 122], [60, 56, 108, 190, 859], [318, 318, 867, 1621, 6698]],
    ],
    np.float64,
)
ASSUMPTIONS = (
    "times: one NVIDIA H200, PCIe 5, float32 rows, int64 keys, 1.2 M rows in pinned host memory, one call at a time,"
    " insertion of what missed not included; between measured points in a straight line over keys, misses and width; calls of"
    " fewer than 1,024 keys count as such, rows of fewer than 32 floats as well",
    "rows of tables of 4 GiB and more come over the bus at 30 to 46 M rows/s, slower than here",
)


def lookup_seconds(keys: int, hit_rate: float, dim: int) -> float:
    """Seconds of a lookup of so many keys; below 1,024 keys as of 1,024, beyond what was measured in proportion.

    Args:
        hit_rate: share of the keys that the cache has.   dim: floats of a row.
    """
    missed = min(max(1 - hit_rate, 0.0), 1.0)
    by_dim = [_of_keys(table, keys, missed) for table in _MICROS]
    narrow, wide = by_dim
    if dim >= _DIMS[1]:
        return wide * dim / _DIMS[1] * 1e-6
    share = max(0.0, (dim - _DIMS[0]) / (_DIMS[1] - _DIMS[0]))
    return (narrow + share * (wide - narrow)) * 1e-6


def _of_keys(table: np.ndarray, keys: int, missed: float) -> float:
    micros = [_of_misses(line, missed) for line in table]
    if keys >= _KEYS[-1]:
        return micros[-1] * keys / _KEYS[-1]
    return float(np.interp(math.log(max(keys, 1)), np.log(_KEYS), micros))


def _of_misses(line: np.ndarray, missed: float) -> float:
    if missed <= _MISSED[-1]:
        return float(np.interp(missed, _MISSED, line))
    slope = (line[-1] - line[-2]) / (_MISSED[-1] - _MISSED[-2])
    return float(line[-1] + slope * (missed - _MISSED[-1]))
