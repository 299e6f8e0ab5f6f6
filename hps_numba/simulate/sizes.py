"""Cache sizes as people write them: rows, shares of the distinct keys, and ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from hps_numba.config.arguments import as_number
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError

__all__ = ["DEFAULT_SIZES", "parse_sizes"]

DEFAULT_SIZES = ("0.1%:50%:9",)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(%|[kKmMgG])?")
_SCALES = {"k": 1e3, "m": 1e6, "g": 1e9}


def parse_sizes(sizes: Any, distinct: int) -> list[int]:
    """Cache sizes in rows, ascending, each once.

    Args:
        sizes: one or several of: a whole number of rows; a share of the distinct keys, a float above 0 and up to 1;
            a string: ``10000``, ``10k``, ``5%`` (of the distinct keys), ``first:last:count`` (``count`` sizes in equal
            ratios), or several of these, separated by commas.
        distinct: number of keys in the trace.

    Raises:
        ConfigError: none of these, or a size of 2**31 rows or more.
    """
    several = sizes if isinstance(sizes, (list, tuple, range)) or getattr(sizes, "ndim", None) else [sizes]
    rows = sorted({max(1, round(size)) for one in several for size in _parse_size(one, distinct)})
    if not rows or rows[-1] >= 1 << 31:
        raise ConfigError(f"sizes: expected one or more of at most {(1 << 31) - 1:,} rows, got {show(sizes)}")
    return rows


def _parse_size(size: Any, distinct: int) -> Iterable[float]:
    if isinstance(size, str):
        return [rows for word in size.split(",") for rows in _parse_word(word.strip(), distinct)]
    try:
        number = as_number(size, "sizes")
    except ConfigError:
        expected = "rows, a share such as '5%', or a range 'first:last:count'"
        raise ConfigError(f"sizes: expected {expected}, got {show(size)}") from None
    if isinstance(size, bool) or not number > 0 or (number != int(number) and number > 1):
        raise ConfigError(f"sizes: expected a whole number of rows, or a share above 0 and up to 1, got {size!r}")
    is_share = not hasattr(size, "__index__") and number <= 1
    return [number * distinct if is_share else number]


def _parse_word(word: str, distinct: int) -> list[float]:
    first, *rest = word.split(":")
    if not rest:
        return [_parse_number(first, distinct, word)]
    if len(rest) != 2 or re.fullmatch("[0-9]{1,4}", rest[1]) is None or not 2 <= int(rest[1]) <= 1000:
        raise ConfigError(f"sizes: expected a range 'first:last:count' of 2 to 1000 sizes, got {word!r}")
    low, high, count = _parse_number(first, distinct, word), _parse_number(rest[0], distinct, word), int(rest[1])
    low = max(low, 1.0)
    if high < low:
        raise ConfigError(f"sizes: expected a range with first <= last, got {word!r}")
    return [low * math.exp(math.log(high / low) * i / (count - 1)) for i in range(count)]


def _parse_number(text: str, distinct: int, word: str) -> float:
    found = _NUMBER.fullmatch(text.strip())
    if found is None or not 0 < float(found[1]) < math.inf:
        raise ConfigError(f"sizes: expected rows such as 10000 or 10k, or a share such as 5%, got {word!r}")
    number, unit = float(found[1]), (found[2] or "").lower()
    if unit == "%":
        if number > 100:
            raise ConfigError(f"sizes: expected at most 100% of the keys, got {word!r}")
        return number / 100 * distinct
    return number * _SCALES.get(unit, 1.0)
