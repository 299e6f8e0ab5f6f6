"""Cache sizes as people write them: rows, shares of the distinct keys, and ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from hps_numba.errors import ConfigError

__all__ = ["DEFAULT_SIZES", "rows_of"]

DEFAULT_SIZES = ("0.1%:50%:9",)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(%|[kKmMgG])?")
_SCALES = {"k": 1e3, "m": 1e6, "g": 1e9}


def rows_of(sizes: Any, distinct: int) -> list[int]:
    """Cache sizes in rows, ascending, each once.

    Args:
        sizes: one or several of: a whole number of rows; a fraction of the distinct keys, a float above 0 and up to 1;
            a text: ``10000``, ``10k``, ``5%`` (of the distinct keys), ``first:last:count`` (as many, in equal ratios), or
            several of these with commas.
        distinct: keys of the trace.

    Raises:
        ConfigError: something else came, or a size of more than 2**31 rows.
    """
    several = sizes if isinstance(sizes, (list, tuple, range)) or hasattr(sizes, "tolist") else [sizes]
    rows = sorted({max(1, round(size)) for one in several for size in _sizes_of(one, distinct)})
    if not rows or rows[-1] >= 1 << 31:
        raise ConfigError(f"sizes: {sizes!r}, wanted one or more of at most {(1 << 31) - 1:,} rows")
    return rows


def _sizes_of(size: Any, distinct: int) -> Iterable[float]:
    if isinstance(size, str):
        return [rows for word in size.split(",") for rows in _of_word(word.strip(), distinct)]
    try:
        number = float(size)
    except (TypeError, ValueError):
        raise ConfigError(f"sizes: {size!r}, wanted rows, a share such as '5%', or a range 'first:last:count'") from None
    if isinstance(size, bool) or not number > 0 or (number != int(number) and number > 1):
        raise ConfigError(f"sizes: {size!r}, wanted a whole number of rows, or a share above 0 and up to 1")
    is_share = not hasattr(size, "__index__") and number <= 1
    return [number * distinct if is_share else number]


def _of_word(word: str, distinct: int) -> list[float]:
    first, *rest = word.split(":")
    if not rest:
        return [_of_number(first, distinct, word)]
    if len(rest) != 2 or not rest[1].isdigit() or not 2 <= int(rest[1]) <= 1000:
        raise ConfigError(f"sizes: {word!r}, wanted a range 'first:last:count' of 2 to 1000 sizes")
    low, high, count = _of_number(first, distinct, word), _of_number(rest[0], distinct, word), int(rest[1])
    low = max(low, 1.0)
    if high < low:
        raise ConfigError(f"sizes: {word!r} goes down, wanted first <= last")
    return [low * math.exp(math.log(high / low) * i / (count - 1)) for i in range(count)]


def _of_number(text: str, distinct: int, word: str) -> float:
    found = _NUMBER.fullmatch(text.strip())
    if found is None or not float(found[1]) > 0:
        raise ConfigError(f"sizes: {word!r}, wanted rows such as 10000 or 10k, or a share such as 5%")
    number, unit = float(found[1]), (found[2] or "").lower()
    if unit == "%":
        if number > 100:
            raise ConfigError(f"sizes: {word!r}, wanted at most 100% of the keys")
        return number / 100 * distinct
    return number * _SCALES.get(unit, 1.0)
