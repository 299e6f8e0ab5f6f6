"""LRU with a time to live: rows inserted ``LIFE`` ticks ago or earlier are evicted before all others, however popular they are.

J. Jung, A. W. Berger, H. Balakrishnan, "Modeling TTL-based Internet caches", INFOCOM 2003. For keys that matter for a while
only, such as sessions or news. An expired row is still correct, as the cache follows the host store; it is served until its way
is needed. Times count in 64ths of a life, so that a hit writes at most once in that time, and wrap around after 1024 lives.

``ttl(ticks)`` is the policy with another life; a tick is a call, or more of them if a batch is large compared to the cache.
"""

from __future__ import annotations

from hps_numba.kernels.policies._load import policy_with

__all__ = ["TTL", "ttl"]

LIFE = 4096
LOW16 = 0xFFFF


def unit_of(now):
    """The time in 64ths of a life."""
    return (now // max(1, LIFE // 64)) & LOW16


class TTL:
    """The score is the time of insertion times 2**16, + that of the last request."""

    def first(now, count):
        return (unit_of(now) << 16) + unit_of(now)

    def touch(score, now, count):
        return score - (score & LOW16) + unit_of(now)

    def victim(scores, state, now):
        best, longest = 0, -1
        for way in range(len(scores)):
            idle = (unit_of(now) - scores[way]) & LOW16
            age = (unit_of(now) - (scores[way] >> 16)) & LOW16
            if age >= LIFE // max(1, LIFE // 64):
                idle += LOW16 + 1
            if idle > longest:
                best, longest = way, idle
        return best


def ttl(ticks: int) -> type:
    """The policy with a life of ``ticks``."""
    return policy_with(TTL, LIFE=ticks)


PLUGIN = TTL
