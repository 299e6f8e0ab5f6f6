"""The words by which a device and threads of its host share the rows that a batch missed (``cache.gathering``).

A batch asks the host for a list of rows by their addresses in host memory. Threads claim chunks of it, copy the rows next to
each other into pinned memory, and mark each group of chunks that is complete; the copy engine of the device waits for that.
Whoever writes a word below is its only writer, but for the claims and counts of the host, which are atomic there. Atomic
operations across the bus are not needed.
"""

from __future__ import annotations

# in pinned host memory; the device writes the first two lines of 64 bytes, the host the others
ASKED = 0  # batch << 32 | rows that it asks for
(
    BATCHES_DONE,  # batches that the device has finished with
    HOST_ROWS,  # of the last of them: rows by way of the host, and nanoseconds until the last of them was there
    HOST_NS,
    DIRECT_ROWS,  # and those that the device read in place
    DIRECT_NS,
) = (64 + 8 * i for i in range(5))
CLAIMED = 128  # batch << 32 | chunks of it that threads have claimed
BATCHES_STARTED = 192
# constant: addresses of int64 [n] (those of rows), of the rows; rows of a chunk, bytes from row to row, bytes of a row
ADDRESSES, ROWS, CHUNK, STRIDE, ROW_BYTES = (256 + 8 * i for i in range(5))
FLIGHTS = 8  # batches that may be on their way to the device
GROUP_CHUNKS = 320  # chunks of a group, for each of the last FLIGHTS batches
MAX_GROUPS = 32
READY = 384  # of each group: the last batch in which it was complete
COUNTS = READY + 8 * MAX_GROUPS  # of each group: chunks that are there
SHARED_BYTES = COUNTS + 8 * MAX_GROUPS

# in the memory of the device
(
    TICKET,  # blocks of the last kernel that have ended
    GATHERED,  # rows of the batch by way of the host
    UNRESOLVED,  # keys of the batch that were listed without the address of their row
    STARTED_NS,
    HOST_ENDED_NS,
    DIRECT_ENDED_NS,
    # constant
    SHARED,  # address of the words above
    LANDING,  # address of rows that the host has gathered
    RESOLVED,  # address of int64 [n, 3] in the order of the list: address of the row or 0, index word, generation
    LISTED,  # address of int64 [n] in the order of regions: address of the row or 0
    FOUND,  # address of int64 [n, 2] in the order of regions: index word, generation
) = (8 * i for i in range(11))
DEVICE_BYTES = 128

# of all threads of a process: words of host memory
(
    CALLS,  # goes up with each batch; threads sleep on its low half
    SLEEPERS,
    STOP,
    COUNT,  # entries of the table that may be in use
) = (64 * i for i in range(4))
TABLE = 256  # addresses of the pinned words of each user, or 0
MAX_USERS = 128
STATES = TABLE + 8 * MAX_USERS  # of each thread: 0 while it looks at no entry, else a number that changes with each look
MAX_THREADS = 64
CONTROL_BYTES = STATES + 64 * MAX_THREADS
