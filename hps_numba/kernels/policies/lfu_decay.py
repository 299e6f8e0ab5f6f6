"""Least frequently used, with requests that fade: the weight of each halves every ``HALF_LIFE`` ticks.

The measure is that of D. Lee, J. Choi, J.-H. Kim, S. H. Noh, S. L. Min, Y. Cho, C. S. Kim, "LRFU: a spectrum of policies that
subsumes the least recently used and least frequently used policies", IEEE Transactions on Computers 50(12), 2001. It is kept so
that no score has to change as time passes: a request at time t weighs 2**(t / HALF_LIFE), and the score is the logarithm of
the sum (G. Cormode, V. Shkapenyuk, D. Srivastava, B. Xu, "Forward decay: a practical time decay model for streaming systems",
ICDE 2009), to base 2, times 256. So traffic may drift: what is no longer popular is evicted. A long half-life is LFU, a short
one LRU. Scores wrap around after 2**34 ticks.

``policy_with(LFUDecay, HALF_LIFE=ticks)`` is the same with another half-life.
"""

from __future__ import annotations

__all__ = ["LFUDecay"]

HALF_LIFE = 1024
ONE = 256
STEP = 64
#: 256 * log2(1 + 2**(-i / 4)): by how much a sum is larger than the larger of two that are i / 4 half-lives apart
GAIN = (256, 225, 198, 172, 150, 130, 112, 96, 82, 70, 60, 51, 44, 37, 31, 26, 22, 19, 16, 13, 11, 10, 8, 7, 6, 5, 4, 3, 3, 2)


def log_of(count):
    """256 * log2(count), interpolated linearly between powers of 2."""
    powers = 0
    while (count >> powers) >= 2:
        powers += 1
    return ONE * (powers - 1) + ((ONE * count) >> powers)


class LFUDecay:
    """The score is the logarithm of the weight of all requests since insertion."""

    needs_count = True

    def first(now, count):
        return ONE * now // HALF_LIFE + log_of(count)

    def touch(score, now, count):
        fresh = (ONE * now // HALF_LIFE + log_of(count)) & 0xFFFF_FFFF
        apart = abs(fresh - score) // STEP
        return max(fresh, score) + (GAIN[apart] if apart < len(GAIN) else 0)


PLUGIN = LFUDecay
