"""One version of a table in a shared segment: ``storage.host.content`` with all that its writer knows in the segment too.

Two regions: the *rows*, and the *table*, which holds a record, the free list, recency words and the index. So the next writer,
of whatever process, goes on where the last one stopped. A table region never grows: more slots, or an index without erased
entries, is another one beside it, which the header then leads to. Its rows are extended where they are if the space after them
is free, else copied to a larger region; slots keep their numbers, and index words stay as they are.

The list of slots is one array as long as there are slots: from its start the free ones, a stack; at its end the retired ones,
the oldest last. No slot is in it twice, so the two never meet.
"""

from __future__ import annotations

import ctypes

import numpy as np

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
    host_reindex,
)
from hps_numba.kernels.layouts.host_store import (
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
from hps_numba.storage.host.content import TableContent, entries_of
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.store_bytes import StoreBytes
from hps_numba.storage.shared.layout import (
    BATCHES,
    C_BATCH_LIST,
    C_BATCHES,
    C_DIM,
    C_GENERATION,
    C_LIMIT,
    C_QUEUED,
    C_RECENCY_MODE,
    C_RENEWED_AT,
    C_ROWS,
    C_SERIAL,
    C_WORDS,
    PAGE,
)
from hps_numba.storage.shared.regions import Regions
from hps_numba.storage.shared.segment import Segment
from hps_numba.storage.shared.segment_file import word_view

__all__ = ["SharedContent", "SharedIndex", "index_offset", "plan_shared"]

_MIN_SLACK, _MAX_SLACK = 64, 65536


def index_offset(limit: int, recency: int) -> int:
    """Where the index begins in the table region of so many slots."""
    words = limit * (1 if recency == RECENCY_NONE else 2)
    return PAGE + -(-8 * words // 64) * 64


def _table_bytes(limit: int, recency: int) -> int:
    return index_offset(limit, recency) + index_bytes(lines_for(limit))


def _limit_for(rows: int) -> int:
    """Slots for a table of so many rows: some more, which an update needs before it gives others back."""
    return rows + min(_MAX_SLACK, max(_MIN_SLACK, rows // 8))


def plan_shared(rows: int, dim: int, recency: int = RECENCY_NONE) -> StoreBytes:
    """What a table takes of the segment when so many distinct rows are loaded."""
    limit = _limit_for(rows)
    row_bytes = -(-4 * dim * limit // PAGE) * PAGE
    index = -(-_table_bytes(limit, recency) // PAGE) * PAGE
    return StoreBytes(rows=4 * dim * rows, index=index, spare=row_bytes - 4 * dim * rows)


class SharedIndex:
    """An index block, with the table region that holds it.

    Attributes:
        region: number of the table region.   rows: number of the region of its rows.   address: of the block.
        committed: bytes of the table region.
    """

    def __init__(self, region: int, rows: int, address: int, committed: int) -> None:
        self.region, self.rows, self.address, self.committed = region, rows, address, committed


class SharedContent(TableContent):
    """A version of a table in a segment.

    Thread safety: one writer, in the turn of the segment's writers; readers hold an epoch and see what is published.
    """

    def __init__(self, segment: Segment, regions: Regions, purpose: str) -> None:
        """Use ``create`` or ``find``."""
        self._segment, self._space, self.purpose = segment, regions, purpose
        self.retired = np.empty(64, np.int64)

    @classmethod
    def create(
        cls, segment: Segment, regions: Regions, dim: int, rows: int, *, recency: int = RECENCY_NONE, purpose: str = "table"
    ) -> SharedContent:
        """An empty version with memory for ``rows`` keys, owned by this process until a header leads to it.

        Raises:
            CapacityError: the segment or its file system has too little space.
        """
        self = cls(segment, regions, purpose)
        limit = _limit_for(rows)
        with segment.turn():
            rows_region = regions.allocate(4 * dim * limit, f"{purpose}: rows")
            try:
                index = self._new_table(dim, limit, recency, rows_region)
            except BaseException:
                regions.free(rows_region)
                raise
            self._bind(index)
            self._record[C_GENERATION] = self._index_meta()[META_GENERATION // 8] = segment.next_serial()
            try:
                self.commit_slots(limit)
            except BaseException:
                self.release()
                raise
        self._limit_load()
        return self

    @classmethod
    def find(cls, segment: Segment, regions: Regions, block: int, purpose: str) -> SharedContent:
        """The version whose index block is at an address."""
        self = cls(segment, regions, purpose)
        region = regions.at(block)
        record = word_view(regions.address(region), C_WORDS)
        self._bind(SharedIndex(region, int(record[C_ROWS]), block, regions.size(region)))
        return self

    def _new_table(self, dim: int, limit: int, recency: int, rows: int) -> SharedIndex:
        """A table region without entries for rows in the region ``rows``, owned by this process."""
        regions, size = self._space, _table_bytes(limit, recency)
        region = regions.allocate(size, f"{self.purpose}: index")
        try:
            regions.commit(region, size)
        except BaseException:
            regions.free(region)
            raise
        start = regions.address(region)
        lines, offset = lines_for(limit), index_offset(limit, recency)
        word_view(start, PAGE // 8)[:] = 0
        word_view(start + offset, index_bytes(lines) // 8)[:] = 0
        record = word_view(start, C_WORDS)
        record[[C_LIMIT, C_ROWS, C_DIM, C_RECENCY_MODE]] = limit, rows, dim, recency
        record[C_SERIAL] = self._segment.next_serial()
        meta = word_view(start + offset, META_BYTES // 8)
        meta[META_LINES // 8], meta[META_ROWS // 8], meta[META_ROW_BYTES // 8] = lines, regions.address(rows), 4 * dim
        meta[META_RECENCY // 8] = 0 if recency == RECENCY_NONE else start + PAGE + 8 * limit
        meta[META_RECENCY_MODE // 8] = recency
        return SharedIndex(region, rows, start + offset, regions.size(region))

    def _bind(self, index: SharedIndex) -> None:
        """Be the version in a table region."""
        start = self._space.address(index.region)
        record = word_view(start, C_WORDS)
        self._record, self._serial = record, int(record[C_SERIAL])
        self.state = record[:STATE_WORDS]
        self.dim, self._limit, self._recency_mode = (int(record[word]) for word in (C_DIM, C_LIMIT, C_RECENCY_MODE))
        self.row_bytes = 4 * self.dim
        self.free = word_view(start + PAGE, self._limit)
        self.index = index  # type: ignore[assignment]  # has what callers use of a region

    def is_at(self, block: int) -> bool:
        """Whether this is the version whose index block is at an address, now."""
        return self.index.address == block and int(self._record[C_SERIAL]) == self._serial

    @property
    def places(self) -> tuple[int, int]:
        """Numbers of the regions it is in."""
        return self._index.region, self._index.rows

    @property
    def _index(self) -> SharedIndex:
        return self.index  # type: ignore[return-value]

    def _index_meta(self) -> np.ndarray:
        return word_view(self.index.address, META_BYTES // 8)

    @property
    def bytes(self) -> int:
        """Bytes in use: slots ever written, and the table region."""
        return int(self.state[STATE_NEXT_SLOT]) * self.row_bytes + self.index.committed

    @property
    def sizes(self) -> StoreBytes:
        rows = int(self.state[STATE_NEXT_SLOT]) * self.row_bytes
        return StoreBytes(rows=rows, index=self.index.committed, spare=self._space.size(self._index.rows) - rows)

    # -- slots --------------------------------------------------------------------------------------------------------------

    def rows_view(self, start: int, stop: int) -> np.ndarray:
        address = self._space.address(self._index.rows) + start * self.row_bytes
        return _floats(address, (stop - start) * self.dim).reshape(-1, self.dim)

    def commit_slots(self, slots: int) -> None:
        with self._segment.turn():
            self._space.commit(self._index.rows, slots * self.row_bytes)
            self.state[STATE_SLOT_LIMIT] = max(int(self.state[STATE_SLOT_LIMIT]), slots)

    @property
    def is_packed(self) -> bool:
        return True  # all slots of a table region have memory from the start

    def _reserve_free(self, more: int) -> None:
        """The list has an entry for every slot."""

    # -- another table region -------------------------------------------------------------------------------------------------

    def build_index(self, more: int = 0, keys: int = 0) -> tuple[SharedIndex, int]:  # type: ignore[override]
        """A table region beside this one, without erased entries and with ``more`` slots or half as many again; else as it was.

        Raises:
            CapacityError: no space for it, not even for a few more; nothing has changed.
        """
        with self._segment.turn():
            return self._built(more)

    def _built(self, more: int) -> tuple[SharedIndex, int]:
        if not more:  # an index has room for all slots
            return self._moved(self._limit)
        limits = sorted({max(self._limit * 3 // 2, self._limit + more), self._limit * 9 // 8, self._limit + _MIN_SLACK})
        while True:
            try:
                return self._moved(limits[-1])
            except CapacityError:
                limits.pop()
                if not limits or limits[-1] <= self._limit:
                    raise

    def _moved(self, limit: int) -> tuple[SharedIndex, int]:
        regions, rows = self._space, self._index.rows
        size, before = limit * self.row_bytes, regions.size(rows)
        if size > before and not regions.extend(rows, size):
            rows = regions.allocate(size, f"{self.purpose}: rows")
        try:
            regions.commit(rows, size)
            if rows != self._index.rows:
                used = int(self.state[STATE_NEXT_SLOT]) * self.dim
                _floats(regions.address(rows), used)[:] = _floats(regions.address(self._index.rows), used)
            new = self._new_table(self.dim, limit, self._recency_mode, rows)
        except BaseException:
            if rows != self._index.rows:
                regions.free(rows)
            else:  # a smaller growth may have use for it
                regions.shrink(rows, before)
            raise
        return new, self._copied_to(new, limit)

    def _copied_to(self, new: SharedIndex, limit: int) -> int:
        """Copy record, list of slots, recency words and index entries to an empty table region; returns the number of rows."""
        start = self._space.address(new.region)
        record, free = word_view(start, C_WORDS), word_view(start + PAGE, limit)
        queued, spare = int(self._record[C_QUEUED]), int(self.state[STATE_FREE])
        record[:STATE_WORDS] = self.state
        record[STATE_SLOT_LIMIT] = limit
        for word in (C_QUEUED, C_BATCHES, C_GENERATION, C_RENEWED_AT):
            record[word] = self._record[word]
        record[C_BATCH_LIST : C_BATCH_LIST + 2 * BATCHES] = self._record[C_BATCH_LIST : C_BATCH_LIST + 2 * BATCHES]
        free[:spare] = self.free[:spare]
        free[limit - queued :] = self.free[self._limit - queued :]
        if self._recency_mode != RECENCY_NONE:
            old = word_view(self._space.address(self._index.region) + PAGE + 8 * self._limit, self._limit)
            word_view(start + PAGE + 8 * limit, limit)[: self._limit] = old[:limit]
        word_view(new.address, META_BYTES // 8)[META_GENERATION // 8] = record[C_GENERATION]
        return int(host_reindex(self.index.address, new.address))

    def use_index(self, index: SharedIndex, live: int) -> None:  # type: ignore[override]
        owned = self._space.is_owned(self._index.region)
        self._bind(index)
        self.state[STATE_LIVE] = self.state[STATE_USED] = live
        self._limit_load()
        if not owned:
            self._space.disown(index.region, index.rows)

    def retire_index(self, index: SharedIndex, tag: int) -> None:  # type: ignore[override]
        self._space.retire(index.region, tag)
        if index.rows != self._index.rows:
            self._space.retire(index.rows, tag)

    def _limit_load(self) -> None:
        self.state[STATE_MAX_USED] = int(entries_of(self.block) * MAX_LOAD)

    # -- generations ----------------------------------------------------------------------------------------------------------

    def is_due(self, writes: int) -> bool:
        return int(self.state[STATE_WRITES]) + writes - int(self._record[C_RENEWED_AT]) > GENERATION_WRITES

    def renew_generation(self) -> None:
        with self._segment.turn():
            self._record[C_GENERATION] = self._segment.next_serial()
            self._record[C_RENEWED_AT] = self.state[STATE_WRITES]
            self._index_meta()[META_GENERATION // 8] = self._record[C_GENERATION]
            self._segment.note_published()

    # -- slots that readers may hold ------------------------------------------------------------------------------------------

    def retire_slots(self, epochs: Epochs) -> None:
        count = int(self.state[STATE_RETIRED])
        if count:
            self.state[STATE_RETIRED] = 0
            self._enqueue(self.retired[:count], epochs.advance())

    def _enqueue(self, words: np.ndarray, tag: int) -> None:
        record, queued = self._record, int(self._record[C_QUEUED])
        end = self._limit - queued
        self.free[end - len(words) : end] = words
        record[C_QUEUED] = queued + len(words)
        number = int(record[C_BATCHES])
        if number == BATCHES:  # the last one waits a little longer
            record[C_BATCH_LIST + 2 * number - 2] = tag
            record[C_BATCH_LIST + 2 * number - 1] += len(words)
            return
        record[C_BATCH_LIST + 2 * number : C_BATCH_LIST + 2 * number + 2] = tag, len(words)
        record[C_BATCHES] = number + 1

    def collect(self, epochs: Epochs) -> None:
        number = int(self._record[C_BATCHES])
        if not number:
            return
        batches = self._record[C_BATCH_LIST : C_BATCH_LIST + 2 * number].reshape(-1, 2)
        over = int(np.searchsorted(batches[:, 0], epochs.oldest()))  # tags ascend
        if not over:
            return
        count = int(batches[:over, 1].sum())
        queued, end = int(self._record[C_QUEUED]), int(self.state[STATE_FREE])
        words = self.free[self._limit - count :].copy()
        self.free[self._limit - queued + count :] = self.free[self._limit - queued : self._limit - count].copy()
        self.free[end : end + count] = words
        self.state[STATE_FREE] = end + count
        self._record[C_QUEUED] = queued - count
        batches[: number - over] = batches[over:].copy()
        self._record[C_BATCHES] = number - over

    def repair(self, block: int, epochs: Epochs) -> None:
        slots = min(self._limit, int(self.state[STATE_NEXT_SLOT]))
        taken = np.zeros(self._limit, np.uint8)
        host_census(block, taken, self.state)
        self._limit_load()
        self.state[STATE_FREE] = self.state[STATE_RETIRED] = 0
        self.state[STATE_NEXT_SLOT], self.state[STATE_SLOT_LIMIT] = slots, self._limit
        self._record[C_QUEUED] = self._record[C_BATCHES] = 0
        lost = np.flatnonzero(taken[:slots] == 0) + FIRST_SLOT
        tag = epochs.advance()
        if len(lost):
            self._enqueue(lost, tag)
        self.renew_generation()  # how often these slots were used is not known any more

    # -- the end --------------------------------------------------------------------------------------------------------------

    def own(self) -> None:
        """This process needs the version though no header leads to it."""
        self._space.own(*self.places)

    def disown(self) -> None:
        """A header leads to it."""
        self._space.disown(*self.places)

    def retire(self, tag: int) -> None:
        """Free the version after the epoch ``tag``."""
        for region in self.places:
            self._space.retire(region, tag)

    def release(self) -> None:
        with self._segment.turn():
            if int(self._record[C_SERIAL]) == self._serial:  # else another process had it already and moved on
                for region in self.places:
                    self._space.free(region)


def _floats(address: int, count: int) -> np.ndarray:
    """float32 ``[count]`` at an address."""
    view: np.ndarray = np.frombuffer((ctypes.c_float * count).from_address(address), np.float32)  # type: ignore[call-overload]
    return view
