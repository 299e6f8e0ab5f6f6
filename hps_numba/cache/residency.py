"""Whether every row of the host store is in the cache, and what lookups do without while it is.

Then a lookup has nothing to insert and, if the clock of the policy does not advance meanwhile, leaves nothing to do: it is one
kernel. To be wrong about it for a while costs time and makes no answer wrong: rows that the cache lacks come from the host
store, again and again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hps_numba.cache.kernel_set import KernelSet
from hps_numba.cache.staging import NEVER
from hps_numba.cache.state import CacheState
from hps_numba.kernels.cache.bulk_load import keys_twice
from hps_numba.kernels.layouts.cache import LINE_BYTES, META_AT, OCCUPIED, SET_BYTES, STATE_EVICTED
from hps_numba.storage.host.store import HostStore

__all__ = ["Residency", "line_metas", "listing_from", "resident_rows"]


def listing_from(device: int | None, mirrors: bool) -> int:
    """Keys of the smallest batch that lists the keys it misses, for kernels of their own (``kernels.cache.miss_sorted``).

    ``mirrors``: there may be a copy of the store's index, which tells where rows are.
    """
    return NEVER if device is None or not mirrors else 131_072


def line_metas(lines: np.ndarray) -> np.ndarray:
    """The meta words of lines of the index, uint32."""
    return lines.reshape(-1, LINE_BYTES)[:, META_AT:].copy().view(np.uint32)[:, 0]


def resident_rows(lines: np.ndarray) -> int:
    """Rows that lines of the index hold."""
    return int(np.bitwise_count(line_metas(lines) & OCCUPIED).sum())


class Residency:
    """What is known of the rows in one cache.

    Args:
        fixed: the cache inserts nothing.   listing_from: keys of the smallest batch that may list the keys it misses.

    Attributes:
        complete: every row of the store is here.
        single_kernel: a lookup is one kernel, as there is nothing to insert and nothing to count.
        lists_missed_from: keys of the smallest batch that lists the keys it misses.
        on_loss: is called when the cache is complete no more.

    Thread safety: attributes may be read by any thread; methods by one thread at a time (``Lifecycle.controlled``).
    """

    def __init__(
        self, state: CacheState, kernels: KernelSet, store: HostStore | None, *, fixed: bool, listing_from: int
    ) -> None:
        self._state, self._kernels, self._store = state, kernels, store
        self._fixed = fixed
        self._seen = 0, 0
        self.listing_from = self.lists_missed_from = listing_from
        self.complete = self.single_kernel = False
        self.on_loss: Callable[[], object] | None = None

    def set_complete(self, complete: bool) -> None:
        """Say whether the cache has a row for every key of its store."""
        if self.complete and not complete and self.on_loss is not None:
            self.on_loss()
        self.complete = complete
        self.lists_missed_from = NEVER if complete else self.listing_from
        self.single_kernel = complete and self._kernels.idle_without_insertions

    def policy_changed(self) -> None:
        """Another policy is in force."""
        self.set_complete(self.complete)

    def store_changed(self) -> None:
        """The store was changed: if a key was added, or a row evicted here meanwhile, not all rows are here."""
        if self.complete and self._seen != self._see():
            self.set_complete(False)

    def _see(self) -> tuple[int, int]:
        """Keys added to the store so far, and rows evicted here."""
        return 0 if self._store is None else self._store.added, self._state.word(STATE_EVICTED)

    def check(self) -> int:
        """Read the index to see whether all rows of the store are here; returns how many are."""
        seen = self._see()
        rows = -1  # not known
        if self._store is not None and self._store.max_rows is None and not self._store.memory.shared:
            rows = len(self._store)
        lines = self._state.read_lines()
        resident = resident_rows(lines)
        complete = resident == rows
        if complete and not self._fixed:
            complete = keys_twice(lines.__array_interface__["data"][0], len(lines) // SET_BYTES) == 0
        self._seen = seen
        self.set_complete(complete)
        return resident
