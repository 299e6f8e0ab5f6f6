"""LRU with the admission of TinyLFU: a row is inserted only if its key was requested more often lately than that of the victim.

G. Einziger, R. Friedman, B. Manes, "TinyLFU: a highly efficient cache admission policy", ACM Transactions on Storage 13(4),
2017. So keys that are requested once, most of a long tail, evict nothing, and their rows are not even written. The price: one
more kernel a lookup, which counts its keys, and 8 to 16 bytes a row for the counts. The victim is chosen as in LRU.
"""

from __future__ import annotations

__all__ = ["TinyLFU"]

SLACK = 4
LOW32 = 0xFFFF_FFFF


class TinyLFU:
    """The score is the time of the last request, up to ``SLACK`` ticks late, modulo 2**32."""

    clock = "insertions"

    def first(now, count):
        return now

    def touch(score, now, count):
        return now if ((now - score) & LOW32) >= SLACK else score

    def admit(key, count, sketch):
        return sketch[0] > sketch[1]


PLUGIN = TinyLFU
