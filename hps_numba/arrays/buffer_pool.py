"""Memory of answers, reused once nobody holds the answer any more.

An answer that a framework takes over is freed with its tensor. Large memory then goes back to the system, and the next answer
gets new pages, whose first touch costs more than filling them: 85 ms instead of 37 for 218 MB of rows on two cores of a virtual
machine. So freed memory is kept, up to a bound, and reused.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hps_numba.runtime.fork import register_fork_reset

__all__ = ["USED", "BufferPool", "aligned_empty", "reused_empty"]

#: bytes; EIGEN_MAX_ALIGN_BYTES of TensorFlow's builds, and enough for JAX to take memory over
ALIGNMENT = 64


class _Block:
    """What an array holds as its base; gives the memory back when the array and all views of it are gone."""

    __slots__ = ("__array_interface__", "_memory", "_owner")

    def __init__(self, owner: BufferPool, memory: NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._owner, self._memory = owner, memory
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (_address(memory), False), "version": 3}

    def __del__(self) -> None:
        self._owner.release(self._memory)


class BufferPool:
    """Memory by size, kept for the next array of about that size.

    Args:
        bound: most bytes that are kept; threads that free arrays at the same time may exceed it slightly.

    Thread safety: every method; arrays may be freed on any thread.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Keep nothing."""
        self._kept: dict[int, deque[NDArray[np.uint8]]] = {}

    @property
    def bytes(self) -> int:
        """Bytes that are kept now."""
        return sum(size * len(some) for size, some in list(self._kept.items()))

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Uninitialised, aligned to ``ALIGNMENT``."""
        size = _rounded(math.prod(shape) * dtype.itemsize)
        try:
            memory = self._kept[size].pop()
        except (KeyError, IndexError):
            memory = _aligned_bytes(size)
        return np.asarray(_Block(self, memory, shape, dtype))

    def release(self, memory: NDArray[np.uint8]) -> None:
        """Keep memory of an array that is gone, if the bound allows it."""
        size = len(memory)
        if self.bytes + size <= self.bound:
            self._kept.setdefault(size, deque()).append(memory)


def _address(memory: NDArray[Any]) -> int:
    address: int = memory.__array_interface__["data"][0]
    return address


def _aligned_bytes(size: int) -> NDArray[np.uint8]:
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -_address(memory) % ALIGNMENT
    return memory[start : start + size]


def _rounded(size: int) -> int:
    """``size`` rounded up to one of eight sizes between two powers of two: by an eighth at most."""
    step = max(1, 1 << (size.bit_length() - 4)) if size > 8 else 1
    return -(-size // step) * step


USED = BufferPool(512 << 20)
"""That of this process."""

_FLOAT32 = np.dtype(np.float32)  # to make it of the type takes longer than to allocate a small array
_SMALL = 64 << 10  # bytes; malloc serves smaller arrays well


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Uninitialised memory that begins where TensorFlow and JAX take it over without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size >= _SMALL:
        return USED.array(shape, dtype)
    return _aligned_bytes(size).view(dtype).reshape(shape)


def reused_empty(shape: tuple[int, ...], dtype: DTypeLike = _FLOAT32) -> NDArray[Any]:
    """Uninitialised memory for what no framework takes over: as ``aligned_empty``, but small memory begins anywhere."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    return USED.array(shape, dtype) if size >= _SMALL else np.empty(shape, dtype)
