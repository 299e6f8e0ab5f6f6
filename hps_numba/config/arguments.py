"""Arguments of public calls that are not arrays: each becomes the type that the server works with, or a typed error.

Only what callers can hand over as they like is checked here; the path of a lookup asks only when an argument has another type
than it always has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hps_numba.config.messages import show
from hps_numba.errors import ConfigError, DeviceError, HpsError
from hps_numba.runtime.paths import is_url

__all__ = [
    "as_count",
    "as_device",
    "as_flag",
    "as_function",
    "as_index",
    "as_max_norm",
    "as_number",
    "as_optional",
    "as_padding",
    "as_path",
    "as_paths",
    "as_place",
    "as_word",
]

T = TypeVar("T")


def as_index(value: Any) -> int | None:
    """An integer of any kind but bool; None if it is none."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return int(value.__index__())
    except Exception:  # whatever a foreign object raises
        return None


def as_count(value: Any, name: str, low: int | None = None, high: int | None = None) -> int:
    """
    Raises:
        ConfigError: not an integer, or one below ``low`` or above ``high``.
    """
    number = as_index(value)
    if number is None:
        raise ConfigError(f"{name}: expected an integer, got {show(value)}")
    if low is not None and number < low:
        raise ConfigError(f"{name}: expected at least {low}, got {show(number)}")
    if high is not None and number > high:
        raise ConfigError(f"{name}: expected at most {high}, got {show(number)}")
    return number


def as_optional(value: Any, check: Callable[[Any, str], T], name: str) -> T | None:
    """None, or what ``check`` makes of the value; raises as it does."""
    return None if value is None else check(value, name)


def as_device(value: Any) -> int:
    """
    Raises:
        DeviceError: not the number of a device.
    """
    number = as_index(value)
    if number is None:
        raise DeviceError(f"device_id: expected the number of a GPU or None, got {show(value)}")
    return number


def as_number(value: Any, name: str) -> float:
    """
    Raises:
        ConfigError: not a finite number.
    """
    number = math.nan
    if not isinstance(value, (str, bytes, bool, np.bool_, np.ndarray)) and hasattr(value, "__float__"):
        try:
            number = float(value)
        except Exception:  # an integer without end, or whatever a foreign object raises
            number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name}: expected a number, got {show(value)}")
    return number


def as_max_norm(value: Any) -> float | None:
    """A bound of norms, or None for none; infinity bounds nothing.

    Raises:
        ConfigError: not a number of at least 0.
    """
    if value is None or isinstance(value, (float, np.floating)):  # its sign is checked by the bags
        return None if value is None else float(value)
    return as_number(value, "max_norm")


def as_padding(value: Any) -> int:
    """
    Raises:
        ConfigError: not an integer.
    """
    number = as_index(value)
    if number is None:
        raise ConfigError(f"padding: expected an integer or None, got {show(value)}")
    return number


def as_word(value: Any, name: str, known: Iterable[str]) -> str:
    """
    Raises:
        ConfigError: not one of ``known``.
    """
    words = tuple(known)
    if not isinstance(value, str) or value not in words:
        raise ConfigError(f"{name}: expected one of {', '.join(words)}, got {show(value)}")
    return value


def as_flag(value: Any, name: str) -> bool:
    """
    Raises:
        ConfigError: not True or False, nor 1 or 0.
    """
    if isinstance(value, (bool, np.bool_)) or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise ConfigError(f"{name}: expected True or False, got {show(value)}")


def as_function(value: Any, name: str) -> Any:
    """
    Raises:
        ConfigError: it cannot be called.
    """
    if not callable(value):
        raise ConfigError(f"{name}: expected a function, got {show(value)}")
    return value


def as_path(value: Any, name: str, *, error: type[HpsError] = ConfigError) -> Path:
    """
    Raises:
        error: not a path, or one with a zero byte.
    """
    try:
        text = os.fsdecode(value) if isinstance(value, (str, os.PathLike)) else None
    except Exception:  # whatever a foreign ``__fspath__`` raises
        text = None
    if not text or "\0" in text:
        raise error(f"{name}: expected a path, got {show(value)}")
    return Path(text)


def as_place(value: Any, name: str, *, error: type[HpsError] = ConfigError) -> Path | str:
    """A local path, or a URL as it is.

    Raises:
        error: neither, or one with a zero byte.
    """
    if is_url(value) and "\0" not in value:
        return str(value)
    return as_path(value, name, error=error)


def as_paths(value: Any, name: str) -> list[Path | str]:
    """One path or URL, or several.

    Raises:
        ConfigError: something else.
    """
    if isinstance(value, (str, os.PathLike)):
        return [as_place(value, name)]
    try:
        entries = list(value) if isinstance(value, Iterable) else None
    except Exception:  # whatever a foreign iterator raises
        entries = None
    if entries is None or isinstance(value, (bytes, bytearray, np.ndarray)):
        raise ConfigError(f"{name}: expected a path or a list of paths, got {show(value)}")
    return [as_place(entry, f"{name}[{number}]") for number, entry in enumerate(entries)]
