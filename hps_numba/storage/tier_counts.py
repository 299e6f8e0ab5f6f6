"""What the fetches of each slower tier did for one table: keys asked for and found, failures, and how long calls took.

Counted once a call, by a kernel: it takes no lock, so a signal handler that looks up cannot wait for one, and nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hps_numba.kernels.host.histogram import FETCH_WORDS, record_fetch
from hps_numba.metrics.histogram import WORDS, HistogramSnapshot
from hps_numba.storage.host.content import address_of

__all__ = ["TierCounts", "TierFetches"]


@dataclass(frozen=True)
class TierCounts:
    """A snapshot of the fetches from one tier for one table, since the server started.

    Attributes:
        keys: that it was asked for, each once a call.   found: of these, keys that it had.
        errors: calls that failed, also in part.   nanoseconds: how long calls took, those that failed included.
    """

    keys: int
    found: int
    errors: int
    nanoseconds: HistogramSnapshot


class TierFetches:
    """Counts the fetches from one tier for one table.

    Thread safety: every method; wait-free.
    """

    __slots__ = ("_address", "_words")

    def __init__(self) -> None:
        self._words = np.zeros(FETCH_WORDS + WORDS, np.int64)
        self._address = address_of(self._words)

    def add(self, keys: int, found: int, *, failed: bool, nanoseconds: int) -> None:
        """Count one call."""
        record_fetch(self._address, keys, found, failed, nanoseconds)

    def read(self) -> TierCounts:
        """What was counted so far."""
        keys, found, errors = self._words[:FETCH_WORDS].tolist()
        return TierCounts(keys, found, errors, HistogramSnapshot.of_words(self._words[FETCH_WORDS:]))
