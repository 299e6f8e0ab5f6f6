"""Walk a host store: the keys that have a row."""

from __future__ import annotations

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.kernels.host.atomics import load_word, load_word_acquire, store_word
from hps_numba.kernels.host.probe import end_of, slot_of
from hps_numba.kernels.layouts.host_store import ENTRY_BYTES, META_BYTES

__all__ = ["host_keys"]


@host_kernel
def host_keys(block, keys, slots):
    """Copy the keys of all live entries to ``keys``, and the slots of their rows to ``slots`` unless that is 0.

    Both have room for one word an entry. The caller is inside an epoch. Returns the number of keys.   **Writes:** keys, slots.
    """
    count = 0
    for entry in range(block + META_BYTES, end_of(block), ENTRY_BYTES):
        slot = slot_of(load_word_acquire(entry + 8))
        if slot >= 0:
            if slots != 0:
                store_word(slots + 8 * count, slot)
            store_word(keys + 8 * count, load_word(entry))
            count += 1
    return count
