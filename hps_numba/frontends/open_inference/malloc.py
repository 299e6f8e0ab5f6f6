"""Memory that glibc's malloc keeps instead of giving it back, as buffers of requests come and go.

A block of 128 KiB or more comes from the system and goes back there when it is freed; the pages of the next one are new, and
each costs a page fault at its first touch: twice the CPU time of a request with a megabyte.
"""

from __future__ import annotations

import ctypes
import platform
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 128 << 20  # bytes at the top of the heap
_LARGEST = 32 << 20  # bytes of a block from the heap; glibc allows no more


def keep_freed_memory() -> bool:
    """Keep up to 128 MiB that are freed, and take blocks up to 32 MiB from them; whether malloc can be told so (glibc only)."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
