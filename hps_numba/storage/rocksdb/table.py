"""One table of a database: a column family with raw keys and raw rows, its width and its number of rows."""

from __future__ import annotations

from collections import deque
from itertools import compress, repeat
from operator import is_not
from typing import TYPE_CHECKING, Any

import numpy as np

from hps_numba.errors import TierError
from hps_numba.storage.distinct import distinct_keys
from hps_numba.storage.rocksdb.database import Database
from hps_numba.storage.rocksdb.keys import KEY_BYTES, keys_of, raw_keys, raw_rows, rows_of, sorted_by_bytes, uneven
from hps_numba.storage.rocksdb.library import next_pairs
from hps_numba.storage.rocksdb.readers import Readers

if TYPE_CHECKING:
    from hps_numba.storage.sst_dump import SstDump

__all__ = ["Table"]

_COUNT_STEP = 1 << 16


class Table:
    """A column family. What RocksDB raises passes through.

    Attributes:
        dim: floats in a row, that of any stored row; None if there is no row.
        count: number of rows; None until it is known.

    Thread safety: reads from any thread; writes one at a time.
    """

    def __init__(self, database: Database, name: str, column: Any, readers: Readers, *, wide_keys: bool, new: bool) -> None:
        """Look at a stored row.

        Raises:
            TierError: keys of another width, or rows that are no float32.
        """
        self.name = name
        self._database = database
        self._column = column
        self._readers = readers
        self._key_bytes = KEY_BYTES[wide_keys]
        self.count: int | None = 0 if new else None
        self.dim = None if new else self._stored_dim()

    def _stored_dim(self) -> int | None:
        pairs = next_pairs(self._column, None, 1, self._database.in_use)
        if not pairs:
            return None
        key, row = pairs[0]
        self._check_lengths([key], self._key_bytes, "keys", " (supportlonglong)")
        if not row or len(row) % 4:
            raise TierError(f"{self.name}: expected rows of float32, got one of {len(row)} bytes")
        return len(row) // 4

    def _check_lengths(self, raw: list[bytes], expected: int, what: str, why: str = "") -> None:
        got = uneven(raw, expected)
        if got is not None:
            raise TierError(f"{self.name}: expected {what} of {expected} bytes{why}, got {got}")

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
        """Positions of the keys (int64 ``[n]``) that have a row, in the order of their bytes, and their raw rows."""
        positions = self._storable(keys)
        order = positions[sorted_by_bytes(keys[positions], self._key_bytes)]
        got = self._readers.read(self._column.get, raw_keys(keys[order], self._key_bytes))
        found = np.fromiter(map(is_not, got, repeat(None)), bool, len(got))
        return order[found], got if found.all() else list(compress(got, found.tolist()))

    def _storable(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the keys that fit the width of a key; no row has another key."""
        if self._key_bytes == 8:
            return np.arange(len(keys))
        return np.flatnonzero((keys >= 0) & (keys < 1 << 32))

    def fetch(self, keys: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        """Copy rows of the keys (int64 ``[n]``) that exist. **Writes:** rows (float32 ``[n, dim]``), found (bool ``[n]``)."""
        positions, raw = self.find(keys)
        if raw:
            dim = rows.shape[1]
            self._check_lengths(raw, 4 * dim, "rows")
            rows[positions] = rows_of(raw, dim)
            found[positions] = True

    def next_rows(self, after: bytes | None, most: int) -> tuple[bytes, np.ndarray, np.ndarray] | None:
        """The last key, to go on from, and the next (keys, rows) in the order of the keys' bytes, at most ``most``."""
        pairs = next_pairs(self._column, after, most, self._database.in_use)
        if not pairs:
            return None
        keys, rows = [key for key, _ in pairs], [row for _, row in pairs]
        self._check_lengths(keys, self._key_bytes, "keys", " (supportlonglong)")
        dim = len(rows[0]) // 4 if self.dim is None else self.dim
        self._check_lengths(rows, 4 * dim, "rows")
        return keys[-1], keys_of(keys, self._key_bytes), rows_of(rows, dim)

    def next_keys(self, after: bytes | None) -> list[bytes]:
        """The next 65,536 keys."""
        return next_pairs(self._column, after, _COUNT_STEP, self._database.in_use, values=False)

    # -- writing ------------------------------------------------------------------------------------------------------

    def check_storable(self, keys: np.ndarray) -> None:
        """Raise TierError if a key does not fit the width of a key."""
        if len(self._storable(keys)) < len(keys):
            wrong = keys[(keys < 0) | (keys >= 1 << 32)][0]
            raise TierError(f"{self.name}: expected keys in 0..{(1 << 32) - 1}, which fit 4 bytes, got {wrong}")

    def put(self, keys: np.ndarray, rows: np.ndarray, *, into_empty: bool) -> int:
        """Write rows, the last of equal keys; returns how many keys were new. Not synced."""
        present = keys[:0] if into_empty else keys[self.find(keys)[0]]
        batch = self._database.batch(self.name)
        deque(map(batch.put, raw_keys(keys, self._key_bytes), raw_rows(rows)), maxlen=0)
        self._database.write(batch)
        self.dim = rows.shape[1]
        return len(distinct_keys(keys)) - len(distinct_keys(present))

    def remove(self, keys: np.ndarray) -> int:
        """Delete keys; returns how many there were. Not synced."""
        present = distinct_keys(keys[self.find(keys)[0]])
        if len(present):
            batch = self._database.batch(self.name)
            deque(map(batch.delete, raw_keys(present, self._key_bytes)), maxlen=0)
            self._database.write(batch)
        return len(present)

    def ingest(self, dump: SstDump) -> None:
        """Add the rows of a file, in place of those of the same keys. They are copied, and permanent."""
        self.count = None
        self._column.ingest_external_file([str(dump.path)])
        self.dim = dump.dim
