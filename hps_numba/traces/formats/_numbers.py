"""Decimal integers of text as int64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["first_wrong", "integers"]

_LEAST, _MAX = -(1 << 63), (1 << 64) - 1


def integers(words: Sequence[Any]) -> np.ndarray | None:
    """int64 ``[n]`` of decimal integers, str or bytes, those from 2**63 on by their bits; None if a word is no such integer."""
    if not words:
        return np.empty(0, np.int64)
    try:
        values = list(map(int, words))
    except ValueError:
        return None
    try:
        return np.array(values, np.int64)
    except OverflowError:
        if min(values) < _LEAST or max(values) > _MAX:
            return None
        return np.array([value & _MAX for value in values], np.uint64).view(np.int64)


def first_wrong(words: Sequence[Any]) -> int | None:
    """Position of the first word that is no integer of 64 bits."""
    return next((i for i, word in enumerate(words) if integers([word]) is None), None)
