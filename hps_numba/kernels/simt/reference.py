"""The memory and warp operations with which cache kernels are written: in plain Python, for a tile of one lane.

A kernel is written once, for a *tile*: a few lanes of a warp that serve one key or one set together and take every branch
together. It calls the memory and lane operations of this module. Here they work on addresses of this process and on a tile of
one lane, so that a kernel runs as plain Python and in numba's CUDA simulator, which has no warp functions.
``compiler.specialize`` replaces them: by ``simt.cpu`` for the CPU (one lane), and by ``simt.cuda`` for a GPU (a tile of 4 or 8
lanes, vector loads, ballots).

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
    "clock_ns",
    "count_in_warp",
    "count_one",
    "ctz",
    "fence",
    "fence_host",
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
    "probe_host_line",
    "probe_host_line_by_lane",
    "probe_line",
    "probe_line_by_lane",
    "probe_two_lines",
    "read_fence",
    "shfl",
    "st8",
    "st16",
    "st32",
    "st64",
    "st64_host",
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


def st64_host(address, value):
    """Store an int64 in host memory that the CPU reads."""
    ctypes.c_int64.from_address(int(address)).value = int(value)


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
    """The float32 whose bits a uint32 holds."""
    return np.uint32(bits).view(np.float32)


def fence():
    """Orders what comes before it before what comes after it: loads and stores, as other threads of the device see them."""


def fence_host():
    """``fence``, as the CPU sees them too."""


def clock_ns():
    """Nanoseconds of a clock of the whole device; 0 where there is none."""
    return 0


def read_fence():
    """No load that comes after it is done before those that come before it."""


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


def count_one(address):
    """Add 1 to an int64; returns what was there. Lanes of a warp that come here together make one addition."""
    return add64(address, 1)


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
    """``count`` int64 (0 to 16) that only this lane sees while the function runs; they are not cleared."""
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
    """Bit t: the lanes of tile t voted; all lanes of a tile vote alike."""
    return votes


def popcount(bits):
    """Number of bits that are set."""
    return int(bits).bit_count()


def ctz(bits):
    """Number of the lowest bit that is set; there is one."""
    return (bits & -bits).bit_length() - 1


def shfl(value, number):
    """The ``value`` of lane ``number`` of the warp."""
    return value


def sync_warp():
    """Lanes of a warp wait for each other; each sees what the others have stored."""


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
    """Some lane of the warp has it. Branches that the tiles of a warp take together are branches on this."""
    return condition


def all_in_tile(condition):
    """All lanes of the tile have it."""
    return condition


def count_in_warp(condition):
    """Tiles of the warp that have it."""
    return 1 if condition else 0


def max_in_tile(value):
    """The largest ``value`` of the lanes of the tile."""
    return value


def from_first_lane(value):
    """The ``value`` of the first lane of the tile."""
    return value


def sync_tile():
    """Lanes of a tile wait for each other; each sees what the others have stored."""


def grid_dependency_sync():
    """Wait until the work before this kernel on its stream is done: the first thing that a kernel does."""


def noinline():
    """Keep the function that calls this from being inlined, so that a rare path takes no registers from the common one.

    Call such a function from one that does little else: numba clears local memory for its result at the beginning of the
    calling function, and on the common path each thread would write to it.
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


def probe_line_by_lane(line, key):
    """``(entry, tags)`` of a key in a line, by one lane: the address of the key or 0, and score << 32 | meta."""
    way, meta, score = probe_line(line, key)
    return (line + 8 * way if way >= 0 else 0), score << 32 | meta


def probe_two_lines(line, other, key):
    """``(entry, tags)`` of a key in two lines, by a tile that reads both at once; without it, ``tags`` are those of ``other``.

    All tiles of a warp together.
    """
    entry, tags = probe_line_by_lane(line, key)
    return (entry, tags) if entry != 0 else probe_line_by_lane(other, key)


def probe_host_line(line, key, active):
    """``(word, settled)`` of a key in a line of the host store's index: EMPTY if it is not there.

    The search is settled if it ends here: with the key, or with an entry that was never used. ``active``: this tile searches.
    """
    if not active:
        return EMPTY, True
    for entry in range(ENTRIES_PER_LINE):
        word = ld64_host(line + ENTRY_BYTES * entry + 8)
        if word == EMPTY:
            return EMPTY, True
        if ld64_host(line + ENTRY_BYTES * entry) == key:
            return word, True
    return EMPTY, False


def probe_host_line_by_lane(line, key):
    """``probe_host_line`` by one lane, of an index that is in the memory of the device."""
    return probe_host_line(line, key, True)
