"""Tiers that wrap another tier, for tests and experiments: one counts calls, one is slow, one fails."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import numpy as np

from hps_numba.errors import TierError
from hps_numba.storage.tiers._tier import Fetched, Tier

__all__ = ["CountingTier", "FlakyTier", "SlowTier", "WrapperTier"]


class WrapperTier(Tier):
    """Passes every call on to ``inner``, after ``before(call, keys)``."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner.section, wide_keys=inner.wide_keys)
        self.inner = inner

    @property
    def parallel_fetches(self) -> int:  # type: ignore[override]
        return self.inner.parallel_fetches

    def before(self, call: str, keys: int) -> None:
        """Called ahead of each call with its name and its number of keys."""

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        self.before("fetch", len(keys))
        return self.inner.fetch(table, keys, rows, deadline=deadline)

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        self.before("insert", len(keys))
        return self.inner.insert(table, keys, rows)

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        self.before("erase", 0 if keys is None else len(keys))
        return self.inner.erase(table, keys)

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        self.before("contains", len(keys))
        return self.inner.contains(table, keys)

    def size(self, table: str) -> int:
        return self.inner.size(table)

    def capacity(self, table: str) -> int:
        return self.inner.capacity(table)

    def tables(self) -> list[str]:
        return self.inner.tables()

    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.before("scan", 0)
        return self.inner.scan(table, chunk_rows)

    def close(self) -> None:
        self.inner.close()


class CountingTier(WrapperTier):
    """Counts calls and keys by the name of the call."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()

    def before(self, call: str, keys: int) -> None:
        self.calls[call] += 1
        self.keys[call] += keys


class SlowTier(WrapperTier):
    """Waits ``seconds`` ahead of each call, and ahead of each further batch of a fetch."""

    def __init__(self, inner: Tier, seconds: float) -> None:
        super().__init__(inner)
        self.seconds = seconds

    def before(self, call: str, keys: int) -> None:
        time.sleep(self.seconds)

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        found = np.zeros(len(keys), bool)
        asked = 0
        for part in self.batches(len(keys), deadline):
            self.before("fetch", part.stop - part.start)
            found[part] = self.inner.fetch(table, keys[part], rows[part]).found
            asked = part.stop
        return Fetched(found, asked)


class FlakyTier(WrapperTier):
    """Raises TierError for the calls named in ``fail_on``, until the set is emptied."""

    def __init__(self, inner: Tier, fail_on: set[str]) -> None:
        super().__init__(inner)
        self.fail_on = fail_on

    def before(self, call: str, keys: int) -> None:
        if call in self.fail_on:
            raise TierError(f"{call}: failed on purpose")
