"""Read keys from the caller's memory, in whichever of ``KEY_FORMS`` they lie."""

from __future__ import annotations

from hps_numba.kernels.dtypes import CHECKED32_IN_INT64, INT32, INT64
from hps_numba.kernels.simt.reference import ld32, ld64

__all__ = ["load_key"]

KEY_FORM = INT64  # bound when specialized


def load_key(keys, i):
    """``(key, legal)``: the key at position ``i``; an illegal one is in no tier."""
    if KEY_FORM in (INT64, CHECKED32_IN_INT64):
        key = ld64(keys + 8 * i)
        return key, KEY_FORM == INT64 or 0 <= key <= 0xFFFFFFFF
    key = ld32(keys + 4 * i)
    if KEY_FORM == INT32 and key > 0x7FFFFFFF:
        key -= 0x100000000
    return key, True
