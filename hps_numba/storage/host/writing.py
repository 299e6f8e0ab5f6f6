"""Writing to a host store: batches of keys go through the kernels, and the table grows where they stop early.

A kernel never waits and allocates nothing: it stops at the key for which the index is full or no slot is free. The writer then
makes space and calls it again for the rest of the batch. Space is for thousands of rows or for the rest of the batch: a table
with one free slot would otherwise be written a row at a time, as each row gives back the slot that the next one takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from hps_numba.errors import ArrayError, CapacityError
from hps_numba.kernels.host.write import host_erase, host_upsert
from hps_numba.kernels.layouts.host_store import GENERATION_WRITES
from hps_numba.storage.host.bound import RowBound
from hps_numba.storage.host.bulk import BulkWrite, Rewrite, pays_off
from hps_numba.storage.host.content import TableContent, address_of
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.write_lock import WriteLock

__all__ = ["StoreWriter"]

_CALL_ROWS = 4096  # a kernel call that writes at least so many costs next to nothing beside them
_MAX_CALL_ROWS = GENERATION_WRITES // 4


class StoreWriter:
    """Upserts, updates and erasures of one store.

    Args:
        growth_bytes: bytes of rows added when slots run out.
        batch_rows: rows written between two checks of the bound.
        on_added: told how many keys were new, after each batch.

    Thread safety: every method; writers wait for each other.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        header: StoreHeader,
        epochs: Epochs,
        lock: WriteLock,
        bound: RowBound,
        *,
        growth_bytes: int,
        batch_rows: int,
        on_added: Callable[[int], object],
    ) -> None:
        self._name = name
        self._dim = dim
        self._header = header
        self._epochs = epochs
        self._lock = lock
        self._bound = bound
        self._growth_bytes = growth_bytes
        self._batch_rows = batch_rows
        self._on_added = on_added

    def write(self, keys: np.ndarray, rows: np.ndarray, *, only_present: bool) -> int:
        """Upsert rows and return how many keys were new; or ``only_present``: replace existing rows and return how many.

        Raises:
            ArrayError: ``rows`` has another shape than ``[n, dim]``.
            CapacityError: no memory for more rows; those before stay written.
            ClosedError: the store is closed.
        """
        keys = np.ascontiguousarray(keys, np.int64)
        rows = np.ascontiguousarray(rows, np.float32)
        if rows.shape != (len(keys), self._dim):
            raise ArrayError(f"{self._name}: rows: expected shape ({len(keys)}, {self._dim}), got {rows.shape}")
        changed = 0
        now = time.monotonic_ns()
        with self._lock.writing() as content:
            for start in range(0, len(keys), self._batch_rows):
                part = slice(start, start + self._batch_rows)
                changed += self._write_batch(content, keys[part], rows[part], only_present, now)
                self._bound.trim(content, self._epochs)
        return changed

    def erase(self, keys: np.ndarray) -> int:
        """Erase the rows of the keys; returns how many there were.

        Raises:
            ClosedError: the store is closed.
        """
        erased = 0
        keys = np.ascontiguousarray(keys, np.int64)
        with self._lock.writing() as content:
            for start in range(0, len(keys), self._batch_rows):
                part = keys[start : start + self._batch_rows]
                retired = content.reserve_retired(len(part))
                erased += host_erase(content.block, address_of(part), len(part), content.state, retired)
                content.retire_slots(self._epochs)
        return erased

    @contextmanager
    def rewriting(self, keys: np.ndarray) -> Iterator[Rewrite]:
        """``HostStore.rewriting``."""
        keys = np.ascontiguousarray(keys, np.int64)
        with self._lock.writing() as content:
            bulk = self._prepared(content, keys, only_present=False)
            if bulk is None:
                self._lock.settle()
                raise CapacityError(f"{self._name}: no memory for {len(keys)} rows beside those that they replace")
            rewrite = Rewrite(bulk, self._epochs, self._on_added)
            try:
                yield rewrite
            except BaseException:
                if rewrite.abandon():
                    self._lock.settle()
                raise
            rewrite.abandon()
            self._bound.trim(content, self._epochs)

    def _prepared(self, content: TableContent, keys: np.ndarray, *, only_present: bool) -> BulkWrite | None:
        """A write of many rows, with slots and index entries for all of them; None if there is no memory for those.

        Raises:
            CapacityError: there is no slot at all.
        """
        content.collect(self._epochs)
        self._renew_generation(content, len(keys))
        bulk = BulkWrite(content, keys)
        bulk.locate()
        wanted = int(np.count_nonzero(bulk.found)) if only_present else len(keys)
        self._make_slots(content, wanted, True)
        if content.spare_slots < wanted:
            return None
        if not only_present and bulk.new_keys > content.spare_entries:
            try:
                self._renew_index(content, new_keys=bulk.new_keys)
            except CapacityError:
                return None
            if bulk.new_keys > content.spare_entries:  # a table that is shared grows by as much as there is memory for
                return None
        bulk.locate()
        bulk.take(only_present=only_present)
        return bulk

    def _renew_generation(self, content: TableContent, rows: int) -> None:
        if content.is_due(rows):
            content.renew_generation()
            self._header.notify(content.block)

    def _write_batch(self, content: TableContent, keys: np.ndarray, rows: np.ndarray, only_present: bool, now: int) -> int:
        many = pays_off(len(keys), content.row_bytes)
        bulk = self._prepared(content, keys, only_present=only_present) if many else None
        if bulk is None:
            return self._write_each(content, keys, rows, only_present, now)
        bulk.place(rows)
        added, written = bulk.publish(self._epochs)
        self._on_added(added)
        return written if only_present else added

    def _write_each(self, content: TableContent, keys: np.ndarray, rows: np.ndarray, only_present: bool, now: int) -> int:
        """Go from key to key, as far as there is memory."""
        done = changed = 0
        can_grow = True
        while done < len(keys):
            content.collect(self._epochs)
            rows_of_call = min(len(keys) - done, _MAX_CALL_ROWS)
            self._renew_generation(content, rows_of_call)
            retired = content.reserve_retired(rows_of_call)
            step, more = host_upsert(
                content.block,
                address_of(keys) + 8 * done,
                address_of(rows) + content.row_bytes * done,
                rows_of_call,
                only_present,
                content.state,
                content.free,
                retired,
                now,
            )
            content.retire_slots(self._epochs)
            done += step
            changed += more
            self._on_added(0 if only_present else more)
            if step < rows_of_call:
                if content.index_is_full:
                    self._grow_index(content)
                else:
                    can_grow = self._make_slots(content, min(len(keys) - done, _CALL_ROWS), can_grow)
        return changed

    def _grow_index(self, content: TableContent) -> None:
        try:
            self._renew_index(content)
        except CapacityError:
            self._lock.settle()
            raise

    def _renew_index(self, content: TableContent, more_slots: int = 0, new_keys: int = 0) -> None:
        old = content.index
        new, live = content.build_index(more_slots, new_keys)
        self._header.publish(new.address)
        content.use_index(new, live)
        content.retire_index(old, self._epochs.advance())

    def _make_slots(self, content: TableContent, rows: int, can_grow: bool) -> bool:
        """Slots for ``rows`` rows: those that readers have left, else new ones; at least one.

        Args:
            can_grow: false if there was no memory before in this batch.

        Returns whether there was memory.

        Raises:
            CapacityError: there is no slot at all.
        """
        content.collect(self._epochs)
        missing = rows - content.spare_slots
        if missing <= 0 or (content.has_slots and not can_grow):
            return can_grow
        step = max(1, self._growth_bytes // content.row_bytes)
        try:
            if content.is_packed:
                self._renew_index(content, missing)
            else:
                content.grow_slots(-(-missing // step) * step)
        except CapacityError:
            if not content.has_slots:
                self._lock.settle()
                raise
            return False
        return True
