"""Which tables of a model are looked up together on a device: those of one width and type, as many as a launch takes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.group import CacheGroup
from hps_numba.cache.version_switch import VersionSwitch
from hps_numba.errors import ClosedError
from hps_numba.kernels.layouts.cache import MAX_TABLES
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.server.table import ServedTable

__all__ = ["FusedLookup", "FusedTables"]

log = logging.getLogger(__name__)
MAX_SELECTIONS = 32  # of tables of a model that get workspaces of their own
Launch = tuple[EmbeddingCache | CacheGroup, tuple[int, ...]]
"""What one launch looks up, and the positions of its tables in the selection."""


class FusedLookup:
    """Some tables of a model on one device, in a fixed order, a table perhaps more than once.

    Args:
        launches: that look up all of them.   switch: of the versions of their model.

    Thread safety: every method.
    """

    def __init__(self, launches: Sequence[Launch], switch: VersionSwitch) -> None:
        self._launches, self._switch = tuple(launches), switch
        only = launches[0][0] if len(launches) == 1 else None
        self._single_group = only if isinstance(only, CacheGroup) else None

    @property
    def launches(self) -> int:
        """How many kernels look up; as many insert."""
        return len(self._launches)

    def lookup(
        self,
        keys: Sequence[int],
        counts: Sequence[int],
        outs: Sequence[int],
        stream: int,
        *,
        key_form: str = "int64",
        out_type: str = "float32",
    ) -> None:
        """Look up every table, in the order of a stream.

        Args:
            keys: address of the keys of each table.   counts: how many.   outs: address of the rows of each table.
            key_form, out_type: as for ``EmbeddingCache.lookup``, of all tables.

        Raises:
            ClosedError: the tables were closed, or a policy was switched; then ``FusedTables.on`` has another ``FusedLookup``.
        """
        if self._single_group is not None:
            self._single_group.lookup(keys, counts, outs, stream, key_form=key_form, out_type=out_type)
            return
        look_up = partial(self._lookup_all, keys, counts, outs, stream, key_form=key_form, out_type=out_type)
        self._switch.read_one_version(look_up)

    def lookup_stacked(
        self,
        keys: int,
        key_step: int,
        n: int,
        out: int,
        out_step: int,
        stream: int,
        *,
        key_form: str = "int64",
        out_type: str = "float32",
    ) -> None:
        """``lookup`` of ``n`` keys of every table, which are evenly spaced, as are the answers.

        Args:
            keys, out: addresses for the first table.   key_step, out_step: bytes from one table to the next.
        """
        if self._single_group is not None:
            self._single_group.lookup_stacked(keys, key_step, n, out, out_step, stream, key_form=key_form, out_type=out_type)
            return
        tables = sum(len(positions) for _, positions in self._launches)
        every_keys, outs = ([first + step * i for i in range(tables)] for first, step in ((keys, key_step), (out, out_step)))
        self.lookup(every_keys, [n] * tables, outs, stream, key_form=key_form, out_type=out_type)

    def _lookup_all(
        self,
        keys: Sequence[int],
        counts: Sequence[int],
        outs: Sequence[int],
        stream: int,
        *,
        key_form: str,
        out_type: str,
    ) -> None:
        for target, positions in self._launches:
            if isinstance(target, CacheGroup):
                some_keys, some_counts, some_outs = ([given[i] for i in positions] for given in (keys, counts, outs))
                target.lookup(some_keys, some_counts, some_outs, stream, key_form=key_form, out_type=out_type)
            else:
                (i,) = positions
                target.lookup(keys[i], counts[i], outs[i], stream, key_form=key_form, out_type=out_type)

    def _groups(self) -> list[CacheGroup]:
        return [target for target, _ in self._launches if isinstance(target, CacheGroup)]

    def bytes_for(self, cache: EmbeddingCache) -> tuple[int, int]:
        """``CacheGroup.bytes_for`` of a cache, 0 if it is not among those that are looked up together."""
        sizes = [group.bytes_for(cache) for group in self._groups() if cache in group.caches]
        return sum(of_lookups for of_lookups, _ in sizes), sum(of_graphs for _, of_graphs in sizes)

    def drain(self) -> None:
        """Wait for all lookups that have begun, and for their work on the device; no other lookup waits meanwhile."""
        for group in self._groups():
            group.drain()

    def retire(self) -> None:
        """Refuse further lookups; graphs that captured one go on."""
        for group in self._groups():
            group.retire()

    def close(self) -> None:
        """Free the workspaces; the caches stay."""
        for group in self._groups():
            group.close()


class FusedTables:
    """The selections of tables that were asked for, of one model.

    Args:
        buffers: as for ``CacheGroup``.   switch: of the versions of the model.

    Thread safety: every method.
    """

    def __init__(self, buffers: int, switch: VersionSwitch) -> None:
        self._buffers, self._switch = buffers, switch
        self._fused: dict[tuple[int, tuple[ServedTable, ...]], FusedLookup] = {}
        self._retired: list[FusedLookup] = []
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock, in a forked child."""
        self._lock = threading.RLock()  # a signal handler or a finalizer may come here too
        self._changing = False

    def on(self, device: int, tables: Sequence[ServedTable]) -> FusedLookup | None:
        """How these tables are looked up on a device; None if one by one.

        That is if one has no cache there, or slower tiers to wait for, or if this thread is inside ``without``.

        Raises:
            ClosedError: the model was unloaded.
        """
        key = device, tuple(tables)
        fused = self._fused.get(key)
        if fused is None:
            caches = [table.cache_on(device) for table in tables]
            present = [cache for cache, table in zip(caches, tables) if cache is not None and table.pools_on(cache, 0)]
            if not tables or len(present) < len(tables):
                return None
            with self._lock:
                if self._closed:
                    raise ClosedError("the tables are closed")
                if self._changing:  # inside ``without``
                    return None
                fused = self._fused.get(key)
                if fused is None:
                    made = FusedLookup(self._launches(present), self._switch)
                    fused = self._fused.setdefault(key, made)
                    if fused is not made:  # a signal handler asked for the same
                        made.close()
        return fused

    def _launches(self, caches: Sequence[EmbeddingCache]) -> list[Launch]:
        """One launch for the tables of each fusion key, if not too many have workspaces of their own already."""
        if len(self._fused) >= MAX_SELECTIONS:
            if len(self._fused) == MAX_SELECTIONS:
                log.warning("more than %d selections of tables: the others are looked up table by table", MAX_SELECTIONS)
            return [(cache, (i,)) for i, cache in enumerate(caches)]
        launches: list[Launch] = []
        with ExitStack() as undo:
            for bundle in _bundles(caches):
                positions = tuple(bundle.values())
                if len(bundle) == 1:
                    launches.append((next(iter(bundle)), positions))
                    continue
                group = CacheGroup(list(bundle), buffers=self._buffers)
                undo.callback(group.close)
                launches.append((group, positions))
            undo.pop_all()
        return launches

    @contextmanager
    def without(self, table: ServedTable) -> Iterator[None]:
        """A block in which no table is looked up together with this one, whose caches change their fusion key.

        Whoever holds a ``FusedLookup`` of it gets ClosedError and asks again, which waits for the end of the block.
        """
        with self._lock:
            for key in [key for key in self._fused if table in key[1]]:
                fused = self._fused.pop(key)
                self._retired.append(fused)
                fused.retire()
            before, self._changing = self._changing, True
            try:
                yield
            finally:
                self._changing = before

    def bytes_for(self, cache: EmbeddingCache) -> tuple[int, int]:
        """Bytes that lookups of several tables take for one cache, and those that graphs keep of such lookups."""
        sizes = [fused.bytes_for(cache) for fused in self._every()]
        return sum(of_lookups for of_lookups, _ in sizes), sum(of_graphs for _, of_graphs in sizes)

    def _every(self) -> list[FusedLookup]:
        with self._lock:
            return [*self._fused.values(), *self._retired]

    def drain(self) -> None:
        """Wait for all lookups of several tables that have begun, and for their work; no other lookup waits meanwhile."""
        for fused in self._every():
            fused.drain()

    def close(self) -> None:
        """Free all workspaces, after the lookups in progress; no graph that captured one may run any more."""
        with self._lock:
            self._closed = True
            every = self._every()
            self._fused.clear()
            self._retired.clear()
        for fused in every:
            fused.close()


def _bundles(caches: Sequence[EmbeddingCache]) -> list[dict[EmbeddingCache, int]]:
    """Caches of one fusion key, each once and as many as a launch takes, with their positions."""
    bundles: list[dict[EmbeddingCache, int]] = []
    for position, cache in enumerate(caches):
        for bundle in bundles:
            if len(bundle) < MAX_TABLES and cache not in bundle and next(iter(bundle)).fusion_key == cache.fusion_key:
                bundle[cache] = position
                break
        else:
            bundles.append({cache: position})
    return bundles
