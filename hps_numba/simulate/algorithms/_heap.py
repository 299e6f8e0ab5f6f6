"""A binary min-heap of scores that knows the position of every key, so that any score can change."""

from __future__ import annotations

from hps_numba.kernels.compiler.njit import host_function

__all__ = ["NOT_IN_HEAP", "sift_down", "sift_up"]

NOT_IN_HEAP = -1


@host_function
def sift_up(heap, position_of, key_of, at):
    """The score at ``at`` became smaller.   **Writes:** all."""
    score, key = heap[at], key_of[at]
    while at > 0:
        above = (at - 1) >> 1
        if heap[above] <= score:
            break
        heap[at], key_of[at] = heap[above], key_of[above]
        position_of[key_of[at]] = at
        at = above
    heap[at], key_of[at], position_of[key] = score, key, at


@host_function
def sift_down(heap, position_of, key_of, at, size):
    """The score at ``at`` became larger.   **Writes:** all."""
    score, key = heap[at], key_of[at]
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and heap[below + 1] < heap[below]:
            below += 1
        if heap[below] >= score:
            break
        heap[at], key_of[at] = heap[below], key_of[below]
        position_of[key_of[at]] = at
        at = below
    heap[at], key_of[at], position_of[key] = score, key, at
