"""Python values as JSON has them, so that a dict and a file are checked by the same rules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

from hps_numba.config.messages import Location, dotted, failed, show

__all__ = ["plain"]

_DEEPEST = 16  # far more than any config has; a dict that contains itself ends here


def plain(value: Any, location: Location = ()) -> Any:
    """``value`` with mappings as dicts, lists and arrays as tuples, enums and paths as strings, NumPy scalars as numbers.

    Anything else is returned as it is: the type check names it.

    Raises:
        ConfigError: a key is not a string, or the nesting is endless.
    """
    if len(location) > _DEEPEST:
        raise failed([f"{dotted(location[:3])}: nested more than {_DEEPEST} deep, expected at most 4"])
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "tolist"):  # an array, or a scalar of one
        return plain(value.tolist(), location)
    if isinstance(value, Mapping):
        return {_key(key, location): plain(entry, (*location, key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(entry, (*location, i)) for i, entry in enumerate(value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _key(key: object, location: Location) -> str:
    if not isinstance(key, str):
        raise failed([f"{dotted(location)}: key {show(key)} is not a string"])
    return key
