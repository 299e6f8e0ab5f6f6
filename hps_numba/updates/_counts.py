"""What a consumer counts: of the source and of each table."""

from __future__ import annotations

import time
from collections import Counter, deque

import numpy as np

from hps_numba.server.update_stats import TableUpdates
from hps_numba.updates._batches import TableBatch
from hps_numba.updates._update import NO_TIME, Position, now_ms

__all__ = ["TableCounts"]

_WINDOW = 10.0  # seconds over which a rate is taken


class TableCounts:
    """Counts of one table from one source.

    Thread safety: one thread counts, others read; what they see may be a moment old.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._messages = self._rows = self._erased = 0
        self._event_ms = self._fresh_ms = NO_TIME
        self._version: int | None = None
        self._recent: deque[tuple[float, int]] = deque()
        self._began = time.monotonic()
        self.positions: dict[int | str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.retries = 0
        self.received = self.handled = 0  # messages, each counted by one thread
        self.held_rows = self.held_messages = 0

    def applied(self, batch: TableBatch, positions: dict[int | str, Position], unwritten: np.ndarray) -> None:
        """A batch is in every tier and cache, but for what is ``unwritten``, bool ``[n + m]``, and counted when it is."""
        self._messages += batch.messages
        self.positions.update({partition: position.offset for partition, position in positions.items()})
        self.caught_up(batch, unwritten)

    def caught_up(self, batch: TableBatch, unwritten: np.ndarray) -> None:
        """The same of a batch that came before."""
        n, held = len(batch.keys), int(np.count_nonzero(unwritten))
        if held and held == len(unwritten):
            return
        held_rows = int(np.count_nonzero(unwritten[:n])) if held else 0
        self._rows += batch.writes - batch.deletions - held_rows
        self._erased += batch.deletions - (held - held_rows)
        if batch.newest_ms != NO_TIME:
            self._event_ms = max(self._event_ms, batch.newest_ms)
            self._fresh_ms = max(0, now_ms() - batch.oldest_ms)
        if batch.version is not None:
            self._version = max(batch.version, self._version or 0)
        now = time.monotonic()
        self._recent.append((now, batch.writes - held))
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()

    def read(self, *, lag: int | None) -> TableUpdates:
        """A snapshot; ``lag``: messages that the source has not handed over yet."""
        now = time.monotonic()
        recent = [writes for at, writes in tuple(self._recent) if at >= now - _WINDOW]
        known = self._event_ms != NO_TIME
        age = max(0, now_ms() - self._event_ms) / 1000 if known else None
        behind = max(0, self.received - self.handled) + self.held_messages + (lag or 0)
        return TableUpdates(
            source=self._source,
            messages=self._messages,
            rows=self._rows,
            erased=self._erased,
            rows_per_second=sum(recent) / max(1.0, min(_WINDOW, now - self._began)),
            positions=dict(self.positions),
            lag_messages=None if lag is None else behind,
            lag_seconds=age if behind else 0.0,
            event_time_ms=self._event_ms if known else None,
            age_seconds=age,
            freshness_seconds=self._fresh_ms / 1000 if self._fresh_ms != NO_TIME else None,
            version=self._version,
            skipped=dict(self.skipped),
            retries=self.retries,
            held_rows=self.held_rows,
        )
