"""Locks of a set among writers, and the sequence lock by which readers notice them (``layouts.cache`` says how it works)."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.layouts.cache import BUSY, LOCK, META_AT, VERSION
from hps_numba.kernels.simt.reference import (
    cas32,
    fence,
    from_first_lane,
    is_first_lane,
    ld32,
    ld64,
    read_fence,
    st32,
    sync_tile,
)

__all__ = ["lock_set", "read_validate", "unlock_set", "write_begin", "write_end"]


def lock_set(set_at):
    """Lock a set against other writers; readers go on.   **Writes:** meta."""
    while True:
        taken = np.int64(0)
        if is_first_lane():
            meta = ld32(set_at + META_AT)
            taken = np.int64((meta & LOCK) == 0 and cas32(set_at + META_AT, meta, meta | LOCK) == meta)
        if from_first_lane(taken) != 0:
            fence()
            return


def unlock_set(set_at):
    """Unlock a set.   **Writes:** meta."""
    fence()
    sync_tile()
    if is_first_lane():
        st32(set_at + META_AT, ld32(set_at + META_AT) & ~LOCK)
    sync_tile()


def write_begin(line):
    """Keep readers from the keys and rows of a line; the set is locked.   **Writes:** meta."""
    sync_tile()
    if is_first_lane():
        st32(line + META_AT, (ld32(line + META_AT) | BUSY) + VERSION)
    fence()
    sync_tile()


def write_end(line, set_bits, clear_bits):
    """Show a line to readers again, with ways marked as occupied or free.   **Writes:** meta."""
    fence()
    sync_tile()
    if is_first_lane():
        st32(line + META_AT, ((ld32(line + META_AT) & ~(BUSY | clear_bits)) | set_bits) + VERSION)
    sync_tile()


def read_validate(entry, tags, key):
    """Whether the line of ``entry`` has changed since ``key`` was found there with ``tags``: what was read is then void."""
    read_fence()
    there, meta = ld64(entry), ld32((entry & ~63) + META_AT)  # both in flight before either is compared
    return (there != key) | ((meta | LOCK) != ((tags & 0xFFFFFFFF) | LOCK))
