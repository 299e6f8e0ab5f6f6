"""Where a host store keeps what readers and writers share: in this process, or where other processes find it too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from hps_numba.device.host_memory import HostAllocator
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.versions import Versions
from hps_numba.storage.host.write_lock import WriteLock

__all__ = ["PrivateMemory", "StoreMemory"]


class StoreMemory(Protocol):
    """Makes the parts of one store that depend on where its memory is.

    Attributes:
        shared: other processes read and write the same rows.
        source: what the rows were loaded from, if others must know; else empty.

    Thread safety: every method.
    """

    shared: bool
    source: bytes

    @property
    def epochs(self) -> Epochs:
        """Of the readers."""

    @property
    def foreign_writes(self) -> int:
        """Writes of other processes so far, counted from any number."""

    def header(self, name: str) -> StoreHeader:
        """The word that readers start from."""

    def content(self, dim: int, rows: int, recency: int, purpose: str) -> TableContent:
        """An empty version with memory for ``rows``; raises CapacityError."""

    def versions(self, header: StoreHeader, first: Callable[[], TableContent]) -> Versions:
        """The versions; ``first`` makes one where there is none yet."""

    def write_lock(self, name: str, header: StoreHeader, versions: Versions) -> WriteLock:
        """The turn of the writers."""

    def still(self) -> AbstractContextManager[bool]:
        """Keep writers of other processes away, without waiting: gives False, and holds nothing, if one is at work."""

    def aside(self) -> StoreMemory:
        """For a store that is filled aside and whose rows this one then takes over."""


class PrivateMemory:
    """Memory of this process, from an allocator.   Thread safety: every method."""

    shared = False
    foreign_writes = 0

    def __init__(self, allocator: HostAllocator, epochs: Epochs | None = None) -> None:
        self._allocator = allocator
        self.epochs = epochs if epochs is not None else Epochs()
        self.source = b""

    def header(self, name: str) -> StoreHeader:
        return StoreHeader(self._allocator, name)

    def content(self, dim: int, rows: int, recency: int, purpose: str) -> TableContent:
        return TableContent(dim, rows, allocator=self._allocator, recency=recency, purpose=purpose)

    def versions(self, header: StoreHeader, first: Callable[[], TableContent]) -> Versions:
        return Versions(header, self.epochs, first())

    def write_lock(self, name: str, header: StoreHeader, versions: Versions) -> WriteLock:
        return WriteLock(name, header, versions)

    def still(self) -> AbstractContextManager[bool]:
        return nullcontext(True)

    def aside(self) -> StoreMemory:
        return PrivateMemory(self._allocator)
