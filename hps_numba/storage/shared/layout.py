"""The bytes of a shared segment. Everything is made of native 64-bit words; the layout has a version of its own.

::

    page 0     magic, layout version, address, bytes, ...            the ``W_*`` words
    processes  BLOCKS pids, then BLOCKS start times                  who uses which block of reader records
    records    BLOCKS x RECORDS x 64 bytes                           the epoch of each reader; the last of a block is a guard
    regions    REGIONS x 64 bytes                                    which parts of the space are taken (``R_*``)
    tables     TABLES x 512 bytes                                    tag, width, header word, marks (``T_*``)
    space      page-aligned regions: the rows of a table, or its record with free list, recency and index (``C_*``)

A process locks byte ``BLOCK_LOCKS + i`` of the file as long as it uses block ``i``, byte ``WRITE_LOCK`` while it writes, and
byte ``CHANGE_LOCKS + i`` while it changes table ``i`` in all its tiers: the kernel drops such a lock when the process ends,
however it ends.
"""

from __future__ import annotations

__all__ = [
    "BATCHES", "BLOCKS", "BLOCK_LOCKS", "CHANGE_LOCKS", "CLAIM", "C_BATCHES", "C_BATCH_LIST", "C_DIM", "C_GENERATION",
    "C_LIMIT", "C_QUEUED", "C_RECENCY_MODE", "C_RENEWED_AT", "C_ROWS", "C_SERIAL", "C_STATE", "C_WORDS", "GUARD_RECORD",
    "LAYOUT_VERSION", "LOADING_LOCK", "MAGIC", "MAKING", "PAGE", "PIDS", "RECORDS", "RECORD_AREA", "RECORD_WORDS", "REGIONS",
    "REGION_AREA", "REGION_WORDS", "R_COMMITTED", "R_OFFSET", "R_OWNER", "R_SIZE", "R_TAG", "SPACE", "STARTS", "TABLES",
    "TABLE_AREA", "TABLE_BYTES", "TAG_BYTES", "T_CHANGER", "T_DIM", "T_ERASED", "T_HEADER", "T_IN_USE", "T_MAX_ROWS",
    "T_PATH", "T_POLICY", "T_REPLACED", "T_SOURCE", "T_STATE", "T_TAG", "T_TAG_LENGTH", "T_TARGET", "T_UNFINISHED",
    "T_WRITES", "WRITE_LOCK", "W_ADDRESS", "W_AUTO_REMOVE", "W_CREATOR", "W_CREATOR_START", "W_EPOCH", "W_LAYOUT", "W_MAGIC",
    "W_PUBLISHED", "W_SERIAL", "W_SIZE", "W_WRITER", "W_WRITER_START",
]  # fmt: skip

MAGIC = int.from_bytes(b"hpsnumba", "little")
MAKING = int.from_bytes(b"hpsnew\0\0", "little")  # instead of it until the segment is complete
LAYOUT_VERSION = 2
PAGE = 4096

# words of page 0; the epoch has a cache line of its own
W_MAGIC, W_LAYOUT, W_ADDRESS, W_SIZE, W_AUTO_REMOVE, W_CREATOR, W_CREATOR_START = range(7)
W_EPOCH = 8
W_SERIAL, W_WRITER, W_WRITER_START, W_PUBLISHED = range(16, 20)

BLOCKS, RECORDS, RECORD_WORDS = 512, 16, 8
GUARD_RECORD = RECORDS - 1
CLAIM = 1  # word of a guard record: a number that no other use of the block has
PIDS = PAGE
STARTS = PIDS + 8 * BLOCKS
RECORD_AREA = STARTS + 8 * BLOCKS

REGIONS, REGION_WORDS = 2048, 8
REGION_AREA = RECORD_AREA + BLOCKS * RECORDS * RECORD_WORDS * 8
# offset in the segment, bytes (0: not in use), bytes with memory, its owner (``regions``), epoch it was retired in
R_OFFSET, R_SIZE, R_COMMITTED, R_OWNER, R_TAG = range(5)

TABLES, TABLE_BYTES, TAG_BYTES = 512, 512, 256
TABLE_AREA = REGION_AREA + REGIONS * REGION_WORDS * 8
T_STATE, T_DIM, T_TAG_LENGTH, T_MAX_ROWS, T_POLICY, T_TARGET, T_UNFINISHED, T_WRITES = range(8)
T_HEADER = 8  # a cache line of its own
T_SOURCE = 16  # 4 words: what was loaded
T_REPLACED = 20  # not 0: ``replace_model`` brought it
T_CHANGER = 21  # the process that holds, or held, the lock of the table
T_PATH = 22  # up to the tag: the path it was loaded from, or the end of it
T_TAG = 32
T_IN_USE, T_ERASED = 1, 2

SPACE = TABLE_AREA + TABLES * TABLE_BYTES

# the record of a version of a table: the state words of its writer, then
C_STATE, C_LIMIT, C_ROWS, C_DIM, C_RECENCY_MODE, C_GENERATION, C_RENEWED_AT, C_QUEUED, C_BATCHES, C_SERIAL = 0, *range(8, 17)
C_BATCH_LIST, BATCHES = 32, 64  # pairs of an epoch and a number of slots, oldest first
C_WORDS = PAGE // 8

WRITE_LOCK, LOADING_LOCK, CHANGE_LOCKS, BLOCK_LOCKS = 0, 1, 512, 1024
