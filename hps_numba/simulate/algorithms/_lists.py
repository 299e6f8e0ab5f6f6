"""Doubly linked circular lists in one array: a row a key, and behind them a row a list, its end.

``links``: int32 ``[keys + lists, 2]``, (PREV, NEXT). From the end of a list, NEXT leads to its front and PREV to its back. A
key that is in no list has PREV = NOWHERE.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function

__all__ = ["NEXT", "NOWHERE", "PREV", "cut", "new_links", "push"]

PREV, NEXT = 0, 1
NOWHERE = -1


def new_links(keys: int, lists: int) -> np.ndarray:
    """``links`` of so many keys, in no list, and of empty lists; the end of list i is at ``keys + i``."""
    links = np.full((keys + lists, 2), NOWHERE, np.int32)
    links[keys:] = np.arange(keys, keys + lists, dtype=np.int32)[:, None]
    return links


@host_function
def cut(links, key):
    """Take a key out of its list; its own row stays as it is.   **Writes:** links."""
    before, after = links[key, PREV], links[key, NEXT]
    links[before, NEXT] = after
    links[after, PREV] = before


@host_function
def push(links, end, key):
    """Put a key at the front of the list with that end.   **Writes:** links."""
    front = links[end, NEXT]
    links[key, PREV] = end
    links[key, NEXT] = front
    links[front, PREV] = key
    links[end, NEXT] = key
