"""Random: any row of the set is evicted.

Studied beside first-in first-out and recency in L. A. Belady, "A study of replacement algorithms for a virtual-storage
computer", IBM Systems Journal 5(2), 1966. A hit writes nothing, and no pattern of requests is bad for it. The generator is
linear congruential modulo 2**32 with the multiplier of D. E. Knuth (W. H. Press et al., "Numerical Recipes", 2nd edition, 1992,
section 7.1), one a set, seeded with 0: the same requests always evict the same rows, here and on a GPU.
"""

from __future__ import annotations

__all__ = ["Random"]


class Random:
    """The score is unused; the state is the last number of the generator."""

    state = 1

    def first(now, count):
        return 0

    def touch(score, now, count):
        return score

    def victim(scores, state):
        state[0] = (1664525 * state[0] + 1013904223) & 0xFFFF_FFFF
        return (state[0] >> 16) % len(scores)


PLUGIN = Random
