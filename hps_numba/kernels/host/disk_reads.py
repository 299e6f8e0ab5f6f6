"""Read rows of a ``row_log`` at their locations: from a mapping, by ``pread``, or by an io_uring (Linux only).

All three have the same arguments. A row is copied only if its checksum is right and its key the wanted one; what could not be
served, for whatever reason, is left for the caller, who reads it again with all its time.

Common arguments:
    keys, locations: int64 ``[n]``; location 0 is a key without a row.
    first, segments: segments from number ``first`` on, int64 ``[m, SEGMENT_FIELDS]``; descriptor -1 is one that is gone.
    slot_size, row_bytes: of the table.   out: address of float32 rows, ``row_bytes`` apart.
    unserved: uint8 ``[n]``, set to 1 where a row was not copied though there is a location, else to 0.

Segments are passed on by address: for an array that a function gets, numba counts references, two locked instructions a call,
which took longer than to check and copy a row of 32 elements, and which threads get in each other's way with.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import array_address, load_word, prefetch_row, store_word
from hps_numba.kernels.host.row_log import take_row
from hps_numba.kernels.layouts.row_log import SEGMENT_FIELDS, UNIT_BITS, UNIT_MASK

__all__ = [
    "RING_BLOCK",
    "RING_BUFFERS",
    "RING_BUFFER_BYTES",
    "RING_CQES",
    "RING_CQ_HEAD",
    "RING_CQ_MASK",
    "RING_CQ_TAIL",
    "RING_DEPTH",
    "RING_FD",
    "RING_FIELDS",
    "RING_SQES",
    "RING_SQ_MASK",
    "RING_SQ_TAIL",
    "disk_mapped",
    "disk_pread",
    "disk_resident",
    "disk_ring",
]

#: words that describe a ring: descriptor, addresses of its heads, tails and entries, masks, depth, buffers of the reads
RING_FD, RING_SQ_TAIL, RING_SQ_MASK, RING_SQES, RING_CQ_HEAD, RING_CQ_TAIL, RING_CQ_MASK, RING_CQES = range(8)
RING_DEPTH, RING_BUFFERS, RING_BUFFER_BYTES, RING_BLOCK, RING_FIELDS = range(8, 13)

_FIELDS_BYTES = 8 * SEGMENT_FIELDS
_MAP, _MAP_BYTES, _SEED = 8, 16, 24  # bytes from the fields of a segment to its mapping, its bytes, its seed
_AHEAD = 16
_PAGE = 4096
_SAMPLES = 32
_IO_URING_ENTER, _GETEVENTS, _OP_READ = 426, 1, 22
_MAX_REFUSALS = 10_000  # calls of the kernel in a row that did nothing: a signal interrupts one now and then

_pread = types.ExternalFunction("pread", types.int64(types.int32, types.int64, types.uint64, types.int64))
_mincore = types.ExternalFunction("mincore", types.int32(types.int64, types.uint64, types.int64))
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_HALF = ir.IntType(32)


@intrinsic
def _load_half(typingctx, address):
    """The uint32 at ``address``, as int64; what was written before its release is visible after."""

    def codegen(context, builder, signature, args):
        half = builder.load_atomic(builder.inttoptr(args[0], _HALF.as_pointer()), "acquire", 4)
        return builder.zext(half, ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def _store_half(typingctx, address, value):
    """Store the low half of ``value`` after everything written before it."""

    def codegen(context, builder, signature, args):
        half = builder.trunc(args[1], _HALF)
        builder.store_atomic(half, builder.inttoptr(args[0], _HALF.as_pointer()), "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@host_function
def _segment_of(location, first, table, count):
    """Address of the fields of the segment of a location, of ``count`` at ``table``; 0 if it is not among them."""
    number = (location >> UNIT_BITS) - first
    if number < 0 or number >= count:
        return 0
    fields = table + number * _FIELDS_BYTES
    return fields if load_word(fields) >= 0 else 0


@host_function
def _mapped_address(fields, location, slot_size):
    """Address of a slot in the mapping of its segment, whose fields are at ``fields``, or 0; 0 if it is not mapped."""
    offset = (location & UNIT_MASK) * 8
    if fields == 0 or offset + slot_size > load_word(fields + _MAP_BYTES):
        return 0
    return load_word(fields + _MAP) + offset


@host_kernel
def disk_resident(locations, first, segments, slot_size):
    """Whether all of a sample of the mapped rows are in the page cache."""
    vector = np.zeros(1, np.uint8)
    at, table, count = array_address(vector), array_address(segments), len(segments)
    step = max(1, len(locations) // _SAMPLES)
    for i in range(0, len(locations), step):
        if locations[i] == 0:
            continue
        slot = _mapped_address(_segment_of(locations[i], first, table, count), locations[i], slot_size)
        if slot == 0:
            continue
        for end in (slot, slot + slot_size - 1):
            if _mincore(end & ~(_PAGE - 1), _PAGE, at) != 0 or vector[0] & 1 == 0:
                return False
    return True


@host_kernel
def disk_mapped(keys, locations, start, stop, first, segments, slot_size, row_bytes, out, unserved):
    """Copy the rows ``start`` to ``stop`` from mappings; returns how many were not served.   **Writes:** out, unserved."""
    table, count = array_address(segments), len(segments)
    left = 0
    for i in range(start - _AHEAD, stop):
        ahead = i + _AHEAD
        if ahead < stop and locations[ahead] != 0:
            slot = _mapped_address(_segment_of(locations[ahead], first, table, count), locations[ahead], slot_size)
            if slot != 0:
                prefetch_row(slot, slot_size)
        if i < start:
            continue
        unserved[i] = 0
        if locations[i] == 0:
            continue
        fields = _segment_of(locations[i], first, table, count)
        slot = _mapped_address(fields, locations[i], slot_size)
        if slot != 0:
            seed = load_word(fields + _SEED)
            if take_row(slot, keys[i], slot_size, row_bytes, seed, locations[i] & UNIT_MASK, out + i * row_bytes):
                continue
        unserved[i] = 1
        left += 1
    return left


@host_kernel
def disk_pread(keys, locations, start, stop, first, segments, slot_size, row_bytes, out, unserved, buffer, block):
    """Copy the rows ``start`` to ``stop`` by one ``pread`` each; returns how many were not served.

    Args:
        buffer: address, aligned to ``block``, of space for a slot and two blocks.
        block: bytes that offsets and lengths of reads must be a multiple of.

    **Writes:** out, unserved, buffer.
    """
    table, count = array_address(segments), len(segments)
    left = 0
    for i in range(start, stop):
        unserved[i] = 0
        if locations[i] == 0:
            continue
        unserved[i] = 1
        left += 1
        fields = _segment_of(locations[i], first, table, count)
        if fields == 0:
            continue
        unit = locations[i] & UNIT_MASK
        begin = 8 * unit & ~(block - 1)
        head = 8 * unit - begin
        size = (head + slot_size + block - 1) & ~(block - 1)
        if _pread(load_word(fields), buffer, size, begin) < head + slot_size:
            continue
        if take_row(buffer + head, keys[i], slot_size, row_bytes, load_word(fields + _SEED), unit, out + i * row_bytes):
            unserved[i] = 0
            left -= 1
    return left


@host_function
def _queue_read(ring, tail, buffer_number, fd, begin, size):
    """Write the entry of one read for the ring at an address; it is submitted with the tail.

    **Writes:** submission entries, tail.
    """
    entry = load_word(ring + 8 * RING_SQES) + 64 * (tail & load_word(ring + 8 * RING_SQ_MASK))
    store_word(entry, _OP_READ | fd << 32)
    store_word(entry + 8, begin)
    buffers, buffer_bytes = load_word(ring + 8 * RING_BUFFERS), load_word(ring + 8 * RING_BUFFER_BYTES)
    store_word(entry + 16, buffers + buffer_number * buffer_bytes)
    store_word(entry + 24, size)
    store_word(entry + 32, buffer_number)
    for rest in range(40, 64, 8):
        store_word(entry + rest, 0)
    _store_half(load_word(ring + 8 * RING_SQ_TAIL), tail + 1)


@host_kernel
def disk_ring(keys, locations, start, stop, first, segments, slot_size, row_bytes, out, unserved, ring):
    """Copy the rows ``start`` to ``stop`` by an io_uring, as many at a time as it is deep.

    Args:
        ring: int64 ``[RING_FIELDS]``, used by nobody else.

    Returns how many were not served, and whether the ring is idle: if not, its reads may still write to its buffers.
    **Writes:** out, unserved, the ring and its buffers.
    """
    table, count = array_address(segments), len(segments)
    depth, block, at = ring[RING_DEPTH], ring[RING_BLOCK], array_address(ring)
    free = np.arange(depth)
    wanted = np.empty(depth, np.int64)
    unused = depth
    tail = _load_half(ring[RING_SQ_TAIL])
    left = unsubmitted = refusals = 0
    i = start
    while i < stop or unused < depth:
        while i < stop and unused > 0:
            unserved[i] = 0
            fields = _segment_of(locations[i], first, table, count) if locations[i] != 0 else 0
            if locations[i] != 0:
                unserved[i] = 1
                left += 1
            if fields != 0:
                begin = 8 * (locations[i] & UNIT_MASK) & ~(block - 1)
                end = (8 * (locations[i] & UNIT_MASK) + slot_size + block - 1) & ~(block - 1)
                unused -= 1
                wanted[free[unused]] = i
                _queue_read(at, tail, free[unused], load_word(fields), begin, end - begin)
                tail += 1
                unsubmitted += 1
            i += 1
        pending = depth - unused
        if pending == 0:
            continue
        least = max(1, pending // 4) if i < stop else pending
        taken = _syscall(_IO_URING_ENTER, ring[RING_FD], unsubmitted, least, _GETEVENTS, 0, 0)
        unsubmitted -= max(taken, 0)
        head, end = _load_half(ring[RING_CQ_HEAD]), _load_half(ring[RING_CQ_TAIL])
        refusals = refusals + 1 if taken < 0 and head == end else 0
        if refusals > _MAX_REFUSALS:
            for rest in range(i, stop):
                unserved[rest] = locations[rest] != 0
                left += unserved[rest]
            return left, False
        while head != end:
            entry = ring[RING_CQES] + 16 * (head & ring[RING_CQ_MASK])
            number = load_word(entry)
            done = np.int64(np.int32(load_word(entry + 8)))
            j = wanted[number]
            unit = locations[j] & UNIT_MASK
            begin = (8 * unit) & (block - 1)
            seed = load_word(_segment_of(locations[j], first, table, count) + _SEED)
            slot = ring[RING_BUFFERS] + number * ring[RING_BUFFER_BYTES] + begin
            whole = done >= begin + slot_size
            if whole and take_row(slot, keys[j], slot_size, row_bytes, seed, unit, out + j * row_bytes):
                unserved[j] = 0
                left -= 1
            free[unused] = number
            unused += 1
            head = (head + 1) & 0xFFFFFFFF
        _store_half(ring[RING_CQ_HEAD], head)
    return left, True
