"""Give all rows of a cache the scores of new rows: for another policy, and for one that looks at keys."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.insert import first_score, line_of_way, score_of_way
from hps_numba.kernels.cache.seqlock import lock_set, unlock_set
from hps_numba.kernels.layouts.cache import META_AT, OCCUPIED, SET_BYTES, STATE_NOW, WAYS, WAYS_PER_LINE
from hps_numba.kernels.simt.reference import grid_tiles, is_first_lane, ld32, ld64, st32, tile_number

__all__ = ["rescore_kernel"]


def rescore_kernel(lines, sets, state):
    """Score all rows as if each were inserted now, by a batch of its own.   **Writes:** scores."""
    now = ld64(state + STATE_NOW)
    number = tile_number()
    while number < sets:
        set_at = lines + number * SET_BYTES
        lock_set(set_at)
        if is_first_lane():
            for way in range(WAYS):
                line = line_of_way(set_at, way)
                if (ld32(line + META_AT) & OCCUPIED) >> (way % WAYS_PER_LINE) & 1:
                    key = ld64(line + 8 * (way % WAYS_PER_LINE))
                    st32(score_of_way(set_at, way), np.int64(first_score(now, 1, key)) & 0xFFFFFFFF)
        unlock_set(set_at)
        number += grid_tiles()
