"""What a thread of the host does that gathers rows for devices: outside of Python, without the GIL, for as long as it lives.

It looks at the words of all users in turn (``kernels.layouts.gathering``), claims a chunk of rows that a device asks for, and
copies the rows past its caches into pinned memory; with the last chunk of a group it says so. A device waits for that, so a
thread must not stop for anything else: it takes no lock and calls only the scheduler, the clock and the futex of Linux.
"""

from __future__ import annotations

import platform

import numpy as np
from numba import types

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import (
    add_word,
    array_address,
    compare_word,
    copy_row,
    full_fence,
    load_word,
    load_word_acquire,
    prefetch_row,
    store_word,
    store_word_release,
    stream_row,
)
from hps_numba.kernels.layouts.gathering import (
    ADDRESSES,
    ASKED,
    BATCHES_DONE,
    BATCHES_STARTED,
    CALLS,
    CHUNK,
    CLAIMED,
    COUNT,
    COUNTS,
    FLIGHTS,
    GROUP_CHUNKS,
    READY,
    ROW_BYTES,
    ROWS,
    SLEEPERS,
    STOP,
    STRIDE,
    TABLE,
)

__all__ = ["FUTEX", "begin_batch", "gather_for_devices", "wake_gatherers"]

#: number of the system call, by processor; threads can only gather where it is known
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
_FUTEX = FUTEX  # a constant to the compiler
_WAIT, _WAKE = 128, 129  # of this process only
_EVERYBODY = 1 << 30
_AHEAD = 12  # rows that are asked for before they are copied
_AWAKE_NS = 150_000  # without any work, before a thread sleeps
_NAP_NS = 3_000_000  # with a batch that has not begun on its device, before a thread looks less often
_LOOKS = 64  # between two looks at the clock

_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@host_function
def _now(words):
    """Nanoseconds of a clock that only goes forward; ``words``: int64 ``[2]`` to use."""
    _clock_gettime(np.int32(1), array_address(words))
    return words[0] * 1_000_000_000 + words[1]


@host_function
def _gather_chunk(shared):
    """Claim and gather a chunk for one user; whether there was one."""
    asked = load_word_acquire(shared + ASKED)  # batch and rows are one word: they belong together
    batch, rows = asked >> 32, asked & 0xFFFFFFFF
    claimed = load_word(shared + CLAIMED)
    number = claimed & 0xFFFFFFFF if claimed >> 32 == batch else 0
    chunk = load_word(shared + CHUNK)
    if number * chunk >= rows or claimed >> 32 > batch:
        return False
    if compare_word(shared + CLAIMED, claimed, batch << 32 | (number + 1)) != claimed:
        return True
    # the batch does not end before this chunk is there, so that its words and the memory stay
    start, stop = number * chunk, min((number + 1) * chunk, rows)
    addresses, size, stride = load_word(shared + ADDRESSES), load_word(shared + ROW_BYTES), load_word(shared + STRIDE)
    target = load_word(shared + ROWS) + start * stride
    past_caches = size & 63 == 0
    for i in range(start, min(start + _AHEAD, stop)):
        prefetch_row(load_word(addresses + 8 * i), size)
    for i in range(start, stop):
        if i + _AHEAD < stop:
            prefetch_row(load_word(addresses + 8 * (i + _AHEAD)), size)
        row = load_word(addresses + 8 * i)
        if row != 0:
            if past_caches:
                stream_row(target, row, size)
            else:
                copy_row(target, row, size)
        target += stride
    full_fence()
    of_group = load_word(shared + GROUP_CHUNKS + 8 * (batch % FLIGHTS))
    group = number // of_group
    chunks = min(of_group, (rows + chunk - 1) // chunk - group * of_group)
    if add_word(shared + COUNTS + 8 * group, 1) == chunks - 1:
        store_word(shared + COUNTS + 8 * group, 0)
        store_word_release(shared + READY + 8 * group, batch)
    return True


@host_kernel
def gather_for_devices(control, state):
    """Gather for all users until STOP; sleeps while no batch has begun for a while.

    Args:
        control: address of the words of all threads.   state: address of this thread's word among ``STATES``.
    """
    words = np.zeros(2, np.int64)
    looks = np.int64(0)
    since = _now(words)
    while load_word_acquire(control + STOP) == 0:
        calls = load_word_acquire(control + CALLS)
        looks += 1
        store_word(state, looks)
        full_fence()  # whoever removes a user first takes it from the table and then looks here
        worked = outstanding = False
        for i in range(load_word_acquire(control + COUNT)):
            shared = load_word_acquire(control + TABLE + 8 * i)
            if shared != 0:
                while _gather_chunk(shared):
                    worked = True
                if load_word_acquire(shared + BATCHES_DONE) < load_word_acquire(shared + BATCHES_STARTED):
                    outstanding = True
        if worked:
            since = _now(words)
        elif looks % _LOOKS == 0:
            idle = _now(words) - since
            if outstanding and idle > _NAP_NS:
                _usleep(np.uint32(50))
            elif not outstanding and idle > _AWAKE_NS:
                store_word_release(state, 0)
                add_word(control + SLEEPERS, 1)
                _syscall(_FUTEX, control + CALLS, _WAIT, calls & 0xFFFFFFFF, 0, 0, 0)
                add_word(control + SLEEPERS, -1)
                since = _now(words)
            elif idle > _AWAKE_NS:
                _sched_yield()
    store_word_release(state, 0)


@host_kernel
def begin_batch(control, shared):
    """A batch of a user is about to be started: wake the threads.   **Writes:** words of the user, of all threads."""
    add_word(shared + BATCHES_STARTED, 1)
    add_word(control + CALLS, 1)
    if load_word_acquire(control + SLEEPERS) > 0:
        _syscall(_FUTEX, control + CALLS, _WAKE, _EVERYBODY, 0, 0, 0)


@host_kernel
def wake_gatherers(control):
    """Let all threads look again."""
    add_word(control + CALLS, 1)
    _syscall(_FUTEX, control + CALLS, _WAKE, _EVERYBODY, 0, 0, 0)
