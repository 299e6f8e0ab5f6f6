"""Lookups of a table with slower tiers: host memory or a cache first, then the tiers for the keys that both lack.

What a lookup fetches also enters the cache it came from and, with ``cache_missed_embeddings``, host memory; both only if the
table was not written since the lookup began (``TableWrites.unwritten_since``). Concurrent lookups share what they fetch
(``SharedFetches``). ``prefetch`` does the same without a lookup.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from hps_numba.arrays.cuda import DeviceKeys
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.config import TableSpec
from hps_numba.device.streams import is_capturing
from hps_numba.errors import DeviceError
from hps_numba.kernels.dtypes import ELEMENT_BYTES, KEY_BYTES
from hps_numba.kernels.layouts.cache import MAX_BATCH
from hps_numba.kernels.layouts.host_store import (
    COUNTER_ABSENT,
    COUNTER_TIER_ERRORS,
    COUNTER_TIER_HITS,
    COUNTER_UNANSWERED,
)
from hps_numba.server.flights import SharedAnswer
from hps_numba.server.miss_list import MissList
from hps_numba.server.shared_fetches import SharedFetches
from hps_numba.server.stats import COUNTER_JOINED, COUNTER_PREFETCHED, Counters
from hps_numba.server.table_writes import TableWrites
from hps_numba.storage.distinct import distinct_keys
from hps_numba.storage.host.pooling import Bags, Missing
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tier_stack import TierStack

__all__ = ["Background", "SlowPath", "SlowPathOptions"]

Background = Callable[[Callable[[], None]], bool]
"""Runs a job later; False if it never will."""


class Pool(Protocol):
    """``HostStore.pool``: writes pooled rows and returns how many keys had none."""

    def __call__(
        self, bags: Bags, out: np.ndarray, default: float, *, counters: int = 0, missing: Missing | None = None
    ) -> int: ...


@dataclass(frozen=True, kw_only=True)
class SlowPathOptions:
    """When lookups wait for slower tiers, and what becomes of the rows.

    Attributes:
        time_budget: seconds that a lookup waits for slower tiers, or None: as long as they take.
        keep_missed: rows found in slower tiers also enter host memory, in the background (``cache_missed_embeddings``).
        hit_rate_threshold: share of a batch's keys found in cache and host memory from which a lookup through a cache does not
            wait for slower tiers; 0 or less never waits (checklist G11: by requests, not by distinct keys).
    """

    time_budget: float | None = None
    keep_missed: bool = False
    hit_rate_threshold: float = 1.0


class FetchedRows(NamedTuple):
    """Rows from slower tiers for a batch of keys.

    Attributes:
        keys: int64 ``[m]``, the distinct keys.   rows: float32 ``[m, dim]``, the default value where there is none.
        found: bool ``[m]``.   inverse: ``[n]``, the row of each key of the batch; None: row ``i`` is that of key ``i``.
    """

    keys: np.ndarray
    rows: np.ndarray
    found: np.ndarray
    inverse: np.ndarray | None

    def of_batch(self) -> np.ndarray:
        """float32 ``[n, dim]``: the row of each key of the batch."""
        return self.rows if self.inverse is None else self.rows[self.inverse]

    def present(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct keys that were found, and their rows."""
        if self.found.all():
            return self.keys, self.rows
        return self.keys[self.found], self.rows[self.found]


class SlowPath:
    """Lookups of one table that may go on to slower tiers.

    Args:
        spec: the table.   store: its rows in host memory, or None.   tiers: the slower tiers, at least one.
        writes: says whether the table was written meanwhile.   counters: of the table.

    Attributes:
        background: runs a job on the model's background threads; says False if it dropped the job.

    Thread safety: every method.
    """

    def __init__(
        self,
        spec: TableSpec,
        store: HostStore | None,
        tiers: TierStack,
        writes: TableWrites,
        counters: Counters,
        background: Background,
        options: SlowPathOptions,
    ) -> None:
        self.background = background
        self._spec = spec
        self._store = store
        self._fetches = SharedFetches(spec, tiers, writes.settled_count)
        self._writes = writes
        self._counters = counters
        self._threshold = options.hit_rate_threshold
        self._time_budget = options.time_budget
        self._keeps_missed = options.keep_missed and store is not None

    # -- through host memory ---------------------------------------------------------------------

    def lookup(self, keys: np.ndarray, out: np.ndarray) -> None:
        """Write the row of each key to ``out``; arguments as for ``ServedTable.lookup``, at least one key."""
        write_count = self._writes.count
        if self._store is None:
            self._counters.add_missed_call(len(keys))
            missing = len(keys)
        else:
            misses = np.empty(len(keys), np.int64)
            missing = self._store.lookup(keys, out, self._spec.default_value, misses, counters=self._counters.address)
            if not missing:
                return
        if missing == len(keys):
            own = keys.copy()  # others may read it when the caller has it back
            fetched = self._fetch(own, write_count, None if self._keeps_missed else out)
            if fetched.rows is not out:
                out[:] = fetched.of_batch()
        else:
            positions = misses[:missing]
            fetched = self._fetch(keys[positions], write_count)
            out[positions] = fetched.of_batch()
        self._keep_later(fetched, write_count)

    def lookup_pooled(self, pool: Pool, bags: Bags, out: np.ndarray) -> None:
        """Write the pooled row of each bag to ``out`` by ``pool``, which reads host memory."""
        write_count = self._writes.count
        missing = Missing(len(bags.keys))
        if not pool(bags, out, self._spec.default_value, counters=self._counters.address, missing=missing):
            return
        fetched = self._fetch(bags.keys[missing.positions], write_count)
        inverse = np.arange(len(fetched.keys)) if fetched.inverse is None else fetched.inverse
        missing.answer(fetched.rows, inverse)
        pool(bags, out, self._spec.default_value, missing=missing)
        self._keep_later(fetched, write_count)

    # -- through a cache ---------------------------------------------------------------------

    def lookup_cached(self, cache: EmbeddingCache, keys: DeviceKeys, out: int, stream: int, out_type: str) -> None:
        """Write the row of each key to ``out``; arguments as for ``ServedTable.lookup_cached``.

        Raises:
            DeviceError: the stream is captured by a graph, which cannot wait for slower tiers.
        """
        if cache.device is not None and is_capturing(stream):
            raise DeviceError(f"{self._spec.tag}: a graph cannot capture lookups of a table with slower tiers: they may wait")
        row_bytes = self._spec.dim * ELEMENT_BYTES[out_type]
        for start in range(0, keys.n, MAX_BATCH):
            self._lookup_batch(cache, _batch_from(keys, start), out + start * row_bytes, stream, out_type)

    def _lookup_batch(self, cache: EmbeddingCache, keys: DeviceKeys, out: int, stream: int, out_type: str) -> None:
        write_count = self._writes.count
        never_waits = self._threshold <= 0
        misses = MissList(cache, keys, stream, read_later=self._threshold <= 1)
        handed_over = False
        try:
            cache.lookup(keys.address, keys.n, out, stream, key_form=keys.form, out_type=out_type, absent_list=misses.address)
            misses.record()
            missing = None if never_waits else misses.count()
            if missing == 0:
                return
            if missing is None or 1 - missing / keys.n >= self._threshold:
                handed_over = self._fetch_later(cache, misses, missing, write_count)
                return
            positions, absent_keys = misses.read(missing)
            fetched = self._fetch(absent_keys, write_count)
            cache.scatter(positions, fetched.of_batch(), out, stream, out_type)
            self._writes.keep_in_cache(cache, *fetched.present(), write_count)
            self._keep_later(fetched, write_count)
        finally:
            if not handed_over:
                misses.release()

    def _fetch_later(self, cache: EmbeddingCache, misses: MissList, missing: int | None, write_count: int) -> bool:
        """Fetch the listed keys in the background and count them as unanswered.

        Args:
            missing: how many keys are listed, or None if nothing has waited for the list yet; then the job does.

        Returns:
            Whether a job was started, which releases the list.
        """
        if missing is not None:
            self._counters.add(COUNTER_UNANSWERED, missing)  # now: a started job owns the list, whatever interrupts this thread
        started = self.background(partial(self._fetch_into_cache, cache, misses, missing, write_count))
        if missing is None and not started:  # else the job counts them
            self._counters.add(COUNTER_UNANSWERED, misses.count())
        return started

    def _fetch_into_cache(self, cache: EmbeddingCache, misses: MissList, missing: int | None, write_count: int) -> None:
        try:
            if missing is None:
                missing = misses.count()
                self._counters.add(COUNTER_UNANSWERED, missing)
            if missing:
                keys = distinct_keys(misses.read(missing)[1])
                fetched = self._bring_up(keys, write_count)
                self._writes.keep_in_cache(cache, *fetched.present(), write_count)
                if self._keeps_missed:
                    self._writes.keep(*fetched.present(), write_count)
        finally:
            misses.release()

    # -- fetching and keeping ---------------------------------------------------------------------

    def _fetch(self, keys: np.ndarray, write_count: int, out: np.ndarray | None = None) -> FetchedRows:
        """Fetch int64 keys ``[n]`` from the slower tiers, each distinct one once, within the time budget, and count them.

        Args:
            out: float32 ``[n, dim]``, contiguous: the rows may be this array, which is undefined otherwise.
        """
        deadline = None if self._time_budget is None else time.monotonic() + self._time_budget
        distinct, inverse = _distinct(keys)
        answer = self._fetches.fetch(distinct, write_count, deadline, out=out if inverse is None else None)
        hits, unsure = _counted(answer.found, inverse), _counted(answer.unsure, inverse)
        self._counters.add(COUNTER_TIER_HITS, hits)
        self._counters.add(COUNTER_UNANSWERED, unsure)
        self._counters.add(COUNTER_ABSENT, len(keys) - hits - unsure)
        self._count_calls(answer)
        return FetchedRows(distinct, answer.rows, answer.found, inverse)

    def _bring_up(self, keys: np.ndarray, write_count: int) -> FetchedRows:
        """Fetch distinct keys that no lookup waits for, however long that takes."""
        answer = self._fetches.fetch(keys, write_count)
        self._count_calls(answer)
        return FetchedRows(keys, answer.rows, answer.found, None)

    def prefetch(self, keys: np.ndarray, write_count: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of some distinct keys that slower tiers have, and their rows.

        Args:
            write_count: of the table, read before it was decided which keys to fetch.
        """
        found, rows = self._bring_up(keys, write_count).present()
        self._counters.add(COUNTER_PREFETCHED, len(found))
        return found, rows

    def _count_calls(self, answer: SharedAnswer) -> None:
        self._counters.add(COUNTER_TIER_ERRORS, answer.errors)
        self._counters.add(COUNTER_JOINED, answer.joined)

    def _keep_later(self, fetched: FetchedRows, write_count: int) -> None:
        """Insert the rows that were found in host memory, in the background, if the config asks for it."""
        if self._keeps_missed and fetched.found.any():
            self.background(partial(self._writes.keep, *fetched.present(), write_count))


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The distinct keys, and which of them each key is; None if they are the keys themselves."""
    ascending = np.sort(keys)
    if not (ascending[1:] == ascending[:-1]).any():
        return keys, None
    distinct, inverse = np.unique(keys, return_inverse=True)
    return distinct, inverse


def _counted(flags: np.ndarray, inverse: np.ndarray | None) -> int:
    """How many keys of a batch have the flag of their distinct key."""
    return int(np.count_nonzero(flags if inverse is None else flags[inverse]))


def _batch_from(keys: DeviceKeys, start: int) -> DeviceKeys:
    """The keys from ``start`` on, as many as a batch may have."""
    n = min(keys.n - start, MAX_BATCH)
    return keys._replace(address=keys.address + start * KEY_BYTES[keys.form], n=n)
