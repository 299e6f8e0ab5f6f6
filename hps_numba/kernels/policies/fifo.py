"""First in, first out: the oldest row is evicted, however often it was requested.

Studied beside random and recency-based replacement in L. A. Belady, "A study of replacement algorithms for a virtual-storage
computer", IBM Systems Journal 5(2), 1966. A hit writes nothing, which makes it the cheapest of all policies; it keeps less of
what is popular than LRU does. Stamps wrap around after 2**32 ticks: a row from before then is evicted after those that follow.
"""

from __future__ import annotations

__all__ = ["FIFO"]


class FIFO:
    """The score is the time of insertion, modulo 2**32."""

    def first(now, count):
        return now

    def touch(score, now, count):
        return score


PLUGIN = FIFO
