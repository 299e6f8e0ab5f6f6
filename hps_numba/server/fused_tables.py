"""Which tables of a model are looked up together on a device: those of one width and kind, as many as a launch takes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.group import CacheGroup
from hps_numba.errors import ClosedError
from hps_numba.kernels.layouts.cache import MAX_TABLES
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.server.table import ServedTable

__all__ = ["FusedLookup", "FusedTables"]

log = logging.getLogger(__name__)
_MAX = 32  # selections of tables of a model that get buffers of their own


class FusedLookup:
    """Some tables of a model on one device, in a fixed order, a table perhaps more than once.   **Threads:** ``lookup``."""

    def __init__(self, parts: Sequence[tuple[EmbeddingCache | CacheGroup, tuple[int, ...]]]) -> None:
        self._parts = tuple(parts)
        self._whole = parts[0][0] if len(parts) == 1 and isinstance(parts[0][0], CacheGroup) else None

    @property
    def launches(self) -> int:
        """Kernels that look up; those that insert are as many."""
        return len(self._parts)

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
        """``CacheGroup.lookup``: addresses of keys, their numbers, and addresses of answers, in the order of the tables."""
        if self._whole is not None:
            self._whole.lookup(keys, counts, outs, stream, key_form=key_form, out_type=out_type)
            return
        for part, positions in self._parts:
            if isinstance(part, CacheGroup):
                mine, n, to = ([given[i] for i in positions] for given in (keys, counts, outs))
                part.lookup(mine, n, to, stream, key_form=key_form, out_type=out_type)
            else:
                (i,) = positions
                part.lookup(keys[i], counts[i], outs[i], stream, key_form=key_form, out_type=out_type)

    def retire(self) -> None:
        """Take no more lookups; graphs that captured one go on."""
        for part, _ in self._parts:
            if isinstance(part, CacheGroup):
                part.retire()

    def close(self) -> None:
        """Give the buffers back; the caches stay."""
        for part, _ in self._parts:
            if isinstance(part, CacheGroup):
                part.close()


class FusedTables:
    """The selections of tables that were asked for, of one model.   **Threads:** all methods.

    Args:
        buffers: as for ``CacheGroup``.
    """

    def __init__(self, buffers: int) -> None:
        self._buffers = buffers
        self._made: dict[tuple[int, tuple[ServedTable, ...]], FusedLookup] = {}
        self._retired: list[FusedLookup] = []
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock, in a forked child."""
        self._lock = threading.Lock()

    def on(self, device: int, tables: Sequence[ServedTable]) -> FusedLookup | None:
        """How these tables are looked up on a device; None if one has no cache there, or slower tiers to wait for.

        Raises:
            ClosedError: the model was unloaded.
        """
        key = device, tuple(tables)
        made = self._made.get(key)
        if made is None:
            caches = [table.cache_on(device) for table in tables]
            present = [cache for cache, table in zip(caches, tables) if cache is not None and table.pools_on(cache, 0)]
            if not tables or len(present) < len(tables):
                return None
            with self._lock:
                if self._closed:
                    raise ClosedError("the tables are closed")
                made = self._made.get(key)
                if made is None:
                    if len(self._made) == _MAX:
                        log.warning("more than %d selections of tables: the others are looked up table by table", _MAX)
                    alone = len(self._made) >= _MAX
                    made = self._made[key] = FusedLookup(self._parts(present, alone))
        return made

    def _parts(
        self, caches: Sequence[EmbeddingCache], alone: bool
    ) -> list[tuple[EmbeddingCache | CacheGroup, tuple[int, ...]]]:
        """Launches, each with its tables: of one kin, each table once, as many as there may be."""
        if alone:
            return [(cache, (i,)) for i, cache in enumerate(caches)]
        open_: list[dict[EmbeddingCache, int]] = []
        for i, cache in enumerate(caches):
            for launch in open_:
                if len(launch) < MAX_TABLES and cache not in launch and next(iter(launch)).fusion_key == cache.fusion_key:
                    launch[cache] = i
                    break
            else:
                open_.append({cache: i})
        parts: list[tuple[EmbeddingCache | CacheGroup, tuple[int, ...]]] = []
        with ExitStack() as undo:
            for launch in open_:
                if len(launch) == 1:
                    parts.append(next(iter((cache, (i,)) for cache, i in launch.items())))
                    continue
                group = CacheGroup(list(launch), buffers=self._buffers)
                undo.callback(group.close)
                parts.append((group, tuple(launch.values())))
            undo.pop_all()
        return parts

    @contextmanager
    def without(self, table: ServedTable) -> Iterator[None]:
        """A block in which no table is looked up together with this one, as its caches change their kind.

        Who has a ``FusedLookup`` of it meets ClosedError, and asks again, which waits for the end of the block.
        """
        with self._lock:
            for key in [key for key in self._made if table in key[1]]:
                together = self._made.pop(key)
                self._retired.append(together)
                together.retire()
            yield

    def close(self) -> None:
        """Give all buffers back after the lookups at work; no graph that captured one may run any more."""
        with self._lock:
            self._closed = True
            made = [*self._made.values(), *self._retired]
            self._made.clear()
            self._retired.clear()
        for together in made:
            together.close()
