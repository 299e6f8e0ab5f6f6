"""First rows of keys that a table does not have yet: functions of a seed and the key, the same in every process and order."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hps_numba.config.arguments import as_count, as_number
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.kernels.host.optimizers import normal_rows, uniform_rows

__all__ = ["Initializer", "Normal", "Uniform", "Zeros", "as_initializer", "initial_rows"]

Initializer = Callable[[np.ndarray, int], Any]
"""From distinct int64 keys ``[n]`` and ``dim`` to rows ``[n, dim]`` of any numeric dtype."""


@dataclass(frozen=True)
class Zeros:
    """Rows of zeros."""

    def __call__(self, keys: np.ndarray, dim: int) -> np.ndarray:
        return np.zeros((len(keys), dim), np.float32)


@dataclass(frozen=True)
class Normal:
    """Normally distributed around 0.

    Attributes:
        std: standard deviation.   seed: another seed gives other rows.
    """

    std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "std")

    def __call__(self, keys: np.ndarray, dim: int) -> np.ndarray:
        rows = np.empty((len(keys), dim), np.float32)
        normal_rows(keys.view(np.uint64), rows, np.uint64(self.seed & _WORD), float(self.std))
        return rows


@dataclass(frozen=True)
class Uniform:
    """Uniformly distributed between ``-bound`` and ``bound``.

    Attributes:
        bound: the largest absolute value.   seed: another seed gives other rows.
    """

    bound: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "bound")

    def __call__(self, keys: np.ndarray, dim: int) -> np.ndarray:
        rows = np.empty((len(keys), dim), np.float32)
        uniform_rows(keys.view(np.uint64), rows, np.uint64(self.seed & _WORD), float(self.bound))
        return rows


def _check(initializer: Any, name: str) -> None:
    """Raise ``ConfigError`` unless the setting of this name is a number from 0 on, and the seed an integer."""
    value = as_number(getattr(initializer, name), f"initializer: {name}")
    if value < 0:
        raise ConfigError(f"initializer: {name}: expected a number from 0 on, got {value}")
    as_count(initializer.seed, "initializer: seed")


_WORD = (1 << 64) - 1
_BY_NAME: dict[str, Initializer] = {"zeros": Zeros(), "normal": Normal(), "uniform": Uniform()}


def as_initializer(given: str | Initializer | None) -> Initializer | None:
    """An initializer from what a user gave: a name, a function, or None for the default value of the table.

    Raises:
        ConfigError: it is none of these.
    """
    if given is None or callable(given):
        return given
    if isinstance(given, str) and given in _BY_NAME:
        return _BY_NAME[given]
    raise ConfigError(
        f"initializer: expected one of {', '.join(_BY_NAME)}, a function of (keys, dim) or None, got {show(given)}"
    )


def initial_rows(initializer: Initializer | None, keys: np.ndarray, dim: int, *, table: str, default: float) -> np.ndarray:
    """First rows, float32 ``[n, dim]``, for distinct int64 keys ``[n]`` of a table; the name of the table salts the seed.

    Raises:
        ConfigError: the function returned another shape.
    """
    if initializer is None:
        return np.full((len(keys), dim), default, np.float32)
    if isinstance(initializer, (Normal, Uniform)):
        salt = zlib.crc32(table.encode()) << 32
        initializer = type(initializer)(**{**vars(initializer), "seed": initializer.seed ^ salt})
    rows = np.asarray(initializer(keys, dim), np.float32)
    if rows.shape != (len(keys), dim):
        raise ConfigError(f"initializer: expected rows of shape [{len(keys)}, {dim}], got {list(rows.shape)}")
    return rows
