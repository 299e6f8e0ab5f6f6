"""Random: any row of the set may leave.

Studied beside first-in first-out and recency in L. A. Belady, "A study of replacement algorithms for a virtual-storage
computer", IBM Systems Journal 5(2), 1966. A hit writes nothing, and no pattern of requests is bad for it. The numbers are those
of D. E. Knuth's linear congruential generator modulo 2**32 ("The Art of Computer Programming" 2, 1969), one a set, which begins
at 0: so the same requests always leave the same rows, here and on a GPU.
"""

from __future__ import annotations

__all__ = ["Random"]


class Random:
    """No score says anything; the state is the last number of the generator."""

    state = 1

    def first(now, count):
        return 0

    def touch(score, now, count):
        return score

    def victim(scores, state):
        state[0] = (1664525 * state[0] + 1013904223) & 0xFFFF_FFFF
        return (state[0] >> 16) % len(scores)


PLUGIN = Random
