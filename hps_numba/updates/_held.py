"""Updates of one table that a slower tier could not take: the last one of each key, until the tier takes it.

A host store keeps them, as it has every operation that they need compiled: its rows are wider by what an update has beside its
row. Turned down: a list of what failed, in order, because it grows while the same keys are written again and again, and a newer
update of a key, which the tier may have taken meanwhile, would be overwritten by an older one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from hps_numba.server.model_versions import ModelVersion
from hps_numba.storage.host.store import HostStore
from hps_numba.updates._batches import TableBatch
from hps_numba.updates._update import NO_TIME

__all__ = ["HeldUpdates"]

_MORE = 3  # elements of a row beside its own: the time of the event in two, and whether it is a deletion
_GROWTH_BYTES = 1 << 20
_KEY_BYTES = 8


class HeldUpdates:
    """See above.

    Args:
        tag, dim: of the table.   version: of the model, in force when they were accepted.

    Attributes:
        due: ``time.monotonic()`` when they are tried again.   failures: attempts in a row in which nothing was written.
        messages: about how many messages they came in.

    Thread safety: one thread; ``len`` and ``bytes`` by any.
    """

    def __init__(self, tag: str, dim: int, version: ModelVersion) -> None:
        self.dim, self.version = dim, version
        self.due, self.failures, self.messages = time.monotonic(), 0, 0
        row_bytes = 4 * (dim + _MORE)
        self._bytes_each = _KEY_BYTES + row_bytes
        self._store = HostStore(dim + _MORE, name=f"{tag}: held updates", growth_bytes=max(row_bytes, _GROWTH_BYTES))
        self._round = np.empty(0, np.int64)  # keys that are tried next

    def __len__(self) -> int:
        return len(self._store)

    @property
    def bytes(self) -> int:
        """Of keys and rows."""
        return len(self) * self._bytes_each

    def note(self, batch: TableBatch, unwritten: np.ndarray) -> None:
        """What became of a batch: those that are ``unwritten``, bool ``[n + m]``, are held; nothing older of the others is.

        Raises:
            CapacityError: no memory; some of them are not held.
        """
        keys = np.concatenate([batch.keys, batch.erased])
        if len(self):
            self._store.erase(keys[~unwritten])
        if not unwritten.any():
            return
        held = np.zeros((len(keys), self.dim + _MORE), np.float32)
        held[: len(batch.keys), : self.dim] = batch.rows
        held[:, self.dim : -1] = batch.times.reshape(-1, 1).view(np.float32)
        held[len(batch.keys) :, -1] = 1
        self._store.upsert(keys[unwritten], held[unwritten])

    def forget(self, which: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Drop those for whose times, int64 ``[n]``, ``which`` says True; returns their times."""
        dropped = [np.empty(0, np.int64)]
        for keys, rows in self._store.scan():
            times = _times_in(rows)
            chosen = which(times)
            self._store.erase(keys[chosen])
            dropped.append(times[chosen])
        return np.concatenate(dropped)

    def some(self, most: int) -> TableBatch:
        """At most so many of them, others than the last time unless all had their turn."""
        if not len(self._round):
            self._round = self._store.keys()
        keys, self._round = self._round[:most], self._round[most:]
        held = np.empty((len(keys), self.dim + _MORE), np.float32)
        misses = np.empty(len(keys), np.int64)
        missing = self._store.lookup(keys, held, 0.0, misses)  # those that were written meanwhile
        if missing:
            keys, held = np.delete(keys, misses[:missing]), np.delete(held, misses[:missing], 0)
        times = _times_in(held)
        erased = held[:, -1] == 1
        known = times[times != NO_TIME]
        return TableBatch(
            keys[~erased],
            np.ascontiguousarray(held[~erased, : self.dim]),
            keys[erased],
            np.concatenate([times[~erased], times[erased]]),
            writes=len(keys),
            deletions=int(erased.sum()),
            oldest_ms=int(known.min()) if len(known) else NO_TIME,
            newest_ms=int(known.max()) if len(known) else NO_TIME,
        )


def _times_in(held: np.ndarray) -> np.ndarray:
    """int64 ``[n]``: the times in rows of the store."""
    return np.ascontiguousarray(held[:, -_MORE:-1]).view(np.int64)[:, 0]
