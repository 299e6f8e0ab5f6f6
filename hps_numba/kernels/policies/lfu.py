"""Least frequently used: the row with the fewest requests since it was inserted is evicted.

Where requests are independent of each other, the best rows to keep are the most probable ones (algorithm A0 of A. V. Aho,
P. J. Denning, J. D. Ullman, "Principles of optimal page replacement", Journal of the ACM 18(1), 1971), and counts estimate the
probabilities. Nothing ages: a row that was popular once stays, and a new row is the next to be evicted until it has been
requested more often than another. So it suits traffic whose popular keys stay the same, and not traffic that drifts.
"""

from __future__ import annotations

__all__ = ["LFU"]

MAX_SCORE = 0xFFFF_FFFF


class LFU:
    """The score is the number of requests, at most 2**32 - 1."""

    needs_count = True

    def first(now, count):
        return min(count, MAX_SCORE)

    def touch(score, now, count):
        return min(score + count, MAX_SCORE)


PLUGIN = LFU
