"""One version of a table in host memory: its rows, its index, and the free list of its slots."""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from dataclasses import replace

import numpy as np

from hps_numba.device.host_memory import HostAllocator, HostRegion
from hps_numba.device.machine_memory import total_bytes
from hps_numba.errors import CapacityError
from hps_numba.kernels.host.write import (
    STATE_FREE,
    STATE_LIVE,
    STATE_MAX_USED,
    STATE_NEXT_SLOT,
    STATE_RETIRED,
    STATE_SLOT_LIMIT,
    STATE_USED,
    STATE_WORDS,
    STATE_WRITES,
    host_census,
    host_fill,
    host_reindex,
)
from hps_numba.kernels.layouts.host_store import (
    ENTRIES_PER_LINE,
    FIRST_SLOT,
    GENERATION_WRITES,
    MAX_LOAD,
    META_BYTES,
    META_GENERATION,
    META_LINES,
    META_RECENCY,
    META_RECENCY_MODE,
    META_ROW_BYTES,
    META_ROWS,
    RECENCY_NONE,
    index_bytes,
    lines_for,
)
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.store_bytes import StoreBytes

__all__ = ["TableContent", "address_of", "apart", "entries_of"]


_generations = itertools.count(1)


def address_of(array: np.ndarray) -> int:
    """Address of the first element."""
    address: int = array.__array_interface__["data"][0]
    return address


def apart(array: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``array``, or a copy if it has memory in common with an array that is written while it is read; both contiguous."""
    return array.copy() if np.may_share_memory(array, out) else array


def entries_of(block: int) -> int:
    """Number of entries of the index block at an address."""
    return ctypes.c_int64.from_address(block + META_LINES).value * ENTRIES_PER_LINE


class TableContent:
    """Rows, index and slots. Headers, locks and bounds are other parts of ``HostStore``.

    Attributes:
        dim: row width in float32 elements.
        index: the index block that the writer uses.
        state: the ``STATE_*`` words that write kernels read and change.
        free: the free list, of the index words that last led to slots; its length is in ``state``.
        retired: the same of slots that the last kernel took out of use; their number is in ``state``.

    Thread safety: one writer; readers hold an epoch and see what is published.
    """

    def __init__(
        self, dim: int, rows: int, *, allocator: HostAllocator, recency: int = RECENCY_NONE, purpose: str = "table"
    ) -> None:
        """Take memory for ``rows`` keys of width ``dim``; more can be added.

        Raises:
            CapacityError: the machine has too little memory.
        """
        self.dim = dim
        self.row_bytes = 4 * dim
        self.purpose = purpose
        self._allocator = allocator
        self._recency_mode = recency
        self.state = np.zeros(STATE_WORDS, np.int64)
        self.free = np.empty(64, np.int64)
        self.retired = np.empty(64, np.int64)
        self._generation = next(_generations)
        self._renewed_at = 0  # writes when it got that
        self._retired_slots: deque[tuple[int, np.ndarray]] = deque()
        self._old_indexes: deque[tuple[int, HostRegion]] = deque()
        self._regions: list[HostRegion] = []
        self._indexes: list[HostRegion] = []  # every index that a reader may use
        try:
            self._rows = self._reserve(rows * self.row_bytes, max(rows * self.row_bytes, total_bytes()), "rows")
            self._recency: HostRegion | None = None
            if recency != RECENCY_NONE:
                self._recency = self._reserve(8 * rows, 8 * (self._rows.limit // self.row_bytes), "recency")
            self.commit_slots(rows)
            self.use_index(self._new_index(lines_for(rows)), 0)
        except CapacityError:
            self.release()
            raise

    def _reserve(self, least: int, limit: int, what: str) -> HostRegion:
        region = self._allocator.reserve(limit, f"{self.purpose}: {what}", least=least)
        self._regions.append(region)
        return region

    @property
    def block(self) -> int:
        """Address of the index block."""
        return self.index.address

    @property
    def live(self) -> int:
        """Rows that a lookup can find."""
        return int(self.state[STATE_LIVE])

    @property
    def bytes(self) -> int:
        """Bytes in use: slots ever written, index, recency words."""
        per_slot = self.row_bytes + (8 if self._recency is not None else 0)
        return int(self.state[STATE_NEXT_SLOT]) * per_slot + self.index.committed

    @property
    def sizes(self) -> StoreBytes:
        """All bytes that it takes, by what they are for."""
        recency = 0 if self._recency is None else self._recency.committed
        used = StoreBytes(
            rows=min(self.slots * self.row_bytes, self._rows.committed),
            index=sum(index.committed for index in tuple(self._indexes)),
            recency=min(8 * self.slots, recency),
        )
        return replace(used, spare=self._rows.committed - used.rows + recency - used.recency)

    @property
    def slots(self) -> int:
        """Slots that were ever in use."""
        return int(self.state[STATE_NEXT_SLOT])

    def rows_view(self, start: int, stop: int) -> np.ndarray:
        """Slots ``start`` to ``stop`` as float32 ``[stop - start, dim]``, to be written before they are indexed."""
        return self._rows.view(np.float32, (stop - start, self.dim), start * self.row_bytes)

    def commit_slots(self, slots: int) -> None:
        """Make the first ``slots`` slots usable."""
        self._rows.commit(slots * self.row_bytes)
        if self._recency is not None:
            self._recency.commit(8 * slots)
        self.state[STATE_SLOT_LIMIT] = max(int(self.state[STATE_SLOT_LIMIT]), slots)

    def grow_slots(self, more: int) -> None:
        """Add ``more`` slots, at least one; fewer where addresses or memory end.

        Raises:
            CapacityError: not even one more slot fits.
        """
        slots = int(self.state[STATE_SLOT_LIMIT])
        reserved = self._rows.limit // self.row_bytes - slots
        if reserved <= 0:
            raise CapacityError(f"{self.purpose}: all {slots} slots that could be reserved are in use")
        step = min(reserved, more)
        while True:
            try:
                self.commit_slots(slots + step)
                return
            except CapacityError:
                if step == 1:
                    raise
                step //= 2

    def _new_index(self, lines: int) -> HostRegion:
        region = self._allocator.reserve(index_bytes(lines), f"{self.purpose}: index")
        region.commit(index_bytes(lines))
        self._indexes.append(region)
        meta = region.view(np.int64, (META_BYTES // 8,))
        meta[META_LINES // 8] = lines
        meta[META_ROWS // 8] = self._rows.address
        meta[META_ROW_BYTES // 8] = self.row_bytes
        meta[META_RECENCY // 8] = self._recency.address if self._recency is not None else 0
        meta[META_RECENCY_MODE // 8] = self._recency_mode
        meta[META_GENERATION // 8] = self._generation
        return region

    def is_due(self, writes: int) -> bool:
        """Whether another generation must be in force before so many more writes."""
        return int(self.state[STATE_WRITES]) + writes - self._renewed_at > GENERATION_WRITES

    def renew_generation(self) -> None:
        """Give the version another generation; the watchers of the header are to be told next."""
        self._generation = next(_generations)
        self._renewed_at = int(self.state[STATE_WRITES])
        self.index.view(np.int64, (META_BYTES // 8,))[META_GENERATION // 8] = self._generation

    @property
    def spare_entries(self) -> int:
        """New keys that the index can take before it is rebuilt."""
        return int(self.state[STATE_MAX_USED] - self.state[STATE_USED])

    @property
    def index_is_full(self) -> bool:
        """No further entry may be used before the index is rebuilt."""
        return bool(self.state[STATE_USED] >= self.state[STATE_MAX_USED])

    @property
    def has_slots(self) -> bool:
        """A row can be written without more memory."""
        return self.spare_slots > 0

    @property
    def spare_slots(self) -> int:
        """Rows that can be written without more memory."""
        return int(self.state[STATE_FREE] + self.state[STATE_SLOT_LIMIT] - self.state[STATE_NEXT_SLOT])

    @property
    def is_packed(self) -> bool:
        """More slots need another index, from ``build_index``."""
        return False

    def build_index(self, more: int = 0, keys: int = 0) -> tuple[HostRegion, int]:
        """A larger index without the erased entries, and its number of rows; nothing else changes yet.

        ``more``: slots that it has to come with, where the content ``is_packed``.   ``keys``: new keys that it must hold.
        """
        new = self._new_index(lines_for((self.live + keys) * 3 // 2 + 16))
        return new, host_reindex(self.index.address, new.address)

    def use_index(self, index: HostRegion, live: int) -> None:
        """Write to ``index``, which holds ``live`` rows, from now on."""
        self.index = index
        self.state[STATE_LIVE] = self.state[STATE_USED] = live
        self._limit_load()

    def _limit_load(self) -> None:
        self.state[STATE_MAX_USED] = int(entries_of(self.block) * MAX_LOAD)

    def repair(self, block: int, epochs: Epochs) -> None:
        """Rebuild counts and free list from the index at ``block``, after a write was interrupted."""
        self.index = next(index for index in self._indexes if index.address == block)
        slots = int(self.state[STATE_NEXT_SLOT])
        taken = np.zeros(slots, np.uint8)
        host_census(block, taken, self.state)
        self._limit_load()
        self.state[STATE_FREE] = self.state[STATE_RETIRED] = 0
        tag = epochs.advance()
        self._retired_slots = deque([(tag, np.flatnonzero(taken == 0) + FIRST_SLOT)])
        self.renew_generation()  # how often these slots were used is not known any more
        self._old_indexes = deque((tag, index) for index in self._indexes if index is not self.index)

    def fill(self, keys: np.ndarray, now: int) -> None:
        """Index int64 ``keys`` for the rows in the next slots, before the content is published; the last of equal keys wins."""
        first = int(self.state[STATE_NEXT_SLOT])
        self._reserve_free(len(keys))
        self.state[STATE_NEXT_SLOT] = first + len(keys)
        host_fill(self.block, address_of(keys), len(keys), first, self.state, self.free, now)

    def retire_index(self, index: HostRegion, tag: int) -> None:
        """Release a replaced index after the epoch ``tag``."""
        self._old_indexes.append((tag, index))

    def reserve_retired(self, more: int) -> np.ndarray:
        """The list that a kernel appends retired slots to, with capacity for ``more``."""
        used = int(self.state[STATE_RETIRED])
        if used + more > len(self.retired):
            self.retired = np.concatenate([self.retired[:used], np.empty(more, np.int64)])
        return self.retired

    def retire_slots(self, epochs: Epochs) -> None:
        """End the epoch; the slots retired in it are free once its readers have finished."""
        count = int(self.state[STATE_RETIRED])
        if count:
            slots, self.state[STATE_RETIRED] = self.retired[:count].copy(), 0
            self._retired_slots.append((epochs.advance(), slots))

    def give_back(self, words: np.ndarray) -> None:
        """Add the slots of index words, which no reader can hold, to the free list."""
        self._reserve_free(len(words))
        end = int(self.state[STATE_FREE])
        self.free[end : end + len(words)] = words
        self.state[STATE_FREE] = end + len(words)

    def collect(self, epochs: Epochs) -> None:
        """Move slots that no reader can hold any more to the free list, and release such indexes."""
        if not self._retired_slots and not self._old_indexes:
            return
        oldest = epochs.oldest()
        while self._retired_slots and self._retired_slots[0][0] < oldest:
            self.give_back(self._retired_slots.popleft()[1])
        while self._old_indexes and self._old_indexes[0][0] < oldest:
            index = self._old_indexes.popleft()[1]
            self._indexes.remove(index)
            index.release()

    def _reserve_free(self, more: int) -> None:
        used = int(self.state[STATE_FREE])
        if used + more > len(self.free):
            self.free = np.concatenate([self.free[:used], np.empty(max(used, more) + more, np.int64)])

    def release(self) -> None:
        """Release all memory. Only when no reader can hold it."""
        for region in [*self._regions, *self._indexes]:
            region.release()
