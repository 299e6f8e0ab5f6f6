"""A skewed key stream, and the source of a user's policy."""

from __future__ import annotations

import numpy as np

#: the policy of ``examples/first_policy.py``, so that its kernels are compiled only once
MINE = """
AGE, LIMIT = 32, 8


class Fading:
    needs_count = True

    def first(now, count):
        return now // AGE + min(count, LIMIT)

    def touch(score, now, count):
        return min(max(score, now // AGE) + count, now // AGE + LIMIT)
"""


def skewed(n: int, keys: int, seed: int = 0) -> np.ndarray:
    """``n`` requests for ``keys`` keys, int64: the frequency of a key is in proportion to 1 / its rank (Zipf 1.0)."""
    rng = np.random.default_rng(seed)
    heights = np.cumsum(1 / np.arange(1, keys + 1))
    return rng.permutation(keys)[np.searchsorted(heights / heights[-1], rng.random(n))].astype(np.int64) * 977 - 5000
