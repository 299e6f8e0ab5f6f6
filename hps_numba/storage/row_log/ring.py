"""An io_uring: many reads at a time with one call of the system, from a kernel without the GIL (``kernels.host.disk_reads``).

Set up by its raw system call and three mappings, so that neither liburing nor a compiler is needed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable

import numpy as np

from hps_numba.kernels.host import disk_reads as words

__all__ = ["Ring"]

_SETUP = 425
_OFF_SQ, _OFF_CQ, _OFF_SQES = 0, 0x8000000, 0x10000000
_SQ_OFFSETS, _CQ_OFFSETS = 10, 20  # words of io_uring_params where the offsets of the two rings begin
_PARAMS_WORDS = 30


class Ring:
    """A ring and the buffers that its reads go to.

    Attributes:
        fields: int64 ``[RING_FIELDS]``, for ``disk_ring``.   key: (bytes of a buffer, block): which reads it is for.

    Raises:
        OSError: the system has no io_uring, or does not let this process use it (as the default of Docker does not).

    Thread safety: one thread at a time; not in a forked child, which shares the ring with its parent.
    """

    def __init__(self, depth: int, buffer_bytes: int, block: int) -> None:
        """``depth``: reads at a time.   ``buffer_bytes``: of each, a multiple of ``block``, which offsets are multiples of."""
        if not sys.platform.startswith("linux"):
            raise OSError(errno.ENOSYS, "io_uring: expected Linux")
        params = (ctypes.c_uint32 * _PARAMS_WORDS)()
        self.key = (buffer_bytes, block)
        self._fd = _setup(depth, params)
        try:
            sq, cq = params[_SQ_OFFSETS : _SQ_OFFSETS + 10], params[_CQ_OFFSETS : _CQ_OFFSETS + 10]
            entries, completions = params[0], params[1]
            self._maps = [
                _mapped(self._fd, sq[6] + 4 * entries, _OFF_SQ),
                _mapped(self._fd, cq[5] + 16 * completions, _OFF_CQ),
                _mapped(self._fd, 64 * entries, _OFF_SQES),
                mmap.mmap(-1, depth * buffer_bytes),
            ]
        except BaseException:
            os.close(self._fd)
            raise
        sq_at, cq_at, sqes, buffers = (np.frombuffer(memory, np.uint8).ctypes.data for memory in self._maps)
        np.frombuffer(self._maps[0], np.uint32, entries, sq[6])[:] = np.arange(entries)  # entries are submitted in order
        fields = np.zeros(words.RING_FIELDS, np.int64)
        fields[words.RING_FD] = self._fd
        fields[words.RING_SQ_TAIL] = sq_at + sq[1]
        fields[words.RING_SQ_MASK] = entries - 1
        fields[words.RING_SQES] = sqes
        fields[words.RING_CQ_HEAD] = cq_at + cq[0]
        fields[words.RING_CQ_TAIL] = cq_at + cq[1]
        fields[words.RING_CQ_MASK] = completions - 1
        fields[words.RING_CQES] = cq_at + cq[5]
        fields[words.RING_DEPTH] = depth
        fields[words.RING_BUFFERS] = buffers
        fields[words.RING_BUFFER_BYTES] = buffer_bytes
        fields[words.RING_BLOCK] = block
        self.fields = fields

    def close(self) -> None:
        """Close it; only when it is idle. In a forked child this leaves the parent's as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "_fd") and not ends():
            self.close()


def _setup(depth: int, params: ctypes.Array[ctypes.c_uint32]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(ctypes.c_long(_SETUP), ctypes.c_long(depth), params)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"io_uring: {os.strerror(code)}")
    os.set_inheritable(fd, False)
    return fd


def _mapped(fd: int, size: int, offset: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
