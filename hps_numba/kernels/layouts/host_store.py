"""The bytes of a host store: header, index block, index word, rows. Read by CPU and CUDA kernels alike.

Everything is made of 64-bit words in native (little-endian) order::

    header (64 bytes, one a table, at the same address for the life of the server)
        word 0   address of the index block now in force; swung by one atomic store
    index block (64-byte aligned, immutable but for its entries)
        meta     8 words: number of lines, address of the rows, bytes a row, address of the recency words (0: none),
                 recency mode, generation (of the version, see below), 0, 0
        lines    64 bytes each: ENTRIES_PER_LINE entries of (key, index word)
    rows         slot s at  rows + s * row_bytes, float32, never moved: growth rebuilds the index only
    recency      slot s at  recency + 8 * s, one word a slot, only where the overflow policy needs it

    index word   0                        the entry was never used: a probe ends here
                 low 40 bits = 1          erased; the key stays, so that a probe goes on
                 low 40 bits = slot + 2   the row of ``key`` is in ``slot``
                 next 23 bits             how often the slot was used before, so that a word tells two of its rows apart

    generation               no two versions of any tables have the same; a version gets another one after GENERATION_WRITES
                             writes at most. A word can recur only after a slot was used 2**23 times: so while the generation
                             is the same, the same word is the same row

*Why one pointer in the header.* A reader that loaded the index address and the number of lines one after the other could see
one of the old and one of the new table. Hanging both behind a single pointer makes every snapshot consistent, for a host
thread and for a kernel in a captured graph. *Why no special key.* Every int64 is a legal key, so occupancy lives in the word.
*Why lines and not single slots.* A probe reads whole 64-byte lines; the primary line of a key is ``hash * lines >> 32``, so the
number of lines is free (not a power of two) and the memory of a table can be planned exactly.
"""

from __future__ import annotations

import math

__all__ = [
    "COUNTER_ABSENT",
    "COUNTER_BYTES",
    "COUNTER_CALLS",
    "COUNTER_KEYS",
    "COUNTER_LATENCY",
    "COUNTER_MISSES",
    "COUNTER_TIER_ERRORS",
    "COUNTER_TIER_HITS",
    "COUNTER_UNANSWERED",
    "DEFAULT_LOAD",
    "EMPTY",
    "ENTRIES_PER_LINE",
    "ENTRY_BYTES",
    "ERASED",
    "FIRST_SLOT",
    "GENERATION_WRITES",
    "HEADER_BYTES",
    "LINE_BYTES",
    "MAX_LOAD",
    "META_BYTES",
    "META_GENERATION",
    "META_LINES",
    "META_RECENCY",
    "META_RECENCY_MODE",
    "META_ROWS",
    "META_ROW_BYTES",
    "RECENCY_COUNT",
    "RECENCY_NONE",
    "RECENCY_TIME",
    "SLOT_BITS",
    "SLOT_MASK",
    "index_bytes",
    "lines_for",
]

HEADER_BYTES = 64
META_BYTES = 64
META_LINES, META_ROWS, META_ROW_BYTES, META_RECENCY, META_RECENCY_MODE, META_GENERATION = (8 * i for i in range(6))

LINE_BYTES = 64
ENTRY_BYTES = 16
ENTRIES_PER_LINE = LINE_BYTES // ENTRY_BYTES

SLOT_BITS = 40
GENERATION_WRITES = 1 << 22
SLOT_MASK = (1 << SLOT_BITS) - 1
EMPTY, ERASED, FIRST_SLOT = 0, 1, 2

RECENCY_NONE, RECENCY_COUNT, RECENCY_TIME = 0, 1, 2

# counters of a table (64 bytes): keys looked up, keys not in the host store, calls, keys found in slower tiers, keys that no
# tier has, keys answered with the default because a slower tier was late or failed, failures of slower tiers; and the address
# of the histogram of the times of lookups (``kernels.layouts.histogram``), or 0: none is timed
COUNTER_BYTES = 64
(
    COUNTER_KEYS,
    COUNTER_MISSES,
    COUNTER_CALLS,
    COUNTER_TIER_HITS,
    COUNTER_ABSENT,
    COUNTER_UNANSWERED,
    COUNTER_TIER_ERRORS,
    COUNTER_LATENCY,
) = (8 * i for i in range(8))

#: share of entries in use for which a new index is sized, and the share at which it is rebuilt
DEFAULT_LOAD = 0.50
MAX_LOAD = 0.75


def lines_for(rows: int, load: float = DEFAULT_LOAD) -> int:
    """Number of index lines for ``rows`` keys at the given load (at least 2)."""
    return max(2, math.ceil(rows / (ENTRIES_PER_LINE * load)))


def index_bytes(lines: int) -> int:
    """Bytes of an index block of ``lines`` lines."""
    return META_BYTES + lines * LINE_BYTES
