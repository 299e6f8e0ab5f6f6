"""Memory and lanes as the cache kernels use them: plain-Python stand-ins, with the names that kernels are written with.

A kernel is written once, for a *tile*: a few lanes of a warp that serve one key or one set together and take every branch
together. It names its memory operations and lane operations as functions of this module. As they stand here they work on
addresses of this process and on a tile of one lane, so that a kernel runs as plain Python and in numba's CUDA simulator, which
has no warp functions. ``compiler.specialize`` puts others in their place: ``kernels.simt.cpu`` for the CPU (one lane), and
``kernels.simt.cuda`` for a GPU (a tile of 4 or 8 lanes, vector loads, votes).

Addresses, keys and words are int64; a uint32 is an int64 in 0..2**32-1.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np

from hps_numba.kernels.layouts.cache import META_AT, OCCUPIED, SCORES_AT, WAYS_PER_LINE
from hps_numba.kernels.layouts.host_store import EMPTY, ENTRIES_PER_LINE, ENTRY_BYTES

__all__ = [
    "add32",
    "add64",
    "all_in_tile",
    "any_in_warp",
    "ballot",
    "bits_float",
    "block_number",
    "block_tiles",
    "cas32",
    "cas64",
    "count_in_warp",
    "ctz",
    "fence",
    "float_bits",
    "from_first_lane",
    "grid_blocks",
    "grid_dependency_sync",
    "grid_row",
    "grid_rows",
    "grid_tiles",
    "grid_warps",
    "is_block_leader",
    "is_first_lane",
    "is_grid_leader",
    "is_warp_leader",
    "lane",
    "lane_in_warp",
    "ld8",
    "ld16",
    "ld32",
    "ld64",
    "ld64_host",
    "local_words",
    "max64",
    "max_in_tile",
    "min64",
    "noinline",
    "popcount",
    "probe_alone",
    "probe_both",
    "probe_host_line",
    "probe_line",
    "shfl",
    "st8",
    "st16",
    "st32",
    "st64",
    "sync_block",
    "sync_tile",
    "sync_warp",
    "tile_in_warp",
    "tile_number",
    "tiles_in_warp",
    "tiles_of",
    "warp_number",
]

_atomic = threading.RLock()  # the simulator runs a block's threads as threads


# -- memory ---------------------------------------------------------------------


def ld64(address):
    """The int64 at ``address``, as other threads of the device see it."""
    return ctypes.c_int64.from_address(int(address)).value


def ld64_host(address):
    """The int64 at ``address`` of host memory that the CPU may be writing."""
    return ctypes.c_int64.from_address(int(address)).value


def ld32(address):
    """The uint32 at ``address``."""
    return ctypes.c_uint32.from_address(int(address)).value


def st64(address, value):
    """Store an int64."""
    ctypes.c_int64.from_address(int(address)).value = int(value)


def st32(address, value):
    """Store a uint32."""
    ctypes.c_uint32.from_address(int(address)).value = int(value) & 0xFFFFFFFF


def ld16(address):
    """The uint16 at ``address``."""
    return ctypes.c_uint16.from_address(int(address)).value


def ld8(address):
    """The uint8 at ``address``."""
    return ctypes.c_uint8.from_address(int(address)).value


def st16(address, value):
    """Store a uint16."""
    ctypes.c_uint16.from_address(int(address)).value = int(value) & 0xFFFF


def st8(address, value):
    """Store a uint8."""
    ctypes.c_uint8.from_address(int(address)).value = int(value) & 0xFF


def float_bits(value):
    """The bits of a float32 as a uint32."""
    return int(np.float32(value).view(np.uint32))


def bits_float(bits):
    """The float32 that a uint32 holds the bits of."""
    return np.uint32(bits).view(np.float32)


def fence():
    """What was stored before is seen before what is stored after; what was loaded before was loaded before."""


def cas32(address, expected, value):
    """Store ``value`` if ``expected`` is there; returns what was there."""
    with _atomic:
        old = ld32(address)
        if old == expected:
            st32(address, value)
        return old


def cas64(address, expected, value):
    """As ``cas32`` for an int64."""
    with _atomic:
        old = ld64(address)
        if old == expected:
            st64(address, value)
        return old


def add32(address, value):
    """Add to a uint32; returns what was there."""
    with _atomic:
        old = ld32(address)
        st32(address, old + value)
        return old


def add64(address, value):
    """Add to an int64; returns what was there."""
    with _atomic:
        old = ld64(address)
        st64(address, old + value)
        return old


def min64(address, value):
    """Store the smaller of two int64; returns what was there."""
    with _atomic:
        old = ld64(address)
        st64(address, min(old, value))
        return old


def max64(address, value):
    """Store the larger of two int64; returns what was there."""
    with _atomic:
        old = ld64(address)
        st64(address, max(old, value))
        return old


def local_words(count):
    """``count`` int64 that only this lane sees while the function runs, 0 to 16; what stands there is not cleared."""
    return [0] * count


# -- lanes: a tile of one, a warp of one tile ---------------------------------------------------------------------


def lane():
    """Number of this lane in its tile."""
    return 0


def is_first_lane():
    """This lane stores for its tile."""
    return True


def tile_in_warp():
    """Number of this tile in its warp."""
    return 0


def lane_in_warp():
    """Number of this lane in its warp."""
    return 0


def ballot(condition):
    """Bit i: lane i of the warp has the condition."""
    return 1 if condition else 0


def tiles_of(votes):
    """Bit t: the lanes of tile t voted for it, all or none of each tile."""
    return votes


def popcount(bits):
    """Number of bits that are set."""
    return int(bits).bit_count()


def ctz(bits):
    """Number of the lowest bit that is set; some bit is."""
    return (bits & -bits).bit_length() - 1


def shfl(value, number):
    """What lane ``number`` of the warp has."""
    return value


def sync_warp():
    """Lanes of a warp wait for each other; what they stored is seen by all of them."""


def grid_warps():
    """Warps in the grid."""
    return 1


def tiles_in_warp():
    """Tiles in a warp."""
    return 1


def warp_number():
    """Number of this warp in the grid."""
    return 0


def tile_number():
    """Number of this tile in the grid."""
    return 0


def grid_tiles():
    """Tiles in the grid."""
    return 1


def block_number():
    """Number of this block in the grid."""
    return 0


def block_tiles():
    """Tiles in a block."""
    return 1


def grid_blocks():
    """Blocks in the grid."""
    return 1


def grid_row():
    """Number of this row of blocks in the grid; blocks, warps and tiles are counted within their row."""
    return 0


def grid_rows():
    """Rows of blocks in the grid."""
    return 1


def is_grid_leader():
    """This lane is the first of its row of the grid."""
    return True


def is_block_leader():
    """This lane is the first of its block."""
    return True


def is_warp_leader():
    """This lane is the first of its warp."""
    return True


def any_in_warp(condition):
    """Some lane of the warp has it: branches that tiles of a warp take together are branches on this."""
    return condition


def all_in_tile(condition):
    """All lanes of the tile have it."""
    return condition


def count_in_warp(condition):
    """Tiles of the warp that have it."""
    return 1 if condition else 0


def max_in_tile(value):
    """The largest of what the lanes of the tile have."""
    return value


def from_first_lane(value):
    """What the first lane of the tile has."""
    return value


def sync_tile():
    """Lanes of a tile wait for each other; what they stored is seen by all of them."""


def grid_dependency_sync():
    """Wait until the work before this kernel on its stream is done: nothing else may come before this in a kernel."""


def noinline():
    """Keep the function that calls this out of its callers, so that what is rare takes no registers from what is not.

    Such a function is called from one that does little else: numba clears memory for its result where the calling function
    begins, so that each thread would write to memory on the way that is not rare.
    """


def sync_block():
    """Threads of a block wait for each other."""


# -- search ---------------------------------------------------------------------


def probe_line(line, key):
    """``(way, meta, score)`` of a key in a line of the cache, way -1 if it is not there."""
    meta = ld32(line + META_AT)
    for way in range(WAYS_PER_LINE):
        if (meta & OCCUPIED) >> way & 1 and ld64(line + 8 * way) == key:
            return way, meta, ld32(line + SCORES_AT + 4 * way)
    return -1, meta, 0


def probe_alone(line, key):
    """``(entry, tags)`` of a key in a line, by one lane: the address of the key or 0, and score << 32 | meta."""
    way, meta, score = probe_line(line, key)
    return (line + 8 * way if way >= 0 else 0), score << 32 | meta


def probe_both(line, other, key):
    """``probe_alone`` of two lines by a tile, both read at once; the meta is that of the line with the key, else of ``other``.

    All tiles of a warp together.
    """
    entry, tags = probe_alone(line, key)
    return (entry, tags) if entry != 0 else probe_alone(other, key)


def probe_host_line(line, key, wanted):
    """``(word, settled)`` of a key in a line of the host store's index: EMPTY if it is not there.

    It is settled if the search ends here: the key was found, or an entry that was never used. ``wanted``: this tile searches.
    """
    if not wanted:
        return EMPTY, True
    for entry in range(ENTRIES_PER_LINE):
        word = ld64_host(line + ENTRY_BYTES * entry + 8)
        if word == EMPTY:
            return EMPTY, True
        if ld64_host(line + ENTRY_BYTES * entry) == key:
            return word, True
    return EMPTY, False
