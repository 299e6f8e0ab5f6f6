"""Shared by tests: MINE, skewed."""

from __future__ import annotations

import numpy as np

#: that of ``examples/first_policy.py``, so that its kernels are compiled once
MINE = """
AGE, MOST = 32, 8


class Fading:
    needs_count = True

    def first(now, count):
        return now // AGE + min(count, MOST)

    def touch(score, now, count):
        return min(max(score, now // AGE) + count, now // AGE + MOST)
"""


def skewed(n: int, keys: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    heights = np.cumsum(1 / np.arange(1, keys + 1))
    return rng.permutation(keys)[np.searchsorted(heights / heights[-1], rng.random(n))].astype(np.int64) * 977 - 5000
