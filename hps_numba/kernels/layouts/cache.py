"""The bytes of an embedding cache on a device: sets, lines, ways, its state, and the workspace of one batch.

::

    set (128 bytes)     two lines; a key has a primary set with a primary line, and an alternate set, all by ``index_hash``
    line (64 bytes)     what one read of memory brings: 5 ways
        0..39           5 int64 keys
        40..59          5 uint32 scores; in a fixed cache (static, uvm) the number of the row instead
        60..63          meta, uint32: which ways are occupied, whether a writer is at work, a version
    rows                way w of line l: row 5 * l + w at  rows + row * row_stride

    meta                bits 0-4   way is occupied (no key is special: occupancy lives here)
                        bit 5      OVERFLOW: a key with this primary set may be in its alternate set
                        bit 6      BUSY: a writer is changing keys or rows of this line
                        bit 7      LOCK: in the first line of a set, one writer owns both
                        bits 8-31  version, incremented with each change

*Why 64 bytes.* The GPU reads its memory 64 bytes at a time: a line of keys, scores and version is one access, so that recency
and the check of the version cost no further one. *How a reader needs no lock.* It reads the line, copies the row, then reads
key and meta again: if nothing has changed, the row was that of the key (a sequence lock; Christoph Lameter, "Effective
synchronization on Linux/NUMA systems", Gelato Conference 2005). If something changed, the host store answers: it is
authoritative.
"""

from __future__ import annotations

WAYS_PER_LINE = 5
LINES_PER_SET = 2
WAYS = WAYS_PER_LINE * LINES_PER_SET
LINE_BYTES = 64
SET_BYTES = LINE_BYTES * LINES_PER_SET
SCORES_AT, META_AT = 8 * WAYS_PER_LINE, 60

OCCUPIED, OVERFLOW, BUSY, LOCK, VERSION = 0x1F, 0x20, 0x40, 0x80, 0x100

# state of a cache, in its device's memory: words, then counters and guards in stripes, so that no address is contended
(
    STATE_NOW,  # the clock of the policy
    STATE_HOST,  # address of the descriptor of the host store, or 0
    STATE_KEYS,  # counters: keys looked up
    STATE_CALLS,
    STATE_INSERTED,
    STATE_EVICTED,
    STATE_STALE_DROPPED,  # rows that changed in the host store on their way to the cache
    STATE_COUNT,  # result of an erasure or a dump
    STATE_PENDING,  # address of uint32 [ways]: hits of this batch, for policies that need counts
    STATE_REFUSED,  # candidates that the policy did not admit
    STATE_CAPACITY,  # ways of the cache
    STATE_TOLD,  # how far a clock of insertions has followed: TICKS_OF_A_CACHE * rows, less what is no whole tick yet
    STATE_CHANGES,  # from 1 on: incremented before a change of rows begins, and by CLEARED before all are dropped
) = (8 * i for i in range(13))
TICKS_OF_A_CACHE = 64  # of a clock of insertions, while as many rows are inserted as the cache has ways
CLEARED = 1 << 32
STRIPES, STRIPE_BYTES, STRIPES_AT = 64, 32, 1024  # misses of the cache, keys that the host store lacks too
HOST_RING, RING_ENTRIES = 4096, 64  # descriptors of the host store; STATE_HOST points to the one in force, or is 0
# index block, its lines, the rows; for a mirror of the index the shift from a slot to a region of the rows, else -1; generation
DESC_BLOCK, DESC_LINES, DESC_ROWS, DESC_SHIFT, DESC_GENERATION, DESC_BYTES = 0, 8, 16, 24, 32, 64
GUARD_STRIPES = 8192  # uint32 counts of warps that began, and ended, to read host memory
GUARD_ENTERED = HOST_RING + RING_ENTRIES * DESC_BYTES
GUARD_LEFT = GUARD_ENTERED + 4 * GUARD_STRIPES
NO_LISTS = GUARD_LEFT + 4 * GUARD_STRIPES  # the workspace of a batch that leaves nothing to do: all of it is 0
STATE_BYTES = NO_LISTS + 192

# workspace of one batch: words, the rest by address
(
    WORKSPACE_BATCH,  # number of the batch, counted up by the insertion that ends it
    WORKSPACE_LISTED,  # sets that have candidates
    WORKSPACE_TICKET,  # blocks of the insertion that have ended
    WORKSPACE_KEYS,  # address of int64 [n]: keys of the missing positions
    WORKSPACE_WORDS,  # address of int64 [n, 2]: index word in the host store, and its generation or 0 if there is no host store
    WORKSPACE_STAGE,  # address of float32 rows [n], or 0: rows of the missing positions
    WORKSPACE_STAGE_STRIDE,  # bytes from row to row there
    WORKSPACE_BUCKETS,  # address of the buckets, one a set with candidates; 0: candidates are not listed
    WORKSPACE_MASK,  # number of buckets - 1
    WORKSPACE_LIST,  # address of int64: numbers of the buckets in use
    WORKSPACE_ABSENT,  # keys found in no tier
    WORKSPACE_ABSENT_LIST,  # address of int64 [n]: their positions, or 0
    WORKSPACE_ASSUME,  # 1: keys that the cache lacks are candidates although there is no host store
    WORKSPACE_COUNTS,  # address of the counts of keys in the batch, or 0
    WORKSPACE_TOUCHED,  # ways touched by a policy that needs counts
    WORKSPACE_TOUCHED_LIST,  # address of int64 [n]: their rows
    WORKSPACE_COUNTS_MASK,  # number of the counts - 1
    # of the policy for which the workspace was made; memory that lives as long as a graph may use the workspace
    WORKSPACE_SET_STATES,  # address of uint32 [sets, words]: what the policy remembers of each set
    WORKSPACE_SKETCH,  # address of the frequency sketch, see kernels.cache.sketch
    WORKSPACE_SKETCH_WORDS,
    WORKSPACE_SKETCH_SHIFT,
    WORKSPACE_MISSED,  # address of the list of missed keys (``list_kernel``)
    WORKSPACE_CHANGES,  # STATE_CHANGES when the batch began; negative: when the one before it ended; 0: not known
    WORKSPACE_OWN_LIST,  # address of a list of missed keys that belongs to the workspace, or 0; WORKSPACE_MISSED too
) = (8 * i for i in range(24))
WORKSPACE_BYTES = STATE_BYTES - NO_LISTS

# list of the keys that a batch missed, for a kernel of its own or for the host: words, counts, then int64 [n, 2]: place, key
(
    MISSED_COUNT,
    MISSED_OUT,  # address of the answers of the batch, or 0
    MISSED_TICKET,  # blocks of the kernel that serves them that have ended
    MISSED_KEYS,  # address of int64 [n] in pinned host memory: the keys again; or 0
    MISSED_SELF,  # address of these words
    MISSED_SORTED,  # address of int64 [n, 2]: position and key in the order of regions
    MISSED_GATHERING,  # address of the words of the gathering by threads of the host (``layouts.gathering``), or 0
) = (8 * i for i in range(7))
# int64: how many are listed of each region of the host store's rows; two regions for each lane of a warp (``miss_sorted``)
MISSED_COUNTS, REGIONS = 256, 64
MISSED_BYTES = MISSED_COUNTS + 8 * REGIONS
# place: position in the batch and, if it is listed by region, the region and the number of the key among those of the region
PLACE_REGION, PLACE_RANK = 24, 32  # bits

# bucket: word of its set (batch << 32 | set), then the lowest WAYS positions: (~batch << POSITION_BITS) | position, ascending
BUCKET_BYTES = 128
BUCKET_POSITIONS = 8
POSITION_BITS = 24
MAX_BATCH = 1 << POSITION_BITS
KEYS_OF_A_BLOCK_AFTER = 256  # of a lookup: for each block of the kernels that follow it, beyond the fewest
BATCH_MASK = (1 << 39) - 1
# These belong together. A bucket begins with UNUSED_BUCKET in every byte; positions of a batch from FIRST_BATCH on are smaller
# than that, as they count down, so that they displace it. Those of batch 0 would be larger: it would list nothing.
UNUSED_BUCKET = 0x7F
FIRST_BATCH = 1 << 32

# table of a group, in the memory of its device: what the kernels for several tables take of each
(
    TABLE_LINES,
    TABLE_ROWS,
    TABLE_SETS,
    TABLE_STATE,
    TABLE_DEFAULT,  # bits of a float32
    TABLE_WORKSPACE,
    TABLE_STAGE,
    TABLE_STAGE_STRIDE,
    TABLE_CAPACITY,
) = (8 * i for i in range(9))
TABLE_BYTES = 128
MAX_TABLES = 32  # of a launch
TABLE_WORDS = 3  # that vary from call to call and are arguments of the kernels: keys, n, out
