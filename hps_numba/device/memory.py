"""Memory that a device reads and writes: allocated on it, or pinned on the host; and copies in stream order."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from hps_numba.device.driver import (
    OUT_OF_MEMORY,
    any_context,
    check,
    check_device,
    cuda,
    current,
    failure,
    relaxed_capture,
    release,
)
from hps_numba.errors import ArrayError, CapacityError, DeviceError, HpsError

__all__ = [
    "CupyDeviceAllocator",
    "DeviceAllocator",
    "DeviceRegion",
    "DriverDeviceAllocator",
    "allocate",
    "copy",
    "fill",
    "free_bytes",
    "register",
    "to_device",
    "to_host",
    "unregister",
]

logger = logging.getLogger(__name__)


# -- copies ---------------------------------------------------------------------------------------------------------------


def to_device(address: int, array: np.ndarray, stream: int) -> None:
    """Copy an array to device memory, after the work on the stream. When this returns the array may be changed.

    It waits for the stream, which must not be captured, whatever memory the array is in: on some hosts the driver reads even
    pageable memory late. To copy from pinned memory without a wait use ``copy``.
    """
    array = np.ascontiguousarray(array)
    _copy_now("cuMemcpyHtoDAsync", address, array.__array_interface__["data"][0], array.nbytes, stream)


def to_host(array: np.ndarray, address: int, stream: int) -> None:
    """Fill an array from device memory, after the work on the stream. When this returns the array is filled.

    Raises:
        ArrayError: the array is not contiguous, or cannot be written.
    """
    if not (array.flags.c_contiguous and array.flags.writeable):
        kind = f"{'contiguous' if array.flags.c_contiguous else 'strided'}, {'' if array.flags.writeable else 'not '}writeable"
        raise ArrayError(f"to_host: expected a contiguous, writeable array, got {array.dtype}{list(array.shape)}: {kind}")
    _copy_now("cuMemcpyDtoHAsync", array.__array_interface__["data"][0], address, array.nbytes, stream)


def _copy_now(call: str, dst: int, src: int, size: int, stream: int) -> None:
    if size:
        with relaxed_capture():
            check(call, getattr(cuda.driver, call)(dst, src, size, stream)[0])
            check("cuStreamSynchronize", cuda.driver.cuStreamSynchronize(stream)[0])


def fill(address: int, byte: int, size: int, stream: int) -> None:
    """Set ``size`` bytes of device memory to ``byte``, in stream order."""
    if size:
        check("cuMemsetD8Async", cuda.driver.cuMemsetD8Async(address, byte, size, stream)[0])


def copy(dst: int, src: int, size: int, stream: int) -> None:
    """Copy ``size`` bytes in stream order; both addresses are of device memory (of any device) or of pinned memory."""
    if size:
        check("cuMemcpyAsync", cuda.driver.cuMemcpyAsync(dst, src, size, stream)[0])


# -- allocation -----------------------------------------------------------------------------------------------------------


def free_bytes(ordinal: int) -> int:
    """Bytes of free device memory."""
    with current(ordinal), relaxed_capture():
        status, free, _ = cuda.driver.cuMemGetInfo()
        check("cuMemGetInfo", status)
        return int(free)


class DeviceRegion:
    """``size`` bytes of memory of one device at ``address`` (0 if ``size`` is 0, or after ``release``).

    Thread safety: call ``release`` from one thread at a time, when no stream uses the memory any more.
    """

    def __init__(self, address: int, size: int, ordinal: int, free: Callable[[], object] | None) -> None:
        self.address = address
        self.size = size
        self.ordinal = ordinal
        self._free = free

    def release(self) -> None:
        """Free the memory; calling it again does nothing."""
        free, self._free, self.address = self._free, None, 0
        if free is not None and not cuda.is_the_parents:
            free()

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._free is None or ends():  # with the process the memory goes too
            return
        try:
            self.release()
        except HpsError as problem:  # there is no caller to raise it to
            logger.warning("device memory was not freed: %s", problem)


class DeviceAllocator(Protocol):
    """Hands out device memory; injected, so that a framework's pool can be shared."""

    def allocate(self, ordinal: int, size: int, purpose: str) -> DeviceRegion:
        """``size`` bytes of a device, aligned to 256; ``CapacityError`` if it does not have them."""


class DriverDeviceAllocator:
    """Memory straight from the driver.   Thread safety: all methods."""

    def allocate(self, ordinal: int, size: int, purpose: str) -> DeviceRegion:
        """``size`` bytes of a device, not cleared.

        Raises:
            DeviceError: no such device.
            CapacityError: it does not have them.
        """
        with current(ordinal), relaxed_capture():
            if size == 0:
                return DeviceRegion(0, 0, ordinal, None)
            status, pointer = cuda.driver.cuMemAlloc(size)
            if status == OUT_OF_MEMORY:
                raise _does_not_fit(ordinal, size, purpose)
            check(f"{purpose}: cuMemAlloc", status)
            address = int(pointer)
            return DeviceRegion(address, size, ordinal, partial(_free_memory, ordinal, address))


def _free_memory(ordinal: int, address: int) -> None:
    with current(ordinal):
        release("cuMemFree", address)


class CupyDeviceAllocator:
    """Memory from CuPy's current allocator, usually its pool.   Thread safety: all methods.

    The pool may give released memory to CuPy's current stream at once, so release it when every stream is done with it.
    """

    def allocate(self, ordinal: int, size: int, purpose: str) -> DeviceRegion:
        """As ``DriverDeviceAllocator.allocate``; also raises ``DeviceError`` if CuPy is not installed."""
        check_device(ordinal)
        try:
            cupy = importlib.import_module("cupy")
        except ImportError as problem:
            raise DeviceError(f"{purpose}: expected CuPy for its memory, got an import error: {problem}") from problem
        with relaxed_capture(), cupy.cuda.Device(ordinal):
            try:
                held = [cupy.cuda.alloc(size)]
            except cupy.cuda.memory.OutOfMemoryError as problem:
                raise _does_not_fit(ordinal, size, purpose) from problem
        return DeviceRegion(int(held[0].ptr), size, ordinal, held.clear)


def _does_not_fit(ordinal: int, size: int, purpose: str) -> CapacityError:
    return CapacityError(
        f"{purpose}: expected {_mib(size)} of free memory on device {ordinal}, got {_mib(free_bytes(ordinal))}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def allocate(ordinal: int, size: int, purpose: str) -> DeviceRegion:
    """``size`` bytes of a device straight from the driver, not cleared: see ``DriverDeviceAllocator``."""
    return DriverDeviceAllocator().allocate(ordinal, size, purpose)


# -- pinned memory --------------------------------------------------------------------------------------------------------


def register(address: int, size: int) -> None:
    """Pin host memory, so that kernels of every device may read and write it at the same address.

    Start and end should be at page boundaries. A range is registered once, and must stay mapped until ``unregister``.

    Raises:
        DeviceError: there is no device, or it sees the memory at another address.
        CapacityError: the driver refuses (with its message): too little memory, a limit, a system that cannot pin.
    """
    if size == 0:
        return
    with any_context(), relaxed_capture():
        driver = cuda.driver
        flags = int(driver.CU_MEMHOSTREGISTER_PORTABLE) | int(driver.CU_MEMHOSTREGISTER_DEVICEMAP)
        if status := driver.cuMemHostRegister(address, size, flags)[0]:
            raise CapacityError(str(failure(f"{_mib(size)} at {address:#x}: cuMemHostRegister", status)))
        status, pointer = driver.cuMemHostGetDevicePointer(address, 0)
        if status or int(pointer) != address:
            driver.cuMemHostUnregister(address)
            check("cuMemHostGetDevicePointer", status)
            raise DeviceError(f"host memory: expected address {address:#x} on the device too, got {int(pointer):#x}")


def unregister(address: int) -> None:
    """Unpin the range that begins at ``address``, when no stream uses the memory any more.

    Raises:
        DeviceError: nothing was registered there.
    """
    if not cuda.is_the_parents:
        with any_context():
            release("cuMemHostUnregister", address)
