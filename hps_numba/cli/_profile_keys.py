"""The keys of the profiler: drawn from a distribution over the keys of a table, or replayed from a file.

A distribution draws ranks 0, 1, ... A rank is the key itself, as in HugeCTR, or the position of the key in the sparse model of
the table, so that a table whose keys are not 0 .. n - 1 gets keys that it contains.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import typer

from hps_numba.errors import ConfigError, ModelFileError
from hps_numba.runtime.paths import kind_of
from hps_numba.simulate.workloads import KEY_DISTRIBUTIONS

__all__ = ["Distribution", "DrawnKeys", "KeySource", "KeyStream", "ReplayedKeys", "chosen_distribution", "parse_weights"]

_MAX_TABLE = 1 << 53


class KeyStream(Protocol):
    """An endless stream of keys.   Thread safety: one thread at a time."""

    def draw(self, count: int) -> np.ndarray:
        """The next ``count`` keys, int64."""


class KeySource(Protocol):
    """A source of key streams, one for each thread."""

    def stream(self, number: int, of: int) -> KeyStream:
        """Stream ``number`` of ``of``."""

    def facts(self) -> dict[str, Any]:
        """A description of the keys, for the report."""


# -- drawn ---------------------------------------------------------------------


@dataclass(frozen=True)
class Distribution:
    """A distribution of ``workloads.KEY_DISTRIBUTIONS`` and its arguments."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def draw(self, n: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """``count`` ranks of 0 .. n - 1.

        Raises:
            typer.BadParameter: an argument, or ``n``, is out of range.
        """
        try:
            return KEY_DISTRIBUTIONS[self.name](n, count, rng=rng, **self.options)
        except ValueError as problem:
            raise typer.BadParameter(str(problem), param_hint="--distribution") from None


def chosen_distribution(name: str, *, alpha: float, percentage: float, coverage: float, weights: str) -> Distribution:
    """The distribution that the options select, with checked arguments.

    Args:
        name: powerlaw, hotkey, histogram or uniform, in any case, also with ``-`` or ``_``.
        weights: see :func:`parse_weights`.

    Raises:
        typer.BadParameter: an unknown name, or an argument out of range.
    """
    options: dict[str, Callable[[], dict[str, Any]]] = {
        "powerlaw": lambda: {"alpha": alpha},
        "hotkey": lambda: {"percentage": percentage, "coverage": coverage},
        "histogram": lambda: {"weights": parse_weights(weights)},
        "uniform": dict,
    }
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in options:
        raise typer.BadParameter(f"expected one of {', '.join(options)}, got {name!r}", param_hint="--distribution")
    chosen = Distribution(plain, options[plain]())
    chosen.draw(_MAX_TABLE, 0, np.random.default_rng(0))
    return chosen


def parse_weights(text: str) -> list[float]:
    """Weights of a histogram: ``0.4,0.3,0.2,0.1``, or the name of a file with such numbers (text or .npy).

    Raises:
        typer.BadParameter: neither numbers nor a file of numbers.
    """
    try:
        return _numbers(text)
    except ValueError:
        return _weights_of_file(Path(text))


def _check_regular(path: Path) -> None:
    """Raise ``ConfigError`` for what is there but is no file: a FIFO waits for ever, a device never ends."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path}: expected a file, got {kind_of(mode)}")


def _weights_of_file(path: Path) -> list[float]:
    try:
        _check_regular(path)
        if path.suffix.lower() == ".npy":
            return [float(weight) for weight in np.load(path, allow_pickle=False).reshape(-1)]
        return _numbers(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"expected numbers such as 0.4,0.3,0.2,0.1 or a file of numbers, got '{path}'"
    except (OSError, ValueError, TypeError, EOFError) as problem:
        what = f"{path}: expected a file of numbers: {problem}"
    raise typer.BadParameter(what, param_hint="--histogram")


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.replace(",", " ").split()]


class DrawnKeys:
    """Random keys.

    Args:
        population: int64, the key of each rank; or the number of keys, which are then the ranks themselves.
        seed: equal seeds give equal streams.

    Raises:
        typer.BadParameter: the distribution is not defined over this number of keys.
    """

    def __init__(self, distribution: Distribution, population: np.ndarray | int, seed: int) -> None:
        self.distribution = distribution
        self.keys = None if isinstance(population, int) else population
        self.size = population if isinstance(population, int) else len(population)
        self.seed = seed
        distribution.draw(self.size, 0, np.random.default_rng(0))

    def stream(self, number: int, of: int) -> KeyStream:
        """A stream with a generator for each number; ``of`` does not matter."""
        del of
        return _DrawnStream(self, np.random.default_rng([self.seed, number]))

    def facts(self) -> dict[str, Any]:
        """Name and arguments of the distribution, and the number of keys."""
        return {"distribution": self.distribution.name, **self.distribution.options, "table_size": self.size}


class _DrawnStream:
    def __init__(self, source: DrawnKeys, rng: np.random.Generator) -> None:
        self._source, self._rng = source, rng

    def draw(self, count: int) -> np.ndarray:
        ranks = self._source.distribution.draw(self._source.size, count, self._rng)
        return ranks if self._source.keys is None else self._source.keys[ranks]


# -- replayed ---------------------------------------------------------------------


class ReplayedKeys:
    """The keys of an .npy file in order, starting again after the last one.

    Raises:
        ModelFileError: there is no such file, or it is not an .npy file with one integer or more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = _load_keys(path)

    def stream(self, number: int, of: int) -> KeyStream:
        """Streams start at evenly spaced positions in the file."""
        return _ReplayedStream(self.keys, number * len(self.keys) // of)

    def facts(self) -> dict[str, Any]:
        """The file and its number of keys."""
        return {"keys_file": self.path, "keys_in_file": len(self.keys)}


class _ReplayedStream:
    def __init__(self, keys: np.ndarray, start: int) -> None:
        self._keys, self._next = keys, start

    def draw(self, count: int) -> np.ndarray:
        taken = self._keys.take(np.arange(self._next, self._next + count), mode="wrap")
        self._next = (self._next + count) % len(self._keys)
        return taken


def _load_keys(path: Path) -> np.ndarray:
    try:
        _check_regular(path)
        keys = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as problem:
        raise ModelFileError(f"{path}: expected an .npy file of integers: {problem}") from problem
    if not isinstance(keys, np.ndarray) or keys.dtype.kind not in "iu" or not keys.size:
        what = f"{keys.size} of dtype {keys.dtype}" if isinstance(keys, np.ndarray) else "an archive of arrays"
        raise ModelFileError(f"{path}: expected an .npy file with one integer key or more, got {what}")
    return np.ascontiguousarray(keys.reshape(-1)).astype(np.int64)
