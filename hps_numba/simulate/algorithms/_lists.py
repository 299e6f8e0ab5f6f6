"""Doubly linked circular lists in one array: a row for each key, followed by a row for the sentinel of each list.

``links``: int32 ``[keys + lists, 2]``, (PREV, NEXT). NEXT of a sentinel is the front of its list, PREV the back. A key that is
in no list has PREV = UNLINKED.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function

__all__ = ["NEXT", "PREV", "UNLINKED", "cut", "new_links", "push"]

PREV, NEXT = 0, 1
UNLINKED = -1


def new_links(keys: int, lists: int) -> np.ndarray:
    """``links`` of ``keys`` keys that are in no list, and of empty lists; the sentinel of list i is at ``keys + i``."""
    links = np.full((keys + lists, 2), UNLINKED, np.int32)
    links[keys:] = np.arange(keys, keys + lists, dtype=np.int32)[:, None]
    return links


@host_function
def cut(links, key):
    """Unlink a key from its list; its own row of ``links`` is unchanged.   **Writes:** links."""
    before, after = links[key, PREV], links[key, NEXT]
    links[before, NEXT] = after
    links[after, PREV] = before


@host_function
def push(links, end, key):
    """Insert a key at the front of the list with the sentinel ``end``.   **Writes:** links."""
    front = links[end, NEXT]
    links[key, PREV] = end
    links[key, NEXT] = front
    links[front, PREV] = key
    links[end, NEXT] = key
