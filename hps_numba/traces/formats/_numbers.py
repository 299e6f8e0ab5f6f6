"""Decimal integers in text, as int64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["first_invalid", "parse_integers"]

_MIN, _MAX = -(1 << 63), (1 << 64) - 1


def parse_integers(words: Sequence[Any]) -> np.ndarray | None:
    """int64 ``[n]`` of decimal integers, str or bytes; 2**63 and above are taken as uint64. None if any word is not one."""
    if not words:
        return np.empty(0, np.int64)
    try:
        values = list(map(int, words))
    except ValueError:
        return None
    try:
        return np.array(values, np.int64)
    except OverflowError:
        if min(values) < _MIN or max(values) > _MAX:
            return None
        return np.array([value & _MAX for value in values], np.uint64).view(np.int64)


def first_invalid(words: Sequence[Any]) -> int | None:
    """Position of the first word that is not a 64-bit integer."""
    return next((i for i, word in enumerate(words) if parse_integers([word]) is None), None)
