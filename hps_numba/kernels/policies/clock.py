"""CLOCK, or second chance: a hand goes round the ways; a row that was requested since the hand last passed is spared once.

F. J. Corbató, "A paging experiment with the Multics system", MIT Project MAC Report M-384, 1968. Close to LRU, but a hit writes
only if it is the first since the hand passed, and hits of one batch need not be counted.
"""

from __future__ import annotations

__all__ = ["Clock"]


class Clock:
    """The score is 1 if the row was requested again, else 0; the state is the way where the hand is."""

    state = 1

    def first(now, count):
        return 0

    def touch(score, now, count):
        return 1

    def victim(scores, state):
        hand = state[0] % len(scores)
        while scores[hand] != 0:
            scores[hand] = 0
            hand = (hand + 1) % len(scores)
        state[0] = (hand + 1) % len(scores)
        return hand


PLUGIN = Clock
