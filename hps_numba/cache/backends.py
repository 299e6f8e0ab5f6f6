"""Where a cache lives: a CUDA device, or the memory of the process. One interface, the same kernels.

On the CPU there are no streams: work is done when a call returns, and streams and events are 0.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from hps_numba.device import driver, streams
from hps_numba.device import memory as device_memory
from hps_numba.device.host_memory import HostRegion, PinnedHostAllocator
from hps_numba.errors import ClosedError, HpsError
from hps_numba.kernels.compiler.host_kernels import HostKernel, for_host
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.host.epoch import load, publish
from hps_numba.kernels.layouts.cache import KEYS_OF_A_BLOCK_AFTER

if TYPE_CHECKING:
    from hps_numba.kernels.compiler.launch import LaunchChain, LoadedKernel, PreparedLookup, PreparedTables

__all__ = [
    "LOOKUP_THREADS",
    "OTHER_THREADS",
    "Backend",
    "CpuBackend",
    "CpuPreparedLookup",
    "CudaBackend",
    "Kernel",
    "Memory",
    "OwnStream",
    "backend_for",
]

log = logging.getLogger(__name__)

_ALIGNMENT = 128  # a set never straddles more lines of memory than it must
_LANES = 8
LOOKUP_THREADS, OTHER_THREADS = 128, 256
_KEYS_ARGUMENT, _ADVANCE_ARGUMENT = 4, 6  # of the lookup, of the insertion
_WORDS_ARGUMENT = 2  # of lookup and insertion of several tables


class Memory(Protocol):
    """Bytes at ``address``; ``release`` frees them."""

    @property
    def address(self) -> int:
        """Address of the first byte."""

    def release(self) -> None:
        """Free the memory; again does nothing."""


class Kernel(Protocol):
    """A kernel ready to be started."""

    def launch(self, blocks: int, stream: int, *args: Any, threads: int = ..., rows: int = ...) -> None:
        """Start it on a stream; does not wait."""


class OwnStream:
    """A stream that is destroyed when nobody refers to it any more, so that a call in progress may outlast ``close``.

    Attributes:
        handle: of the stream.
    """

    __slots__ = ("_current", "_destroy", "handle")

    def __init__(
        self, handle: int, destroy: Callable[[int], object], current: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.handle, self._destroy, self._current = handle, destroy, current

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.handle and not ends():  # with the process the stream goes too
            try:
                with self._current():
                    self._destroy(self.handle)
            except HpsError as problem:  # there is no caller to raise it to
                log.warning("a stream was not destroyed: %s", problem)


class CudaBackend:
    """A CUDA device. Methods raise ``DeviceError`` if the driver refuses, ``CapacityError`` if there is no memory."""

    def __init__(self, ordinal: int) -> None:
        info = driver.device_info(ordinal)
        self.ordinal: int | None = ordinal
        self._capability = info.capability
        self.copies = info.capability >= (8, 0)  # asynchronously to shared memory
        self._max_blocks, self._min_blocks_after = 2 * info.multiprocessors, max(1, info.multiprocessors // 2)
        self._max_blocks_after = 4 * info.multiprocessors
        self.serving_blocks = self._max_blocks
        self._pinned = PinnedHostAllocator()
        self.current: Callable[[], AbstractContextManager[None]] = partial(driver.current, ordinal)
        self._setup: OwnStream | None = OwnStream(streams.new_stream(ordinal), streams.destroy_stream, self.current)
        self.new_stream = partial(streams.new_stream, ordinal)
        self.new_event = partial(streams.new_event, ordinal)
        self._allocate = partial(device_memory.allocate, ordinal)

    relaxed = staticmethod(driver.relaxed_capture)
    is_capturing = staticmethod(streams.is_capturing)
    fill = staticmethod(device_memory.fill)
    copy = staticmethod(device_memory.copy)
    from_host = staticmethod(device_memory.to_device)
    to_host = staticmethod(device_memory.to_host)
    destroy_stream = staticmethod(streams.destroy_stream)
    synchronize = staticmethod(streams.synchronize)
    record = staticmethod(streams.record)
    wait = staticmethod(streams.wait)
    event_done = staticmethod(streams.event_done)
    wait_for = staticmethod(streams.wait_for)
    destroy_event = staticmethod(streams.destroy_event)

    def allocate(self, size: int, purpose: str) -> Memory:
        """Zeroed device memory. Raises ``ClosedError`` after ``close``."""
        setup = self._setup  # stays while this call uses it
        if setup is None:
            raise ClosedError(f"{purpose}: the cache is closed")
        memory = self._allocate(size, purpose)
        with self.current():
            device_memory.fill(memory.address, 0, size, setup.handle)
            streams.synchronize(setup.handle)
        return memory

    def copy_of(self, array: np.ndarray, stream: int) -> Memory:
        """Device memory with the content of an array; waits."""
        memory = self._allocate(array.nbytes, "arguments of a call")
        device_memory.to_device(memory.address, array, stream)
        return memory

    def store_word(self, address: int, value: int, stream: int) -> None:
        """Store an int64 for readers on the device; waits until they see it."""
        device_memory.to_device(address, np.array([value], np.int64), stream)

    def allocate_pinned(self, size: int, purpose: str) -> Memory:
        """Pinned memory of the host."""
        region: HostRegion = self._pinned.reserve(size, purpose)
        region.commit(size)
        return region

    @property
    def pinned_bytes(self) -> int:
        """Bytes of ``allocate_pinned`` that are not released."""
        return self._pinned.in_use

    def kernel(self, spec: KernelSpec) -> Kernel:
        """A loaded kernel: from this process, from the cache folder, or compiled."""
        from hps_numba.kernels.compiler.launch import load

        assert self.ordinal is not None
        with self.current(), self.relaxed():
            return load(spec, self.ordinal, self._capability)

    ready_kernel = kernel

    def prepared_lookup(
        self,
        kernels: Sequence[Kernel | None],
        launches: Sequence[tuple[Any, ...]],
        stream: int,
        event: int,
        *,
        group: int,
        sets: int,
        capacity: int,
        touch_at: int,
        insert_at: int,
    ) -> PreparedLookup:
        """A lookup to be started repeatedly, with other keys each time.

        Args:
            kernels: its kernel, of ``group`` keys a warp, and those that follow.   launches: as ``launch_plan.Launch``.
            touch_at, insert_at: which of the kernels touch and insert, 0: none.
        """
        from hps_numba.kernels.compiler.launch import PreparedLookup

        return PreparedLookup(
            cast("Sequence[LoadedKernel]", kernels),
            launches,
            self.context,
            stream,
            event,
            keys_at=_KEYS_ARGUMENT,
            advance_at=_ADVANCE_ARGUMENT,
            touch_at=touch_at,
            insert_at=insert_at,
            numbers=self._sizes(group, sets) | {"capacity": capacity},
        )

    def _sizes(self, group: int, sets: int) -> dict[str, int]:
        """What the numbers of blocks depend on, for lookups in one step."""
        return {
            "keys_of_block": group * (LOOKUP_THREADS // 32),
            "tiles_of_block": OTHER_THREADS // _LANES,
            "max_blocks": self._max_blocks_after,
            "min_blocks": self._min_blocks_after,
            "sets": sets,
        }

    def prepared_tables(
        self,
        kernels: Sequence[Kernel],
        launches: Sequence[tuple[Any, ...]],
        stream: int,
        event: int,
        *,
        group: int,
        tables: int,
        sets: int,
        touch_at: int,
        insert_at: int,
    ) -> PreparedTables:
        """``prepared_lookup`` for so many tables in one launch; ``sets`` of the largest."""
        from hps_numba.kernels.compiler.launch import PreparedTables

        return PreparedTables(
            cast("Sequence[LoadedKernel]", kernels),
            launches,
            self.context,
            stream,
            event,
            words_at=_WORDS_ARGUMENT,
            touch_at=touch_at,
            insert_at=insert_at,
            numbers=self._sizes(group, sets) | {"tables": tables},
        )

    @property
    def waits_for_host(self) -> bool:
        """Streams of the device can wait for words of host memory (``copy_when_marked``)."""
        from hps_numba.kernels.compiler.launch import can_copy_when_marked

        assert self.ordinal is not None
        return can_copy_when_marked(self.ordinal)

    def copy_when_marked(
        self, stream: int, mark: int, value: int, groups: int, dst: int, src: int, size: int, total: int
    ) -> None:
        """Copy ``total`` bytes in stream order, ``size`` at a time: copy i when int64 i at ``mark`` is ``value`` or more.

        No thread waits. Marks and ``src`` are in pinned memory of the host, which its threads write.
        """
        from hps_numba.kernels.compiler.launch import copy_when_marked

        copy_when_marked(stream, mark, value, groups, dst, src, size, total)

    def launch_chain(self, kernels: Sequence[Kernel | None]) -> LaunchChain:
        """Kernels of this device, to be started in one step, one after the other."""
        from hps_numba.kernels.compiler.launch import LaunchChain

        return LaunchChain(cast("Sequence[LoadedKernel]", kernels))

    @property
    def context(self) -> int:
        """Handle of the context of the device."""
        assert self.ordinal is not None
        return driver.context_of(self.ordinal)

    def blocks(self, tiles: int, rows: int = 1) -> int:
        """Blocks of each of ``rows`` rows of a grid: in all at most 2 a multiprocessor, which load enough rows for the bus."""
        return max(1, min(-(-tiles // (OTHER_THREADS // _LANES)), self._max_blocks // rows))

    def blocks_after(self, n: int, tiles: int, rows: int = 1) -> int:
        """``blocks`` of a kernel that follows a lookup of ``n`` keys and mostly finds nothing to do: fewer, unless ``n`` is
        large, as blocks take time to start."""
        limit = min(self._max_blocks_after, max(self._min_blocks_after, n // KEYS_OF_A_BLOCK_AFTER))
        return max(1, min(-(-tiles // (OTHER_THREADS // _LANES)), limit // rows))

    def lookup_blocks(self, n: int, group: int) -> int:
        """Blocks of a lookup of ``n`` keys: a warp for each ``group`` of them."""
        return -(-(-(-n // group) * 32) // LOOKUP_THREADS)

    def close(self) -> None:
        """Free what the backend itself holds; again does nothing."""
        self._setup = None


class _CpuMemory:
    def __init__(self, size: int) -> None:
        self._bytes: np.ndarray | None = np.zeros(size + _ALIGNMENT, np.uint8)
        start: int = self._bytes.__array_interface__["data"][0]
        self.address = -(-start // _ALIGNMENT) * _ALIGNMENT

    def release(self) -> None:
        self._bytes = None
        self.address = 0


class _CpuPinned(_CpuMemory):
    """Memory like any other, which ``sizes`` of the backend lists while it is there."""

    def __init__(self, size: int, sizes: dict[int, int]) -> None:
        super().__init__(size)
        self._sizes = sizes
        sizes[id(self)] = size

    def release(self) -> None:
        super().release()
        self._sizes.pop(id(self), None)


class _Borrowed:
    def __init__(self, array: np.ndarray) -> None:
        self._array: np.ndarray | None = np.ascontiguousarray(array)
        self.address: int = self._array.__array_interface__["data"][0]

    def release(self) -> None:
        self._array = None


class _CpuKernel:
    def __init__(self, run: HostKernel, arg_types: str) -> None:
        self._run = run
        self._before_words = arg_types.find("t")

    def launch(self, blocks: int, stream: int, *args: Any, threads: int = 1, rows: int = 1) -> None:
        if self._before_words >= 0:
            args = (*args[: self._before_words], args[self._before_words :])
        self._run(*args)


class CpuPreparedLookup:
    """As ``compiler.launch.PreparedLookup``, whose arguments are named there."""

    def __init__(
        self, kernels: Sequence[Kernel | None], launches: Sequence[tuple[Any, ...]], *, capacity: int, insert_at: int
    ) -> None:
        calls = [(cast("Kernel", kernel).launch, args) for kernel, (_, _, _, args) in zip(kernels, launches, strict=True)]
        self._capacity = capacity
        self._insert: Callable[..., None] | None = None
        if insert_at:
            self._insert, insertion = calls.pop()
            self._insertion = insertion[:_ADVANCE_ARGUMENT]
        (self._lookup, args), *self._others = calls
        self._before, self._after = args[:_KEYS_ARGUMENT], args[_KEYS_ARGUMENT + 3 :]

    def start(self, keys: int, n: int, out: int) -> bool:
        """Look ``n`` keys up; returns when that is done, True."""
        self._lookup(1, 0, *self._before, keys, n, out, *self._after)
        for launch, args in self._others:
            launch(1, 0, *args)
        if self._insert is not None:
            self._insert(1, 0, *self._insertion, max(1, 4 * n // self._capacity))
        return True


class CpuBackend:
    """The memory of the process; kernels run in the calling thread, without the GIL."""

    ordinal: int | None = None
    serving_blocks = 1
    copies = waits_for_host = True

    @cached_property
    def _pinned_sizes(self) -> dict[int, int]:
        return {}

    def copy_of(self, array: np.ndarray, stream: int) -> Memory:
        """The array itself."""
        return _Borrowed(array)

    def store_word(self, address: int, value: int, stream: int) -> None:
        """Store an int64 for all readers, after all writes before it."""
        publish(address, value)

    def allocate(self, size: int, purpose: str) -> Memory:
        """Zeroed memory; the system provides pages as they are written."""
        return _CpuMemory(size)

    def allocate_pinned(self, size: int, purpose: str) -> Memory:
        """``allocate``: there is no device that it would have to be pinned for."""
        return _CpuPinned(size, self._pinned_sizes)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of ``allocate_pinned`` that are not released."""
        return sum(self._pinned_sizes.copy().values())

    def kernel(self, spec: KernelSpec) -> Kernel:
        """A kernel that is loaded or compiled on its first call."""
        return _CpuKernel(for_host(spec), spec.source.arg_types)

    def ready_kernel(self, spec: KernelSpec) -> Kernel:
        """``kernel``, loaded or compiled now."""
        for_host(spec).ready()
        return self.kernel(spec)

    def blocks(self, tiles: int, rows: int = 1) -> int:
        """One."""
        return 1

    def blocks_after(self, n: int, tiles: int, rows: int = 1) -> int:
        """One."""
        return 1

    def lookup_blocks(self, n: int, group: int) -> int:
        """One."""
        return 1

    def prepared_lookup(
        self,
        kernels: Sequence[Kernel | None],
        launches: Sequence[tuple[Any, ...]],
        stream: int,
        event: int,
        *,
        group: int,
        sets: int,
        capacity: int,
        touch_at: int,
        insert_at: int,
    ) -> CpuPreparedLookup:
        """A lookup to be started repeatedly, as on a device."""
        return CpuPreparedLookup(kernels, launches, capacity=capacity, insert_at=insert_at)

    @property
    def context(self) -> int:
        """0: there is none."""
        return 0

    def current(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return _NOTHING

    relaxed = current

    def fill(self, address: int, byte: int, size: int, stream: int) -> None:
        """At once."""
        ctypes.memset(address, byte, size)

    def copy(self, dst: int, src: int, size: int, stream: int) -> None:
        """At once."""
        ctypes.memmove(dst, src, size)

    def from_host(self, address: int, array: np.ndarray, stream: int) -> None:
        """At once."""
        array = np.ascontiguousarray(array)
        ctypes.memmove(address, array.__array_interface__["data"][0], array.nbytes)

    def to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        """At once."""
        ctypes.memmove(array.__array_interface__["data"][0], address, array.nbytes)

    def new_stream(self) -> int:
        """The only one."""
        return 0

    new_event = new_stream

    def destroy_stream(self, stream: int) -> None:
        """Nothing to do, and so are the following."""

    synchronize = destroy_event = wait_for = destroy_stream

    def record(self, event: int, stream: int) -> None:
        """Work is done already."""

    wait = record

    def copy_when_marked(
        self, stream: int, mark: int, value: int, groups: int, dst: int, src: int, size: int, total: int
    ) -> None:
        """As ``CudaBackend.copy_when_marked``, but waits."""
        for group in range(groups):
            while load(mark + 8 * group) < value:
                time.sleep(0)
        ctypes.memmove(dst, src, total)

    def event_done(self, event: int) -> bool:
        """Work is done already."""
        return True

    def is_capturing(self, stream: int) -> bool:
        """There are no graphs."""
        return False

    def close(self) -> None:
        """Nothing to do."""


_NOTHING = nullcontext()
Backend = CudaBackend | CpuBackend


def backend_for(device: int | None) -> Backend:
    """The backend of a cache: of a CUDA device, or for None of the CPU.

    Raises:
        DeviceError: no such device.
    """
    return CpuBackend() if device is None else CudaBackend(device)
