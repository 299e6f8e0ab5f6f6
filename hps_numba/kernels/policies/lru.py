"""Least recently used: the row whose last request is the oldest is evicted.

R. L. Mattson, J. Gecsei, D. R. Slutz, I. L. Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal
9(2), 1970; the policy of HugeCTR HPS's cache.

*Slack.* A hit that updates a stamp writes to memory that it otherwise only reads, and with strict LRU every hit would. A stamp
is therefore updated only when it is ``SLACK`` ticks old or older. The price: two rows whose last requests are less than
``SLACK`` ticks apart may be evicted in the wrong order, rows further apart never.

*Time is counted in insertions*, not in calls: they are what evicts rows. So the distance from strict LRU does not depend on the
size of batches: ``SLACK`` ticks are a 16th of the cache replaced. And where nothing is missed, nothing is written.

Stamps wrap around after 2**32 ticks: a row that was not requested since then looks newer than one inserted after it.
"""

from __future__ import annotations

__all__ = ["LRU"]

SLACK = 4
LOW32 = 0xFFFF_FFFF


class LRU:
    """The score is the time of the last request, up to ``SLACK`` ticks late, modulo 2**32."""

    clock = "insertions"

    def first(now, count):
        return now

    def touch(score, now, count):
        return now if ((now - score) & LOW32) >= SLACK else score


PLUGIN = LRU
