"""Write rows that were fetched later to their positions in an answer."""

from __future__ import annotations

from hps_numba.kernels.cache.rows import copy_from_host
from hps_numba.kernels.simt.reference import grid_tiles, ld64, tile_number

__all__ = ["scatter_kernel"]

# bound when specialized
OUT_STRIDE = HOST_STRIDE = 4


def scatter_kernel(positions, rows, count, out):
    """Write float32 row i of ``rows`` to the answer at ``positions[i]`` (int64), for ``count`` rows.   **Writes:** out."""
    number = tile_number()
    while number < count:
        copy_from_host(out + ld64(positions + 8 * number) * OUT_STRIDE, 0, rows + number * HOST_STRIDE)
        number += grid_tiles()
