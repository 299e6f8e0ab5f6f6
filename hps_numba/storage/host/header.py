"""The header of a host store: the one word through which host threads and devices find the table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hps_numba.device.host_memory import HostAllocator
from hps_numba.kernels.host.epoch import publish
from hps_numba.kernels.layouts.host_store import HEADER_BYTES

__all__ = ["StoreHeader"]


class StoreHeader:
    """Holds the address of the index block that readers use; one atomic store replaces it.

    Attributes:
        address: of the header itself, fixed for the life of the store.

    Thread safety: ``block`` and ``snapshot`` from any thread; all else under the write lock of the store.
    """

    def __init__(self, allocator: HostAllocator, name: str) -> None:
        region = allocator.reserve(HEADER_BYTES, f"{name}: header")
        region.commit(HEADER_BYTES)
        self._region = region
        self.address: int = region.address
        self._watchers: tuple[Callable[[int], object], ...] = ()

    @property
    def block(self) -> int:
        """Address of the index block in use (``kernels.layouts.host_store``); 0 if the store is closed."""
        return int(self._region.view(np.int64, (1,))[0])

    def snapshot(self) -> np.ndarray:
        """A private header, int64 ``[1]``, with the block of this moment: several kernels then read one version."""
        return self._region.view(np.int64, (1,)).copy()

    def publish(self, block: int) -> None:
        """Let readers use ``block`` from now on, 0 for none, and tell the watchers."""
        publish(self.address, block)
        self.notify(block)

    def notify(self, block: int) -> None:
        """Tell the watchers the block in use."""
        for watcher in self._watchers:
            watcher(block)

    def watch(self, watcher: Callable[[int], object]) -> None:
        """Tell ``watcher`` the block in use, now and at each ``publish``."""
        self._watchers = (*self._watchers, watcher)
        watcher(self.block)

    def unwatch(self, watcher: Callable[[int], object]) -> None:
        """Undo ``watch``."""
        self._watchers = tuple(other for other in self._watchers if other != watcher)
