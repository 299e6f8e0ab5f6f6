"""What a server did: counters that any thread adds to without a lock, and their readings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hps_numba.kernels.host_epoch import count
from hps_numba.layout import (
    COUNTER_ABSENT,
    COUNTER_BYTES,
    COUNTER_CALLS,
    COUNTER_KEYS,
    COUNTER_MISSES,
    COUNTER_TIER_ERRORS,
    COUNTER_TIER_HITS,
    COUNTER_UNANSWERED,
)

__all__ = ["Counters", "TableStats"]


@dataclass(frozen=True, kw_only=True)
class TableStats:
    """One table since the server started. Keys are counted as asked for, duplicates included.

    Attributes:
        rows: rows in host memory.
        bytes: bytes of host memory in use, index included.
        calls: lookups.
        keys: keys asked for.
        host_hits: keys answered from host memory.
        tier_hits: keys answered from slower tiers.
        absent: keys that no tier has, answered with the default value.
        unanswered: keys answered with the default value because a slower tier was late or failed: they may exist.
        tier_errors: failed calls of slower tiers.
        evicted: rows that the bound of the host store pushed out.
        version: number of the model's content, 1 at first and one more with each replacement.
    """

    model: str
    table: str
    rows: int
    bytes: int
    calls: int
    keys: int
    host_hits: int
    tier_hits: int
    absent: int
    unanswered: int
    tier_errors: int
    evicted: int
    version: int

    @property
    def defaults(self) -> int:
        """Keys answered with the default value."""
        return self.absent + self.unanswered

    @property
    def hit_rate(self) -> float:
        """Share of keys answered from host memory; 1.0 before the first key."""
        return self.host_hits / self.keys if self.keys else 1.0


class Counters:
    """The ``layout.COUNTER_*`` words of one table.   **Threads:** ``add`` from any thread, wait-free."""

    def __init__(self) -> None:
        self._words = np.zeros(COUNTER_BYTES // 8, np.int64)
        self.address: int = self._words.__array_interface__["data"][0]

    def add(self, counter: int, amount: int) -> None:
        """Add ``amount`` to one counter."""
        if amount:
            count(self.address + counter, amount)

    def _get(self, counter: int) -> int:
        return int(self._words[counter // 8])

    def read(self, *, model: str, table: str, rows: int, size: int, evicted: int, version: int) -> TableStats:
        """The present counts, with what the caller knows of the table."""
        keys, misses = self._get(COUNTER_KEYS), self._get(COUNTER_MISSES)
        return TableStats(
            model=model,
            table=table,
            rows=rows,
            bytes=size,
            calls=self._get(COUNTER_CALLS),
            keys=keys,
            host_hits=keys - misses,
            tier_hits=self._get(COUNTER_TIER_HITS),
            absent=self._get(COUNTER_ABSENT),
            unanswered=self._get(COUNTER_UNANSWERED),
            tier_errors=self._get(COUNTER_TIER_ERRORS),
            evicted=evicted,
            version=version,
        )
