"""Results that are kept by the bytes they were made of, as clients send the same bytes again and again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

__all__ = ["remembered"]

T = TypeVar("T")
_MOST = 256


def remembered(parse: Callable[[bytes], T], longest: int) -> Callable[[bytes], T]:
    """``parse``, whose last results for at most ``longest`` bytes are kept; what it raises is not."""
    kept = functools.lru_cache(_MOST)(parse)
    return lambda data: kept(data) if len(data) <= longest else parse(data)
