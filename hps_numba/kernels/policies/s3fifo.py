"""S3-FIFO as far as a set can hold it: a small queue that new rows have to pass, and a main one with second chances.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023. A tenth of the
ways is the small queue. At its end, a row without another request is evicted; one that was requested moves to the main queue,
and there goes round again for each request, up to three. A set has no room for the ghost queue of the paper: so one request in
the small queue is enough here, where the paper asks for two, and keys that come back start in the small queue again.
Stamps wrap around after 2**29 ticks.
"""

from __future__ import annotations

__all__ = ["S3FIFO"]

MAIN = 0x8000_0000
STAMPS = 0x1FFF_FFFF
MAX_REQUESTS = 3


def oldest(scores, queue):
    """The oldest way of a queue (0: the small one, MAIN), of equals the first; -1 if the queue is empty."""
    found = -1
    for way in range(len(scores)):
        if scores[way] & MAIN == queue and (found < 0 or scores[way] >> 2 < scores[found] >> 2):
            found = way
    return found


def length(scores, queue):
    """Rows in a queue."""
    rows = 0
    for way in range(len(scores)):
        if scores[way] & MAIN == queue:
            rows += 1
    return rows


class S3FIFO:
    """The score is MAIN for rows of the main queue, + 4 * time of entry into the queue, + requests that still count."""

    needs_count = True

    def first(now, count):
        return 4 * (now & STAMPS) + min(count - 1, MAX_REQUESTS)

    def touch(score, now, count):
        return score - (score & MAX_REQUESTS) + min((score & MAX_REQUESTS) + count, MAX_REQUESTS)

    def victim(scores, state, now):
        for _ in range(5 * len(scores)):
            queue = 0 if length(scores, 0) >= max(1, len(scores) // 10) else MAIN
            way = oldest(scores, queue)
            requests = scores[way] & MAX_REQUESTS
            if requests == 0:
                return way
            scores[way] = MAIN + 4 * (now & STAMPS) + (requests - 1 if queue == MAIN else 0)
        return 0


PLUGIN = S3FIFO
