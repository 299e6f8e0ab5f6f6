"""SIEVE: a hand moves from old rows to new ones; a requested row stays where it is, the first one without a request is evicted.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for
web caches", NSDI 2024. Unlike CLOCK, the hand stays among the old rows while new ones are inserted behind it, so that those
requested only once are soon evicted. Here a set is one queue, in the order of insertion (within a batch: of ways). Stamps wrap
around after 2**31 ticks.
"""

from __future__ import annotations

__all__ = ["Sieve"]

STAMPS = 0x7FFF_FFFF


def next_way(scores, stamp, way):
    """The first way from ``(stamp, way)`` on, in the order of stamps and ways; -1 if there is none."""
    found = -1
    for i in range(len(scores)):
        mine = scores[i] >> 1
        if (mine > stamp or (mine == stamp and i >= way)) and (found < 0 or mine < scores[found] >> 1):
            found = i
    return found


class Sieve:
    """The score is twice the time of insertion, + 1 if the row was requested; the state is where the hand continues."""

    state = 2

    def first(now, count):
        return 2 * (now & STAMPS)

    def touch(score, now, count):
        return score | 1

    def victim(scores, state):
        for _ in range(2 * len(scores)):
            way = next_way(scores, state[0], state[1])
            if way < 0:
                way = next_way(scores, 0, 0)
            visited = scores[way] & 1
            state[0] = scores[way] >> 1
            state[1] = way + 1
            if next_way(scores, state[0], state[1]) < 0:  # from the newest row back to the oldest, not to rows of this batch
                state[0] = 0
                state[1] = 0
            scores[way] -= visited
            if visited == 0:
                return way
        return 0


PLUGIN = Sieve
