"""SIEVE: a hand goes from old rows to new ones; a row that was asked for stays where it is, the next one that was not leaves.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for
web caches", NSDI 2024. Unlike CLOCK, the hand stays among the old rows while new ones come in behind it, so that those which
are asked for once soon leave. Here a set is one queue, in the order in which its rows came in (of one batch: of their ways).
Stamps begin anew after 2**31 ticks.
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
    """The score is twice the time when the row came in, and 1 more if it was asked for; the state is where the hand goes on."""

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
            if next_way(scores, state[0], state[1]) < 0:  # from the newest row back to the oldest, not to newcomers
                state[0] = 0
                state[1] = 0
            scores[way] -= visited
            if visited == 0:
                return way
        return 0


PLUGIN = Sieve
