"""Pooled lookups as host and device agree on them: combiners, options, and the shape of a launch."""

from __future__ import annotations

from hps_numba.kernels.dtypes import FLOAT32

__all__ = [
    "COMBINERS",
    "DEFAULT_ROW",
    "EMPTY_DEFAULT",
    "EQUAL",
    "MAX",
    "MAX_ROWS",
    "MEAN",
    "NO_ROW",
    "OFFSETS32",
    "OPEN_END",
    "PADDED",
    "SQRTN",
    "SUM",
    "THREADS",
    "fits_shared",
    "pool_blocks",
    "pool_lanes",
    "pool_registers",
    "pool_run",
]

#: combiners, by number
SUM, MEAN, SQRTN, MAX = range(4)
COMBINERS = {"sum": SUM, "mean": MEAN, "sqrtn": SQRTN, "max": MAX}

#: options: skip keys equal to ``padding``; empty bags get the default; offsets are int32; the last offset is left out; all bags
#: have as many keys, and the argument ``offsets`` says how many
PADDED, EMPTY_DEFAULT, OFFSETS32, OPEN_END, EQUAL = 1, 2, 4, 8, 16

DEFAULT_ROW = 1  # instead of the address of a row: the default
NO_ROW = -1  # instead of a row number, an int32 taken as unsigned
MAX_ROWS = (1 << 32) - 1  # a cache has fewer

THREADS = 128  # of a block
_MAX_BLOCKS = 1 << 20
_ROWS_OF_RUN = 16  # a run is long enough for a tile to walk through this many rows, if bags are short


def pool_lanes(dim: int) -> int:
    """Lanes that share a bag on a GPU: 16 bytes of a float32 row each, where possible."""
    pieces = dim // 4 if dim % 4 == 0 else dim
    return min(32, max(4, 1 << (pieces - 1).bit_length()))


def fits_shared(dim: int, row_type: int) -> bool:
    """Rows in flight go to shared memory on a GPU that can (compute capability 8.0): pieces of 16 bytes, in up to 32 KiB."""
    return row_type == FLOAT32 and dim % 4 == 0 and dim <= 256


def pool_registers(dim: int, row_type: int, *, copies: bool = True) -> int:
    """Maximum registers of a thread: for 20 warps on a multiprocessor, for 12 if rows in flight need registers too.

    ``copies``: the chip copies to shared memory asynchronously (sm_80 and later).
    """
    return 96 if copies and fits_shared(dim, row_type) else 168


def pool_run(bags: int, n: int, dim: int) -> int:
    """Bags that a tile takes at a time (the argument ``run``), for ``bags`` bags with ``n`` keys in all."""
    return max(1, min(pool_lanes(dim), _ROWS_OF_RUN * bags // max(n, 1), bags // 16384))


def pool_blocks(bags: int, dim: int, run: int = 1) -> int:
    """Blocks of ``THREADS`` threads for a launch of ``pool_kernel``."""
    return max(1, min(-(-bags // (run * (THREADS // pool_lanes(dim)))), _MAX_BLOCKS))
