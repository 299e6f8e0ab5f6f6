"""The index of a table: key -> location of its row, in memory.

It is a host store whose rows are locations, 8 bytes each. So lookups take no lock beside a writer, the overflow policies know
what was used when, and an interrupted write is repaired: all that exists and is tested. It takes 8 bytes a key more than a
table of keys and locations could, and 8 more where the policy keeps the use of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hps_numba.kernels.host.row_log import row_log_move
from hps_numba.kernels.layouts.row_log import UNIT_BITS
from hps_numba.storage.distinct import are_among
from hps_numba.storage.host.bound import RowBound
from hps_numba.storage.host.store import HostStore

__all__ = ["RowIndex"]

_NEVER = 2**62  # as a bound: the policy keeps the use of rows, and only ``evict`` evicts


class RowIndex:
    """Key -> location.

    Args:
        policy: which keys ``evict`` chooses.   bounded: there will be evictions.

    Thread safety: every method; ``put``, ``erase``, ``move`` and ``evict`` wait for each other.
    """

    def __init__(self, name: str, *, policy: str, bounded: bool) -> None:
        max_rows = _NEVER if bounded else None
        self._policy = policy
        self._seed = 0
        self._store = HostStore(2, name=name, growth_bytes=1 << 20, max_rows=max_rows, policy=policy)

    def __len__(self) -> int:
        return len(self._store)

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return self._store.bytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Locations, int64 ``[n]``, of int64 keys; 0 where there is none."""
        locations = np.empty(len(keys), np.int64)
        self._store.lookup(keys, _as_rows(locations), 0.0)
        return locations

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which keys have a location."""
        return self._store.contains(keys)

    def put(self, keys: np.ndarray, locations: np.ndarray) -> int:
        """Set the locations of keys; the last of equal keys wins. Returns how many were new."""
        return self._store.upsert(keys, _as_rows(locations))

    def erase(self, keys: np.ndarray) -> int:
        """Remove keys; returns how many there were."""
        return self._store.erase(keys)

    def move(self, keys: np.ndarray, old: np.ndarray, new: np.ndarray) -> int:
        """Replace the locations of those keys that still have the ``old`` ones; the use of rows stays as it was."""
        with self._store.write_lock.writing() as content:
            moved: int = row_log_move(content.block, keys, old, new)
        return moved

    def evict(self, most: int, target: float) -> np.ndarray:
        """Remove keys by the policy if there are more than ``most``, so that ``round(most * target)`` stay; returns them."""
        if len(self) <= most:
            return np.empty(0, np.int64)
        before = self._store.keys()
        bound = RowBound(most, self._policy, target, self._seed)
        with self._store.write_lock.writing() as content:
            bound.trim(content, self._store.epochs)
        self._seed = bound.seed
        return before[~self._store.contains(before)]

    def keys(self) -> np.ndarray:
        """All keys, int64 ``[n]``."""
        return self._store.keys()

    def scan(self, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (keys, locations) in chunks, each key once."""
        for keys, rows in self._store.scan(chunk):
            yield keys, np.ascontiguousarray(rows).view(np.int64)[:, 0]

    def outside(self, segments: set[int]) -> np.ndarray:
        """Keys whose location is in none of these segments."""
        known = np.array(sorted(segments), np.int64)
        found = [keys[~are_among(locations >> UNIT_BITS, known)] for keys, locations in self.scan(1 << 18)]
        return np.concatenate([np.empty(0, np.int64), *found])

    def close(self) -> None:
        """Release the memory once active lookups have ended."""
        self._store.close()


def _as_rows(locations: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(locations).view(np.float32).reshape(-1, 2)
