"""The bound of a table, and which rows are evicted when it is passed (HugeCTR's overflow policies)."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np

from hps_numba.kernels.host.evict import HISTOGRAM, host_evict
from hps_numba.kernels.host.write import STATE_RETIRED, host_erase
from hps_numba.kernels.layouts.host_store import (
    FIRST_SLOT,
    META_BYTES,
    RECENCY_COUNT,
    RECENCY_NONE,
    RECENCY_TIME,
    SLOT_MASK,
)
from hps_numba.storage.host.content import TableContent, address_of, entries_of
from hps_numba.storage.host.epochs import Epochs

__all__ = ["RECENCY_OF_POLICY", "EvictionWatcher", "RowBound"]

#: what each overflow policy keeps per slot
RECENCY_OF_POLICY = {"evict_random": RECENCY_NONE, "evict_least_used": RECENCY_COUNT, "evict_oldest": RECENCY_TIME}
_WATCHED_ROWS = 65536  # that leave at a time


class EvictionWatcher(Protocol):
    """Sees rows before they are evicted. It is called by the writer, under the write lock, and must raise nothing."""

    @property
    def watches(self) -> bool:
        """Whether it is to be called; rows leave faster without."""

    def leaving(self, keys: np.ndarray, rows: np.ndarray) -> bool:
        """Lookups still find these rows (int64 ``[n]``, float32 ``[n, dim]``); false if they have to stay for now."""

    def left(self, keys: np.ndarray) -> None:
        """The rows of these keys are gone."""


class RowBound:
    """At most ``max_rows`` rows; a table that passes it is trimmed to ``round(max_rows * target)``.

    Attributes:
        recency: the ``RECENCY_*`` mode that the table has to keep.
        evicted: rows evicted so far.
        seed: of the random policy, as it is after the evictions so far.
        watcher: sees rows before they leave, and may keep them: the table then stays over its bound. None: nobody does.

    Thread safety: ``trim`` by the writer.
    """

    def __init__(self, max_rows: int | None, policy: str, target: float, seed: int) -> None:
        """``max_rows`` None is no bound; ``policy`` is a key of ``RECENCY_OF_POLICY``."""
        self.max_rows = max_rows
        self.recency = RECENCY_OF_POLICY[policy] if max_rows is not None else RECENCY_NONE
        self.evicted = 0
        self.seed = seed
        self.watcher: EvictionWatcher | None = None
        self._kept = 0 if max_rows is None else round(max_rows * target)

    def trim(self, content: TableContent, epochs: Epochs) -> None:
        """Evict down to the target if the bound is passed."""
        if self.max_rows is None or content.live <= self.max_rows:
            return
        histogram = np.empty(HISTOGRAM, np.int64)
        by_recency = True
        while (excess := content.live - self._kept) > 0:
            self.seed += 1
            if self.watcher is not None and self.watcher.watches:
                if not self._evict_watched(self.watcher, content, epochs, excess, by_recency, histogram):
                    return
            else:
                retired = content.reserve_retired(excess)
                self.evicted += host_evict(content.block, excess, by_recency, self.seed, histogram, content.state, retired)
                content.retire_slots(epochs)
            by_recency = (
                False  # rows that lookups touched during the first round are picked at random: readers cannot prolong this
            )

    def _evict_watched(
        self,
        watcher: EvictionWatcher,
        content: TableContent,
        epochs: Epochs,
        excess: int,
        by_recency: bool,
        histogram: np.ndarray,
    ) -> bool:
        """Evict up to ``excess`` rows after the watcher has seen them; false if it keeps some."""
        keys, slots = self._victims(content, excess, by_recency, histogram)
        rows = content.rows_view(0, content.slots)
        for start in range(0, len(keys), _WATCHED_ROWS):
            part = np.ascontiguousarray(keys[start : start + _WATCHED_ROWS])
            if not watcher.leaving(part, rows[slots[start : start + _WATCHED_ROWS]]):
                return False
            retired = content.reserve_retired(len(part))
            self.evicted += host_erase(content.block, address_of(part), len(part), content.state, retired)
            content.retire_slots(epochs)
            watcher.left(part)
        return True

    def _victims(
        self, content: TableContent, excess: int, by_recency: bool, histogram: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and slots of the rows that ``host_evict`` would evict: it works on a copy of the index."""
        size = META_BYTES // 8 + 2 * entries_of(content.block)
        block: np.ndarray = np.frombuffer((ctypes.c_int64 * size).from_address(content.block), np.int64)  # type: ignore[call-overload]
        copy, state = block.copy(), content.state.copy()
        state[STATE_RETIRED] = 0
        host_evict(address_of(copy), excess, by_recency, self.seed, histogram, state, np.empty(excess, np.int64))
        entries, evicted = block[META_BYTES // 8 :].reshape(-1, 2), copy[META_BYTES // 8 :].reshape(-1, 2)
        leaving = np.flatnonzero(entries[:, 1] != evicted[:, 1])
        return entries[leaving, 0], (entries[leaving, 1] & SLOT_MASK) - FIRST_SLOT
