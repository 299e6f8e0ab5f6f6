"""Whether memory that is written overlaps itself, or what is read meanwhile: by addresses, as both may be on a device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["is_shared", "overlaps_itself"]


def overlaps_itself(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether two elements of an array have a byte in common.

    Args:
        strides: in bytes, of any sign.   itemsize: bytes of an element.
    """
    if math.prod(shape) == 0:
        return False
    steps = sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    end, nested = itemsize, True  # bytes from the first to the last element of the dimensions so far
    for stride, size in steps:
        nested &= stride >= end
        end += stride * (size - 1)
    if nested:  # each dimension steps over all of the smaller ones
        return False
    if math.prod(shape) * itemsize > end:
        return True
    places = np.zeros(1, np.int64)  # no more than the memory has elements; this form of strides is rare
    for stride, size in steps:
        places = np.add.outer(places, stride * np.arange(size)).reshape(-1)
    places.sort()
    return bool((np.diff(places) < itemsize).any())


def is_shared(address: int, size: int, others: Iterable[tuple[int, int]]) -> bool:
    """Whether ``size`` bytes at an address overlap any of other ranges, each an address and a size in bytes."""
    return any(max(address, other) < min(address + size, other + length) for other, length in others)
