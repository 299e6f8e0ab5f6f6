"""The embedding cache of one table on one device, or on the CPU (its twin: the same kernels on memory of the process).

A lookup is a few kernels on the caller's stream and nothing else: rows come from the cache, else over the bus from the host
store, else they are the default; a second kernel inserts what was missing. Nothing waits on the host and nothing comes back to
Python, so a lookup can be captured by a graph. (Large batches may be staged instead: host threads gather what is missing,
``cache.staging``.) What is inserted is checked against the store under the lock of its set, and whoever changes the store calls
``update`` or ``erase`` afterwards: then no old row is left, whatever the order on the device.

*Kinds.* ``dynamic``: ways hold rows, newcomers push out others by the policy. ``static`` and ``uvm`` (fixed): the rows are
those of the warming, all of the store or as many as fit; what is not there is answered from the host store and never inserted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hps_numba.cache.backends import LOOKUP_THREADS, Backend
from hps_numba.cache.lookup import KEY_BYTES, STATE_WORDS
from hps_numba.cache.policy_switch import CachePolicy
from hps_numba.errors import ArrayError, CapacityError, ConfigError
from hps_numba.kernels.cache.bulk_load import keys_twice, place_keys
from hps_numba.kernels.compiler.specialize import KernelSpec
from hps_numba.kernels.layouts.cache import (
    BUSY,
    CLEARED,
    LINE_BYTES,
    LINES_PER_SET,
    MAX_BATCH,
    META_AT,
    OCCUPIED,
    SCORES_AT,
    SET_BYTES,
    STATE_BYTES,
    STATE_CALLS,
    STATE_CHANGES,
    STATE_COUNT,
    STATE_EVICTED,
    STATE_HOST,
    STATE_INSERTED,
    STATE_KEYS,
    STATE_NOW,
    STATE_REFUSED,
    STATE_STALE_DROPPED,
    STRIPE_BYTES,
    STRIPES,
    STRIPES_AT,
    WAYS,
    WAYS_PER_LINE,
    WORKSPACE_ABSENT,
    WORKSPACE_ASSUME,
)
from hps_numba.kernels.policies._load import load_policy

__all__ = ["KEY_BYTES", "CacheCounters", "CacheEntry", "EmbeddingCache"]

log = logging.getLogger(__name__)
_WARMING_BATCH = 8192


@dataclass(frozen=True)
class CacheCounters:
    """Since the cache was made. ``misses``: keys not in the cache; ``absent``: of these, not in the host store either.

    ``refused``: newcomers that the policy did not admit. ``staged``: batches whose rows host threads gathered.
    """

    keys: int
    calls: int
    misses: int
    absent: int
    inserted: int
    evicted: int
    stale_dropped: int
    refused: int
    staged: int


class CacheEntry(NamedTuple):
    """A cached key and where it stands. ``score``: in a fixed cache the number of its row."""

    key: int
    score: int
    set: int
    line: int
    way: int


class EmbeddingCache(CachePolicy):
    """The embedding cache of one table.

    Args:
        dim: width of a row in elements.
        rows: rows to hold; a dynamic cache holds at least so many, a fixed one exactly.
        device: number of a CUDA device, whose kernels must reach the memory of the store; None for the CPU.
        kind: ``dynamic``, ``static`` or ``uvm``.
        whole: the cache is to hold all rows of its table (``gpucacheper`` 1.0): more ways than rows, and warming places all.
        policy: who leaves a full set.
        row_type: how rows are stored: ``float32``, ``float16``, ``bfloat16``, ``int8``, ``float8_e4m3`` (spec 6.9).
        default: element of the rows of keys that are nowhere.
        store: the host store behind the cache.
        buffers: most batches of a dynamic cache that run at a time (worker buffers, spec 6.5).
        pagelock: rows of a fixed cache on a device stand in pinned host memory (spec 6.9).
        set_count: number of sets, whatever ``rows`` says; for tests.
        miss_path: how missed rows come from the store: ``direct``, ``staged`` (``cache.staging``), or ``auto``: direct with a
            copy of the store's index on the device, where there is room (``cache.index_mirror``).

    Raises:
        DeviceError: no such device.
        CapacityError: the memory is not there.
        ConfigError: an argument makes no sense.

    **Threads:** every method from any number of threads. Lookups never wait for the others, but for a ``warm`` at the start.
    """

    # -- arrays: synchronous ----------------------------------------------------------------------------------------------

    def lookup_arrays(self, keys: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """``lookup`` for NumPy: float32 ``[n, dim]`` of int64 ``[n]``, written to ``out`` if given."""
        self._check_open()
        keys = self.keys_of(keys)
        out = np.empty((len(keys), self.dim), np.float32) if out is None else out
        if out.dtype != np.float32 or out.shape != (len(keys), self.dim) or not out.flags.c_contiguous:
            raise ArrayError(f"{self.name}: out is {out.dtype}{list(out.shape)}, wanted float32[{len(keys)}, {self.dim}]")
        with self._backend.current(), self._copies(keys) as (address,), self._room(out.nbytes) as room:
            self.lookup(address, len(keys), room, self._stream)
            self._backend.to_host(out, room, self._stream)
        return out

    def query(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the cache has, as if there were no store: rows float32 ``[n, dim]``, and the missing positions, ascending.

        Keys that it has are touched; the rows of others are 0, and nothing is inserted or counted (spec 6.3, Query).
        """
        keys = self.keys_of(keys)
        rows, missing = np.zeros((len(keys), self.dim), np.float32), []
        with self._controlled(), self._copies(keys) as (address,), self._room(rows.nbytes) as room:
            for start in range(0, len(keys), MAX_BATCH):
                n = min(MAX_BATCH, len(keys) - start)
                missing.append(start + self._query_batch(address + 8 * start, n, room + 4 * self.dim * start))
            self._backend.to_host(rows, room, self._stream)
        return rows, np.concatenate(missing) if missing else np.empty(0, np.int64)

    def _query_batch(self, keys: int, n: int, out: int) -> np.ndarray:
        self._lookup_apart(keys, n, out, assume=0)
        if not self.fixed:
            self._finish(self._own, n, 0, 0, 0, self._stream)
        missing = np.empty(int(self._words(self._own.address + WORKSPACE_ABSENT, 1)[0]), np.int64)
        self._backend.to_host(missing, self._own.absent_list, self._stream)
        return np.sort(missing)

    def insert(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Let keys in that the cache lacks, with rows float32 ``[n, dim]``; those that it has are touched (spec 6.3, Replace).

        The store is not asked: rows that may change meanwhile belong in the store, and come from there by ``lookup``.
        """
        self._check_dynamic("insert")
        keys, rows = self.keys_of(keys), self._rows_of(keys, rows)
        stride = 4 * self.dim
        with self._controlled(), self._copies(keys, rows) as (key_address, row_address):
            self._used = True
            self._set_fully_resident(False)  # a row may have to leave
            for start in range(0, len(keys), MAX_BATCH):
                n = min(MAX_BATCH, len(keys) - start)
                self._lookup_apart(key_address + 8 * start, n, 0, assume=1)
                self._finish(self._own, n, row_address + stride * start, stride, self._ticks(n), self._stream)
            self._backend.synchronize(self._stream)

    def _lookup_apart(self, keys: int, n: int, out: int, *, assume: int) -> None:
        """The lookup of a cache without a host store; ``assume``: what is missing is listed as newcomers."""
        backend, stream = self._backend, self._stream
        self._own.reserve(n, True, stream)
        backend.copy(self._apart, self._state, 8 * STATE_WORDS, stream)
        backend.fill(self._apart + STATE_HOST, 0, 8, stream)
        backend.fill(self._own.address + WORKSPACE_ABSENT, 0, 8, stream)
        backend.store_word(self._own.address + WORKSPACE_ASSUME, assume, stream)
        kernel, group = self._lookup_kernel("int64", "float32", True, n < self.large_batch)
        args = (self._lines, self._rows, self.sets, self._apart, keys, n, out, np.float32(0), self._own.address)
        kernel.launch(backend.lookup_blocks(n, group), stream, *args, threads=LOOKUP_THREADS)

    def scatter(self, positions: np.ndarray, rows: np.ndarray, out: int, stream: int, out_type: str = "float32") -> None:
        """Write rows float32 ``[m, dim]`` to the places ``positions`` (int64 ``[m]``) of an answer, in stream order.

        For rows that came from elsewhere after a lookup. Returns when they are there.
        """
        self._check_open()
        spec = KernelSpec(name="scatter_kernel", dim=self.dim, policy=load_policy("fifo"), out_type=out_type, out_vector=False)
        with self._backend.current():
            kernel = self._kernels.get(spec)
            if kernel is None:
                kernel = self._kernels[spec] = self._backend.kernel(spec)
            with self._copies_on(stream, positions, np.ascontiguousarray(rows, np.float32)) as (backend, source):
                kernel.launch(self._backend.blocks(len(positions)), stream, backend, source, len(positions), out)
                self._backend.synchronize(stream)

    def update(self, keys: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Renew the rows of those keys that the cache has; scores stay. Done when this returns (spec 6.3, Update).

        Args:
            keys: int64 ``[n]``.
            rows: float32 ``[n, dim]``, the last of equal keys wins; None: as the store has them, and keys that it has no
                more are dropped.
        """
        keys = self.keys_of(keys)
        if rows is None:
            with self._controlled(), self._copies(keys) as (address,):
                self._update(address, len(keys), 0)
                self._note_store_changes()
            return
        rows = self._rows_of(keys, rows)
        last = len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]
        with self._controlled(), self._copies(keys[last], rows[last]) as (address, source):
            self._update(address, len(last), source)

    def _note_store_changes(self) -> None:
        """The store was changed: a key more, or a row evicted meanwhile, and not all rows are here."""
        if self._fully_resident and self._seen != self._see():
            self._set_fully_resident(False)

    def _see(self) -> tuple[int, int]:
        """Keys that came into the store so far, and rows that were evicted here."""
        return 0 if self._store is None else self._store.added, int(self._words(self._state + STATE_EVICTED, 1)[0])

    def check_fully_resident(self) -> int:
        """See whether all rows of the store are here, which makes lookups cheaper; returns how many are. Reads the index."""
        with self._controlled():
            seen = self._see()
            rows = -1 if self._store is None or self._store.max_rows is not None else len(self._store)
            lines = self._read_lines()
            resident = self._taken_in(lines)
            complete = resident == rows
            if complete and not self.fixed:
                complete = keys_twice(lines.__array_interface__["data"][0], self.sets) == 0
            self._seen = seen
            self._set_fully_resident(complete)
            return resident

    def mirror_index(self) -> bool:
        """With ``miss_path`` auto: copy the index of the host store to where the cache lives, unless the copy is there already.

        On a device that happens by itself, after a warming and when the store was not changed for a while
        (``cache.index_mirror``). Returns whether lookups read a copy now.
        """
        self._check_open()
        return self._index_mirror is not None and self._index_mirror.make()

    def _update(self, keys: int, n: int, source: int) -> None:
        args = (self._lines, self._rows, self.sets, self._state, keys, n, source, 4 * self.dim, 1)
        self._change("update_kernel", n, *args)

    def erase(self, keys: np.ndarray) -> int:
        """Drop those keys that the cache has; returns how many. Done when this returns."""
        keys = self.keys_of(keys)
        with self._controlled(), self._copies(keys) as (address,):
            self._set_fully_resident(False)
            self._backend.fill(self._state + STATE_COUNT, 0, 8, self._stream)
            self._change("erase_kernel", len(keys), self._lines, self.sets, self._state, address, len(keys))
            return int(self._words(self._state + STATE_COUNT, 1)[0])

    def refresh(self, first_set: int = 0, stop_set: int | None = None, drop: bool = True) -> None:
        """Renew all rows of a range of sets from the store; ``drop`` keys that it has no more (spec 6.7).

        Raises:
            ConfigError: the range is not one of this cache's.
        """
        first, stop = self._range(first_set, stop_set)
        with self._controlled():
            self._refresh(first, stop, drop)

    def _refresh(self, first: int, stop: int, drop: bool) -> None:
        self._change("refresh_kernel", stop - first, self._lines, self._rows, self._state, first, stop, int(drop))

    def _change(self, kernel: str, n: int, *args: int) -> None:
        """Run a kernel that reads the store, and wait for it."""
        if n:
            with self.reading():
                self._launch(kernel, n, self._stream, *args)
                self._backend.synchronize(self._stream)

    def dump(self, first_set: int = 0, stop_set: int | None = None) -> np.ndarray:
        """The keys in a range of sets, int64 ``[n]``, in no order (spec 6.3, Dump).

        Raises:
            ConfigError: the range is not one of this cache's.
        """
        first, stop = self._range(first_set, stop_set)
        with self._controlled(), self._room(8 * WAYS * (stop - first)) as room:
            self._backend.fill(self._state + STATE_COUNT, 0, 8, self._stream)
            self._change("dump_kernel", stop - first, self._lines, self._state, first, stop, room)
            return self._words(room, int(self._words(self._state + STATE_COUNT, 1)[0]))

    def clear(self) -> None:
        """Drop all rows. Done when this returns."""
        with self._controlled():
            self._set_fully_resident(False)
            changes = int(self._words(self._state + STATE_CHANGES, 1)[0])  # nobody else counts: all changes are controlled
            self._backend.store_word(self._state + STATE_CHANGES, changes + CLEARED, self._stream)
            self._change("clear_kernel", self.sets, self._lines, self.sets)

    # -- warming ------------------------------------------------------------------------------------------------------------

    def warm(self) -> int:
        """Fill the cache from its store, in the store's order until it is full; returns how many rows it then has.

        Before the first lookup, and always in fixed caches, all keys get their ways at once and the device fetches the rows
        itself; a lookup that comes meanwhile waits (the first one) or is answered from the store (fixed caches). A dynamic
        cache in use is emptied and its keys are looked up instead, which counts as lookups and misses: it then holds a row
        for each key that found room in its own set.

        Raises:
            CapacityError: the store has more rows than a static cache.
            ClosedError: the cache or the store was closed.
        """
        with self._controlled():
            if self._store is None:
                return 0
            keys = self._store.keys(in_order=True)
            if self.kind == "static" and len(keys) > self.capacity:
                raise CapacityError(f"{self.name}: {len(keys)} rows for a static cache of {self.capacity}, it has to hold all")
            self.clear()
            if self._used and not self.fixed:
                self._warm_by_lookup(keys)
            else:
                self._warm_at_once(keys[: self.capacity] if self._overflows else keys)
            resident = self.check_fully_resident()
            if self.device is not None and not self._fully_resident:
                self.mirror_index()
            return resident

    def _warm_at_once(self, keys: np.ndarray) -> None:
        """Place the keys in lines that no reader looks into, then let each be shown when its rows are there.

        A write to the store that comes meanwhile finds the key here as soon as the lines are, and renews its row once more.
        """
        lines = self._read_lines()
        self._place_keys(lines, keys)
        meta = lines.view(np.uint32).reshape(-1, LINE_BYTES // 4)[:, META_AT // 4]
        meta[(meta & OCCUPIED) != 0] |= BUSY
        try:
            self._backend.from_host(self._lines, lines, self._stream)
            self._refresh(0, self.sets, True)
            if self.policy.takes_key and not self.fixed:
                self._rescore()
        except BaseException:
            self.clear()
            raise
        if self._store is None or self._words(self._state + STATE_HOST, 1)[0] == 0:  # closed meanwhile: no rows came
            self.clear()

    def _place_keys(self, lines: np.ndarray, keys: np.ndarray) -> None:
        now = int(self._words(self._state + STATE_NOW, 1)[0])
        score = 0 if self.fixed or self.policy.takes_key else self.policy.first(now, 1) & 0xFFFFFFFF
        address, keys_at = (array.__array_interface__["data"][0] for array in (lines, keys))
        placed = place_keys(address, self.sets, keys_at, len(keys), score, self.fixed, self._overflows)
        if placed < len(keys) and self.kind == "static":
            raise CapacityError(f"{self.name}: {len(keys)} rows for {self.sets} sets, which took {placed}; wanted more sets")
        log.debug("%s: %d of %d keys placed", self.name, placed, len(keys))

    def _warm_by_lookup(self, keys: np.ndarray) -> None:
        step = max(WAYS, min(self.sets, _WARMING_BATCH))  # few newcomers a set in each batch
        keys = np.random.default_rng(0).permutation(keys)  # the store lists them by hash, and so by set
        for start in range(0, min(len(keys), self.capacity), step):
            some = keys[start : min(start + step, self.capacity)]
            with self._copies(some) as (address,):
                self.lookup(address, len(some), 0, self._stream)
                self._backend.synchronize(self._stream)

    # -- what there is --------------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> Backend:
        """Where the cache lives: its memory, streams and events."""
        return self._backend

    @property
    def device(self) -> int | None:
        """CUDA ordinal, None for the CPU."""
        return self._backend.ordinal

    @property
    def bytes(self) -> int:
        """Bytes of memory: index, rows, state, the buffers of batches so far, and the copy of the store's index."""
        policy = (4 * self.capacity if self._pending else 0) + self._policy_memory.bytes
        buffers = self._pool.bytes + self._own.bytes + sum(workspace.bytes for workspace in self._captured)
        buffers += 0 if self._misses is None else self._misses.bytes
        buffers += 0 if self._index_mirror is None else self._index_mirror.bytes
        return self.sets * SET_BYTES + self.bytes_of_rows + 2 * STATE_BYTES + policy + buffers

    @property
    def index_mirror_bytes(self) -> int:
        """Bytes of the copy of the host store's index that lookups read now; 0: they read that in host memory."""
        return 0 if self._index_mirror is None or not self._index_mirror.is_used else self._index_mirror.bytes

    def resident(self) -> int:
        """Rows that the cache holds; reads its whole index."""
        with self._controlled():
            return self._taken_in(self._read_lines())

    def entries(self) -> list[CacheEntry]:
        """All that the cache holds, in the order of sets, lines and ways; for tests."""
        with self._controlled():
            lines = self._read_lines().reshape(self.sets, LINES_PER_SET, LINE_BYTES)
        keys = lines[:, :, :SCORES_AT].copy().view(np.int64)
        scores = lines[:, :, SCORES_AT:META_AT].copy().view(np.uint32)
        taken = (self._metas(lines).reshape(self.sets, LINES_PER_SET, 1) >> np.arange(WAYS_PER_LINE)) & 1
        places = [tuple(map(int, place)) for place in np.argwhere(taken)]
        return [CacheEntry(int(keys[at]), int(scores[at]), *at) for at in places]

    def counters(self) -> CacheCounters:
        """What happened so far; reads the device."""
        with self._controlled():
            words = self._words(self._state, STATE_WORDS)
            stripes = self._words(self._state + STRIPES_AT, STRIPES * STRIPE_BYTES // 8).reshape(STRIPES, -1).sum(0)
        named = (STATE_KEYS, STATE_CALLS, STATE_INSERTED, STATE_EVICTED, STATE_STALE_DROPPED, STATE_REFUSED)
        asked, calls, *rest = (int(words[at // 8]) for at in named)
        staged = 0 if self._misses is None else self._misses.batches
        return CacheCounters(*(asked, calls, int(stripes[0]), int(stripes[1]), *rest, staged))

    # -- small things ---------------------------------------------------------------------------------------------------------

    def _read_lines(self) -> np.ndarray:
        lines = np.empty(self.sets * SET_BYTES, np.uint8)
        self._backend.to_host(lines, self._lines, self._stream)
        return lines

    @staticmethod
    def _metas(lines: np.ndarray) -> np.ndarray:
        return lines.reshape(-1, LINE_BYTES)[:, META_AT:].copy().view(np.uint32)[:, 0]

    def _taken_in(self, lines: np.ndarray) -> int:
        """Ways of these lines that have a row."""
        return int(np.bitwise_count(self._metas(lines) & OCCUPIED).sum())

    def _range(self, first: int, stop: int | None) -> tuple[int, int]:
        stop = self.sets if stop is None else stop
        if not 0 <= first <= stop <= self.sets:
            raise ConfigError(f"{self.name}: sets {first} to {stop}, wanted a range within 0 to {self.sets}")
        return first, stop

    def _check_dynamic(self, what: str) -> None:
        if self.fixed:
            raise ConfigError(f"{self.name}: {what} into a {self.kind} cache, wanted a dynamic one")

    def _rows_of(self, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if rows.dtype != np.float32 or rows.shape != (len(keys), self.dim):
            raise ArrayError(f"{self.name}: rows are {rows.dtype}{list(rows.shape)}, wanted float32[{len(keys)}, {self.dim}]")
        return np.ascontiguousarray(rows)
