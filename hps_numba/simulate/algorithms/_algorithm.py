"""The interface of a fully associative algorithm: a compiled step over a piece of a trace, and arrays kept between steps.

Keys are dense numbers, 0 to ``keys - 1``, so that an algorithm finds a key by indexing an array instead of hashing. Lists are
doubly linked in arrays (``_lists``). All rows have one size, so a capacity is a number of rows. The step of an algorithm is ::

    step(ids, hits, counters, capacity, *state)

ids: int32 ``[n]``, the requested keys.   hits: uint8 ``[n]``, 1 where the row was resident, else 0.
counters: int64 ``[8]``, kept from step to step: RESIDENT, ADMITTED, EVICTED; the others belong to the algorithm.
Algorithms that look ahead take ``future`` after ``capacity``: int64 ``[n]``, position of the next request for the same key,
or FOREVER.   **Writes:** hits, counters, state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ADMITTED", "COUNTERS", "EVICTED", "FOREVER", "OWN", "RESIDENT", "Algorithm"]

RESIDENT, ADMITTED, EVICTED = 0, 1, 2
OWN = 3  # the first counter that belongs to the algorithm
COUNTERS = 8
FOREVER = 1 << 62


@dataclass(frozen=True)
class Algorithm:
    """A fully associative algorithm.

    Attributes:
        step: the compiled step.
        state: ``state(capacity, keys, max_count)`` returns its arrays; ``max_count``: requests for the most popular key.
        looks_ahead: takes ``future``.   bound: an upper bound on the hits of all caches of the same size, or of any size.
    """

    step: Callable[..., None]
    state: Callable[[int, int, int], tuple[np.ndarray, ...]]
    looks_ahead: bool = False
    bound: bool = False

    def new_counters(self) -> np.ndarray:
        """Counters before the first step."""
        return np.zeros(COUNTERS, np.int64)

    def __call__(self, *args: Any) -> None:
        self.step(*args)
