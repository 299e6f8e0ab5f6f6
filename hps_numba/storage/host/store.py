"""The host store of one table: key -> float32 row in host memory, read by any number of threads beside one writer.

*How a torn row cannot happen.* An upsert writes the row to a free slot, then points the index word to it with one atomic store.
The slot that the word pointed to goes back to the free list only after every reader that was active has finished
(epoch-based reclamation, ``epochs``). So a reader sees the old row or the new one, takes no lock and never waits for the
writer; a lookup needs no check after the copy. Turned down: a seqlock per row or set (readers retry, and write-heavy keys
starve them), and a reader-writer lock as in HugeCTR HPS (one insertion stops all lookups).

*Growth.* Rows never move; the index is rebuilt beside the old one and published through the header
(``kernels.layouts.host_store``).

A store is made of parts: ``header`` (the word that readers start from), ``epochs``, ``versions`` (each a
``content.TableContent``), ``reading``, ``writing``, ``write_lock`` (one writer at a time, repair after an interrupt), ``bound``
(eviction). ``memory`` makes those that depend on whether other processes use them too.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np

from hps_numba.device.host_memory import HostAllocator, PlainHostAllocator
from hps_numba.errors import CapacityError
from hps_numba.kernels.layouts.host_store import RECENCY_TIME
from hps_numba.runtime.reentry import refuse_inside
from hps_numba.storage.host.bound import RowBound
from hps_numba.storage.host.bulk import Rewrite
from hps_numba.storage.host.content import TableContent, entries_of
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.memory import PrivateMemory, StoreMemory
from hps_numba.storage.host.plain import PlainLookups
from hps_numba.storage.host.pooling import Bags, Missing
from hps_numba.storage.host.reading import StoreReader
from hps_numba.storage.host.store_bytes import StoreBytes
from hps_numba.storage.host.writing import StoreWriter

__all__ = ["HostStore"]

log = logging.getLogger(__name__)
_GRACE_SECONDS = 1.0
_CLOSE_SECONDS = 60.0


class HostStore:
    """One table in host memory.

    Args:
        dim: row width in float32 elements.
        rows: rows to take memory for at once; the store grows beyond.
        allocator: where memory comes from.   memory: what makes the parts instead, for a store that is not this process's own.
        growth_bytes: bytes of rows added when slots run out (``allocation_rate``).
        max_rows: bound; a batch that passes it is followed by an eviction down to ``round(max_rows * target)``.
        policy: what is evicted: ``evict_random``, ``evict_least_used`` (fewest lookups), ``evict_oldest`` (written or looked
            up the longest ago).
        batch_rows: rows written between two checks of the bound (``max_batch_size``).
        seed: of the random policy.

    Attributes:
        header: address of the header, fixed for the life of the store.
        epochs: the epochs of this store's readers.
        added: keys that were new when this process wrote them, so far; a key that was erased or evicted counts again.
        memory: where it is.

    Raises:
        CapacityError: ``growth_bytes`` does not hold a row, or there is no memory for ``rows``.

    Thread safety: every method, from any number of threads. Reads take no lock; writers wait for each other. A write, or
    ``close``, from inside a write of the same thread (by a signal handler, ``__del__`` or a callback) raises ReentryError.
    """

    def __init__(
        self,
        dim: int,
        *,
        name: str = "table",
        rows: int = 0,
        allocator: HostAllocator | None = None,
        epochs: Epochs | None = None,
        memory: StoreMemory | None = None,
        growth_bytes: int = 256 << 20,
        max_rows: int | None = None,
        policy: str = "evict_random",
        target: float = 0.8,
        batch_rows: int = 65536,
        seed: int = 0,
    ) -> None:
        if growth_bytes < 4 * dim:
            raise CapacityError(f"{name}: allocation_rate: {growth_bytes} bytes do not hold one row of {4 * dim} bytes")
        self.name = name
        self.dim = dim
        self.max_rows = max_rows
        self.added = 0
        if memory is None:
            memory = PrivateMemory(allocator if allocator is not None else PlainHostAllocator(), epochs)
        self.memory: StoreMemory = memory
        self._growth_bytes, self._policy, self._target, self._batch_rows = growth_bytes, policy, target, batch_rows
        self.epochs = memory.epochs
        self.bound = RowBound(max_rows, policy, target, seed)
        header = memory.header(name)
        self.header: int = header.address
        self._header = header
        self.versions = memory.versions(header, partial(self.new_content, rows))
        self.write_lock = memory.write_lock(name, header, self.versions)
        self._reader = StoreReader(name, dim, header, self.epochs)
        self._readers: list[object] = [self._reader]
        self._writer = StoreWriter(
            name,
            dim,
            header,
            self.epochs,
            self.write_lock,
            self.bound,
            growth_bytes=growth_bytes,
            batch_rows=batch_rows,
            on_added=partial(_count_added, weakref.ref(self)),  # no cycle: memory is freed with the last reference
        )

    # -- reading: no lock -------------------------------------------------------------------------------------------------

    def lookup(
        self,
        keys: np.ndarray,
        out: np.ndarray,
        default: float = 0.0,
        misses: np.ndarray | None = None,
        *,
        counters: int = 0,
        threads: int | None = None,
    ) -> int:
        """Write the row of each key to ``out``; where there is none, ``default``.

        Args:
            keys: int64 ``[n]``, contiguous.
            out: float32 ``[n, dim]``, contiguous.
            misses: int64 ``[n]``; the positions of keys without a row are written to its head, ascending.
            counters: address of the ``COUNTER_*`` words to add to, or 0.
            threads: at most so many (default: all cores); small batches take one.

        Returns the number of keys without a row.

        Raises:
            KeyDtypeError, ArrayError: an array is not as above.   ClosedError: the store is closed.
        """
        return self._reader.lookup(keys, out, default, misses, counters, threads)

    def plain_lookups(self, default: float, counters: int) -> PlainLookups:
        """Small lookups of plain arrays, for a table that no slower tier follows; arguments as for ``lookup``."""
        timed = self.bound.recency == RECENCY_TIME
        plain = PlainLookups(self._header, self.epochs, self.dim, timed=timed, default=default, counters=counters)
        self._readers.append(plain)
        return plain

    def pool(
        self, bags: Bags, out: np.ndarray, default: float = 0.0, *, counters: int = 0, missing: Missing | None = None
    ) -> int:
        """Write the pooled row of each bag to ``out`` (``storage.host.pooling`` says what a bag is).

        Args:
            out: float32 ``[bags, dim]``, contiguous; a bag without keys gets 0.
            default: fills the row of a key that no tier has.   counters: as for ``lookup``.
            missing: takes the positions of keys without a row here, and has rows for some of them.

        Returns the number of keys without a row.
        """
        return self._reader.pool(bags, out, default, counters, missing)

    def gather(
        self,
        keys: np.ndarray,
        rows: np.ndarray,
        words: np.ndarray,
        default: float = 0.0,
        in_force: Callable[[int], int] | None = None,
        *,
        threads: int | None = None,
    ) -> tuple[int, int]:
        """``lookup`` for a device: it also returns the index words under which the rows were read.

        Args:
            keys: int64 ``[n]``, contiguous.
            rows: float32 ``[n, dim]``, contiguous; all of it is written, ``default`` where there is no row.
            words: int64 ``[n]``, contiguous; the index word of each key (``kernels.layouts.host_store``).
            in_force: gives the index block to read, from the one in use; by default that.
            threads: at most so many (default: all cores).

        Returns the number of keys without a row, and the generation that the words belong to.
        """
        return self._reader.gather(keys, rows, words, default, threads, in_force)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which of the int64 keys have a row."""
        return self._reader.contains(keys)

    def keys(self, *, in_order: bool = False) -> np.ndarray:
        """The keys, int64 ``[n]``; those that a writer adds or erases meanwhile may be among them.

        Args:
            in_order: sorted by the place of their rows in memory: the order of the sparse model, except for rows written since.
        """
        return self._reader.keys(in_order=in_order)

    def scan(self, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (keys int64 ``[n]``, rows float32 ``[n, dim]``) in chunks of copies, each key once, in no order.

        The keys are those present when the scan begins (8 bytes each are kept), the rows those present when their chunk is
        read; keys erased by then are left out. Nothing waits for a scan, and it does not touch the recency of rows.
        """
        return self._reader.scan(chunk_rows)

    def reading(self) -> AbstractContextManager[None]:
        """What can be found inside the ``with`` block stays in memory until its end."""
        return self.epochs.reading()

    # -- size and place ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.versions.current.live

    @property
    def bytes(self) -> int:
        """Bytes of host memory in use."""
        return self.versions.current.bytes

    @property
    def sizes(self) -> StoreBytes:
        """All bytes of host memory that it takes, by what they are for; also those of versions that readers still hold."""
        return self.versions.sizes

    @property
    def slots(self) -> int:
        """Slots that were ever in use; slot numbers are below this one."""
        return self.versions.current.slots

    @property
    def index_load(self) -> float:
        """Share of index entries that hold a row."""
        content = self.versions.current
        return content.live / entries_of(content.block)

    @property
    def evicted(self) -> int:
        """Rows evicted by the bound so far."""
        return self.bound.evicted

    @property
    def block(self) -> int:
        """Address of the index block in use (``kernels.layouts.host_store``); 0 if the store is closed."""
        return self._header.block

    # -- readers elsewhere ------------------------------------------------------------------------------------------------

    def watch(self, watcher: Callable[[int], object]) -> None:
        """Call ``watcher`` with the address of the index block in use: now, and whenever another replaces it.

        It is called before anything is written to the new block or freed of the old one, under the write lock, and must raise
        nothing. 0 stands for a store that is closed.
        """
        with self.write_lock.mutex:
            self._header.watch(watcher)

    def unwatch(self, watcher: Callable[[int], object]) -> None:
        """Undo ``watch``."""
        with self.write_lock.mutex:
            self._header.unwatch(watcher)

    def watch_writes(self, watcher: Callable[[], object]) -> None:
        """Call ``watcher`` at the beginning of each write, under the write lock, before anything is changed.

        If it raises, nothing is changed.
        """
        self.write_lock.watch(watcher)

    def unwatch_writes(self, watcher: Callable[[], object]) -> None:
        """Undo ``watch_writes``."""
        self.write_lock.unwatch(watcher)

    def at_rest(self, seconds: float = 0.1) -> AbstractContextManager[tuple[int, int]]:
        """Keep writers away; gives the number of writes so far, and the address of the index block in use.

        The block is 0 if a writer was active for ``seconds``, the store is closed, or an interrupted write is yet to be
        repaired. Not to be entered inside ``reading``: a writer may wait for readers.
        """
        return self.write_lock.at_rest(seconds)

    # -- writing: one at a time ---------------------------------------------------------------------------------------------

    def upsert(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write the row of each key (int64 ``[n]``, float32 ``[n, dim]``); the last of equal keys wins.

        Returns how many keys were new.

        Raises:
            CapacityError: no memory for more rows; those before stay written.
        """
        return self._writer.write(keys, rows, only_present=False)

    def update(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write the rows of those keys that have one; returns how many."""
        return self._writer.write(keys, rows, only_present=True)

    def rewriting(self, keys: np.ndarray) -> AbstractContextManager[Rewrite]:
        """A block to make new rows for distinct keys (int64 ``[n]``) from those that they have, and publish all or none.

        Other writers wait; readers see the rows of before until ``Rewrite.publish``. A block that ends without changes nothing.
        It must not wait for other threads that may change the table, or a cache of it.

        Raises:
            CapacityError: no memory for so many rows beside those that they replace; nothing changed.
        """
        return self._writer.rewriting(keys)

    def erase(self, keys: np.ndarray) -> int:
        """Erase the rows of the keys; returns how many there were."""
        return self._writer.erase(keys)

    # -- versions ---------------------------------------------------------------------------------------------------------

    def new_content(self, rows: int) -> TableContent:
        """An empty version of this table with memory for ``rows``, to be filled and then given to ``replace``."""
        return self.memory.content(self.dim, rows, self.bound.recency, self.name)

    def sibling(self, rows: int = 0) -> HostStore:
        """An empty store with the same options and memory for ``rows``, to fill aside and then ``adopt``.

        A bounded store takes memory for no more than its bound and one batch: more rows are never there at once.
        """
        return HostStore(
            self.dim,
            name=self.name,
            rows=rows if self.max_rows is None else min(rows, self.max_rows + self._batch_rows),
            memory=self.memory.aside(),
            growth_bytes=self._growth_bytes,
            max_rows=self.max_rows,
            policy=self._policy,
            target=self._target,
            batch_rows=self._batch_rows,
            seed=self.bound.seed,
        )

    def replace(self, content: TableContent) -> None:
        """Swap in a filled version, at once for all readers; then release the old one."""
        with self.write_lock.writing() as old:
            self.versions.swap(content)
            self.added += content.live
            self.versions.retire(old, _GRACE_SECONDS)

    def adopt(self, sibling: HostStore) -> None:
        """Swap in the rows of a ``sibling``, which ends, at once for all readers."""
        with sibling.ending() as content:
            with self.write_lock.writing():
                self.bound.evicted += sibling.evicted
            self.replace(content)

    def switch_to(self, sibling: HostStore) -> TableContent:
        """Let readers use the rows of a ``sibling`` too, at once for all of them; returns the content before, for ``retire``.

        Both stores then read the same rows, which belong to this one; until the sibling has handed them over
        (``hand_over``), neither may be written.
        """
        with self.write_lock.writing() as old:
            self.bound.evicted += sibling.evicted
            self.versions.swap(sibling.versions.current)
            self.added += len(sibling)
        return old

    def switch_back(self, old: TableContent) -> None:
        """Undo ``switch_to``: the sibling has its rows for itself again, after ``wait_for_readers``."""
        with self.write_lock.writing():
            self.versions.restore(old)

    def wait_for_readers(self, seconds: float = _CLOSE_SECONDS) -> bool:
        """Wait until nobody reads what was in use before this call and is not now; False if that takes longer."""
        return self.epochs.wait(self.epochs.advance(), seconds)

    def retire(self, old: TableContent, seconds: float = _GRACE_SECONDS) -> None:
        """Release a content that ``switch_to`` replaced, after waiting up to ``seconds`` for its readers; else later."""
        with self.write_lock.writing():
            self.versions.retire(old, seconds)

    def hand_over(self) -> None:
        """End without releasing the rows, which belong to the store that was switched to them."""
        with self.ending():
            pass

    @contextmanager
    def ending(self) -> Iterator[TableContent]:
        """Close the store without releasing its rows: they belong to the caller."""
        with self.write_lock.writing() as content:
            self.write_lock.closed = True
            self._header.publish(0)
            yield content

    def clear(self) -> None:
        """Drop all rows."""
        self.replace(self.new_content(0))

    def close(self) -> None:
        """Release everything once active lookups have ended; later calls raise ClosedError.

        Raises:
            ReentryError: this thread is inside a lookup or a write of the store.
        """
        refuse_inside(self.name, self._readers)
        with self.write_lock.closing() as first:
            if not first:
                return
            self.versions.end(_CLOSE_SECONDS)
            if self.versions.retired:
                log.warning("%s: closed during lookups, which took over %g s: memory is kept", self.name, _CLOSE_SECONDS)


def _count_added(reference: weakref.ref[HostStore], keys: int) -> None:
    store = reference()
    if store is not None:
        store.added += keys
