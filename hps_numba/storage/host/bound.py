"""The bound of a table, and which rows are evicted when it is passed (HugeCTR's overflow policies)."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.host.evict import HISTOGRAM, host_evict
from hps_numba.kernels.layouts.host_store import RECENCY_COUNT, RECENCY_NONE, RECENCY_TIME
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.epochs import Epochs

__all__ = ["RECENCY_OF_POLICY", "RowBound"]

#: what each overflow policy keeps per slot
RECENCY_OF_POLICY = {"evict_random": RECENCY_NONE, "evict_least_used": RECENCY_COUNT, "evict_oldest": RECENCY_TIME}


class RowBound:
    """At most ``max_rows`` rows; a table that passes it is trimmed to ``round(max_rows * target)``.

    Attributes:
        recency: the ``RECENCY_*`` mode that the table has to keep.
        evicted: rows evicted so far.
        seed: of the random policy, as it is after the evictions so far.

    Thread safety: ``trim`` by the writer.
    """

    def __init__(self, max_rows: int | None, policy: str, target: float, seed: int) -> None:
        """``max_rows`` None is no bound; ``policy`` is a key of ``RECENCY_OF_POLICY``."""
        self.max_rows = max_rows
        self.recency = RECENCY_OF_POLICY[policy] if max_rows is not None else RECENCY_NONE
        self.evicted = 0
        self.seed = seed
        self._kept = 0 if max_rows is None else round(max_rows * target)

    def trim(self, content: TableContent, epochs: Epochs) -> None:
        """Evict down to the target if the bound is passed."""
        if self.max_rows is None or content.live <= self.max_rows:
            return
        histogram = np.empty(HISTOGRAM, np.int64)
        by_recency = True
        while (excess := content.live - self._kept) > 0:
            self.seed += 1
            retired = content.reserve_retired(excess)
            self.evicted += host_evict(content.block, excess, by_recency, self.seed, histogram, content.state, retired)
            content.retire_slots(epochs)
            by_recency = (
                False  # rows that lookups touched during the first round are picked at random: readers cannot prolong this
            )
