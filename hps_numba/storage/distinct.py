"""The distinct keys among some, and which of some are among others."""

from __future__ import annotations

import numpy as np

__all__ = ["are_among", "distinct_keys"]


def distinct_keys(keys: np.ndarray) -> np.ndarray:
    """The distinct values of a one-dimensional array of integers, ascending, as ``numpy.unique`` returns them.

    Found by sorting: what ``numpy.unique`` does since NumPy 2.3 (a hash table in C++, which takes the GIL back in a destructor)
    aborts the process if Python 3.13 or older ends while a daemon thread is in it.
    """
    ordered = np.sort(keys)
    if len(ordered) < 2:
        return ordered
    first = np.empty(len(ordered), bool)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def are_among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """bool ``[n]``: which integers are in ``ordered``, ascending; as ``numpy.isin``, which calls ``numpy.unique``."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    found: np.ndarray = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return found
