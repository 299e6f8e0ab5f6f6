"""Pinned host memory: a registrar that stands in for the driver, and a read by a device."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from hps_numba.device import driver, memory, streams
from hps_numba.device.host_memory import HostRegion, PinnedHostAllocator
from hps_numba.errors import CapacityError, DeviceError

MIB = 1 << 20


PAGE = mmap.PAGESIZE


class Registrar:
    """Registers ranges as a driver would: page by page, each once; up to ``limit`` bytes."""

    def __init__(self, limit: int = 1 << 50) -> None:
        self.limit = limit
        self.ranges: dict[int, int] = {}
        self.log: list[tuple[str, int, int]] = []

    @property
    def bytes(self) -> int:
        return sum(self.ranges.values())

    def register(self, address: int, size: int) -> None:
        assert address % PAGE == size % PAGE == 0 and size > 0
        assert not any(start < address + size and address < start + length for start, length in self.ranges.items())
        if self.bytes + size > self.limit:
            raise CapacityError("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
        np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)[::PAGE] |= 0  # as pinning touches each page
        self.ranges[address] = size
        self.log.append(("register", address, size))

    def unregister(self, address: int) -> None:
        if address not in self.ranges:
            raise DeviceError("cuMemHostUnregister: CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED: not registered")
        self.log.append(("unregister", address, self.ranges.pop(address)))

    def allocator(self) -> PinnedHostAllocator:
        return PinnedHostAllocator(self.register, self.unregister)

    def of(self, region: HostRegion) -> list[tuple[int, int]]:
        """Ranges in a region as (offset, size)."""
        inside = range(region.address, region.address + region.limit + PAGE)
        return [(start - region.address, size) for start, size in self.ranges.items() if start in inside]


def seen_by_device(address: int, size: int) -> np.ndarray:
    """Bytes of pinned memory as device 0 reads them."""
    with driver.current(0):
        stream, region = streams.new_stream(0), memory.allocate(0, size, "test")
        back = np.empty(size, np.uint8)
        for start in range(0, size, 4096):  # the driver copies from one registration at a time; kernels read across
            memory.copy(region.address + start, address + start, min(4096, size - start), stream)
        memory.to_host(back, region.address, stream)
        region.release()
        streams.destroy_stream(stream)
    return back
