"""What a fully associative algorithm is: a compiled step over a piece of a trace, and the arrays that it keeps between steps.

Keys are dense numbers, 0 to ``keys - 1``: the simulator numbers them once, so that an algorithm looks a key up by indexing an
array and never hashes. Lists are doubly linked by arrays (``_lists``). All rows are of one size, so a capacity is a number of
rows. The step of an algorithm is ::

    step(ids, hits, counters, capacity, *state)

ids: int32 ``[n]``, the keys asked for.   hits: uint8 ``[n]``, 1 where the row was resident, else 0.
counters: int64 ``[8]``, kept from step to step: RESIDENT, ADMITTED, EVICTED; the others are the algorithm's own.
``future`` comes after ``capacity`` for algorithms that look ahead: int64 ``[n]``, position of the next request for the same
key, or FOREVER.   **Writes:** hits, counters, state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ADMITTED", "COUNTERS", "EVICTED", "FOREVER", "OWN", "RESIDENT", "Algorithm"]

RESIDENT, ADMITTED, EVICTED = 0, 1, 2
OWN = 3  # the first counter that is the algorithm's own
COUNTERS = 8
FOREVER = 1 << 62


@dataclass(frozen=True)
class Algorithm:
    """A fully associative algorithm.

    Attributes:
        step: the compiled step.
        state: ``state(capacity, keys, most)`` makes its arrays; ``most``: how often the most popular key is asked for.
        looks_ahead: takes ``future``.   bound: no cache of that many rows can do better, or none of any size.
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
