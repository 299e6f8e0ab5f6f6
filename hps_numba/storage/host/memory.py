"""Where a host store keeps what readers and writers share: in this process, or where other processes find it too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

from hps_numba.device.host_memory import HostAllocator
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.versions import Versions
from hps_numba.storage.host.write_lock import WriteLock

__all__ = ["Mark", "PrivateMemory", "StoreMemory"]


class Mark(NamedTuple):
    """What the rows of a store were loaded from, for other processes.

    Attributes:
        digest: tells the files, and how they were loaded; empty or zeros if that is unknown.
        path: of the files, for people; of a long one the end.
        replaced: ``replace_model`` brought the rows, so they stay, whatever files a process that starts is told of.
    """

    digest: bytes = b""
    path: str = ""
    replaced: bool = False

    @property
    def known(self) -> bool:
        """Whether it is known what was loaded."""
        return any(self.digest)


class StoreMemory(Protocol):
    """Makes the parts of one store that depend on where its memory is.

    Attributes:
        shared: other processes read and write the same rows.
        mark: what the rows were loaded from; nothing where no other process asks.

    Thread safety: every method.
    """

    shared: bool
    mark: Mark

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
        """Keep changes by other processes away, without waiting: gives False, and holds nothing, if one is at work."""

    def alone(self) -> AbstractContextManager[None]:
        """A block in which no other process changes the table, in host memory and slower tiers; raises TierUnavailable."""

    def turn(self) -> AbstractContextManager[None]:
        """Let no other process write or look at the mark, while several tables change; inside the mutex of the write lock."""

    def aside(self) -> StoreMemory:
        """For a store that is filled aside and whose rows this one then takes over."""


class PrivateMemory:
    """Memory of this process, from an allocator.   Thread safety: every method."""

    shared = False
    foreign_writes = 0

    def __init__(self, allocator: HostAllocator, epochs: Epochs | None = None) -> None:
        self._allocator = allocator
        self.epochs = epochs if epochs is not None else Epochs()
        self.mark = Mark()

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

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def aside(self) -> StoreMemory:
        return PrivateMemory(self._allocator)
