"""Least recently used: the row that was not asked for during the longest time leaves first.

R. L. Mattson, J. Gecsei, D. R. Slutz, I. L. Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal
9(2), 1970; the policy of the original cache (spec 6.3).

*Slack.* A hit that renews a stamp writes to memory that it otherwise only reads, and with LRU every hit would. A stamp is
therefore renewed only when it is ``SLACK`` ticks old or older. The price: two rows whose last requests lie less than
``SLACK`` ticks apart may leave in the wrong order, rows further apart never.

*Time is counted in rows that came in*, not in calls: it is they who push others out. So how near to LRU this is does not depend
on the size of batches, ``SLACK`` ticks are a 16th of the cache renewed; and where nothing is missed, nothing is written.

Stamps begin anew after 2**32 ticks: a row that nobody asked for since then looks newer than one that came in after it.
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
