"""Synthetic models, and keys drawn from the distributions of HugeCTR's profiler and request generator (checklist O03, O05).

All keys are int64 in ``[0, n)``. HugeCTR takes an inclusive upper end N, for which some of its callers pass a count and others
a count less 1; here ``n`` is always the number of keys, so that N = n - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hps_numba.config.arguments import as_count, as_number
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.runtime.paths import check_room, checked_path
from hps_numba.storage.formats._format import MAX_DIM, Chunk, Keys, PathLike, Progress, rows_per_chunk
from hps_numba.storage.model_files import write_model

__all__ = ["KEY_DISTRIBUTIONS", "generate_model", "histogram", "hot_key", "power_law", "uniform"]

Seed: TypeAlias = np.random.Generator | int | None

_MAX_N = 1 << 53  # above, float64 does not tell one key from the next


def generate_model(
    path: PathLike,
    rows: int,
    dim: int,
    *,
    seed: int = 0,
    format: str | None = None,
    low: float = -1.0,
    high: float = 1.0,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> int:
    """Write a model with keys 0 .. rows - 1 and float32 values uniform in [low, high); return its number of rows.

    Values are consecutive draws of ``np.random.default_rng(seed).random(dtype=np.float32)``, row by row, times ``high - low``
    plus ``low`` in float32. So a seed gives the same model in every format, and a longer model begins with the shorter one.
    (Rounding may give ``high`` itself for bounds other than the default ones.)

    Args:
        path: as in :func:`hps_numba.storage.model_files.write_model`, also for ``format``, ``overwrite`` and ``on_progress``.
        rows: 0 or more.
        dim: floats in a row, at least 1.

    Raises:
        ConfigError (a ValueError): ``rows``, ``dim``, ``seed``, ``low`` or ``high`` is out of range or of another type.
        ModelFileError: it cannot be written to ``path``.
    """
    rows, dim = as_count(rows, "rows", 0, np.iinfo(np.int64).max), as_count(dim, "dim", 1, MAX_DIM)
    low, high = (bound if isinstance(bound, float) else as_number(bound, "low, high") for bound in (low, high))
    largest = float(np.finfo(np.float32).max)
    if not (-largest <= low <= high <= largest and high - low <= largest):
        raise ConfigError(
            f"low, high: expected low <= high, with both and their difference in the range of float32, got {low}, {high}"
        )
    try:
        generator = np.random.default_rng(seed)
    except Exception as problem:  # NumPy's, of several types
        raise ConfigError(f"seed: expected an integer of at least 0, got {show(seed)}") from problem
    check_room(checked_path(path), rows * (8 + 4 * dim))
    chunks = _uniform_chunks(rows, dim, generator, low, high)
    return write_model(path, dim, chunks, format=format, rows=rows, overwrite=overwrite, on_progress=on_progress)


def _uniform_chunks(rows: int, dim: int, rng: np.random.Generator, low: float, high: float) -> Iterator[Chunk]:
    step = min(rows, rows_per_chunk(dim))
    buffer = np.empty((step, dim), np.float32)
    for start in range(0, rows, max(step, 1)):
        values = buffer[: rows - start]
        rng.random(dtype=np.float32, out=values)
        values *= np.float32(high - low)
        values += np.float32(low)
        yield np.arange(start, start + len(values)), values, None


def uniform(n: int, size: int, rng: Seed = None) -> Keys:
    """``size`` keys, each of 0 .. n - 1 with the same probability.

    Raises:
        ValueError: ``n`` or ``size`` is out of range.
    """
    _check(n, size)
    return np.random.default_rng(rng).integers(0, n, size)


def power_law(n: int, size: int, alpha: float = 1.2, rng: Seed = None) -> Keys:
    """``size`` keys of 0 .. n - 1; the larger ``alpha`` is, the more frequent are small keys.

    With x uniform in [0, 1): ``y = ((n**(1 - alpha) - 1) x + 1) ** (1 / (1 - alpha))``, ``key = round(y) - 1``, as
    in HugeCTR. y is continuous on [1, n] with density proportional to ``y**-alpha``. For ``alpha`` = 1 the limit ``y = n**x``
    is used, which HugeCTR lacks.

    Raises:
        ValueError: ``n`` or ``size`` is out of range, or ``alpha`` is not greater than 0.
    """
    _check(n, size)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a finite number above 0, got {alpha}")
    y = np.random.default_rng(rng).random(size)
    exponent, log_n = 1.0 - alpha, math.log(n)
    if exponent * log_n == 0.0:
        y *= log_n
    else:  # the formula above in logarithms, which is exact for alpha near 1 as well
        y *= math.expm1(exponent * log_n)
        np.log1p(y, out=y)
        y /= exponent
    np.exp(y, out=y)
    np.rint(y, out=y)
    y -= 1.0
    return np.clip(y, 0, n - 1, out=y).astype(np.int64)


def hot_key(n: int, size: int, percentage: float = 0.2, coverage: float = 0.8, rng: Seed = None) -> Keys:
    """``size`` keys of 0 .. n - 1: with probability ``coverage`` one of the hot keys, else one of the others.

    The ``round(n * percentage)`` smallest keys are hot, at least one; if all are hot, keys are uniform.

    Raises:
        ValueError: ``n`` or ``size`` is out of range, or ``percentage`` or ``coverage`` is not within 0 .. 1.
    """
    _check(n, size)
    for name, value in (("percentage", percentage), ("coverage", coverage)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected 0 to 1, got {value}")
    generator = np.random.default_rng(rng)
    hot = min(n, max(1, round(n * percentage)))
    if hot == n:
        return generator.integers(0, n, size)
    keys = generator.integers(hot, n, size)
    is_hot = generator.random(size) < coverage
    keys[is_hot] = generator.integers(0, hot, np.count_nonzero(is_hot))
    return keys


def histogram(n: int, size: int, weights: Sequence[float] = (0.4, 0.3, 0.2, 0.1), rng: Seed = None) -> Keys:
    """``size`` keys of 0 .. n - 1: a bin with probability proportional to its weight, then uniform within the bin.

    Bin b of B is ``b * n // B .. (b + 1) * n // B``, the upper end excluded, so that every key is in one bin.

    Raises:
        ValueError: ``n`` or ``size`` is out of range, there are more bins than keys, a weight is negative, or all are 0.
    """
    _check(n, size)
    bins = len(weights)
    if not 1 <= bins <= n:
        raise ValueError(f"weights: expected 1 to n = {n} bins, got {bins}")
    shares = np.asarray(weights, np.float64)
    if not (np.isfinite(shares).all() and (shares >= 0).all() and 0 < shares.sum() < math.inf):
        raise ValueError(f"weights: expected numbers of 0 or more that are not all 0, got {list(weights)}")
    edges = np.array([b * n // bins for b in range(bins + 1)], np.int64)
    generator = np.random.default_rng(rng)
    chosen = _choose(shares, generator.random(size))
    widths = np.diff(edges)[chosen]
    offsets = (generator.random(size) * widths).astype(np.int64)
    return edges[chosen] + np.minimum(offsets, widths - 1, out=offsets)


def _choose(shares: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The bin for each x in [0, 1); never one of share 0."""
    ends = np.cumsum(shares)
    chosen = np.searchsorted(ends, x * ends[-1], side="right")
    return np.minimum(chosen, np.flatnonzero(shares)[-1], out=chosen)


def _check(n: int, size: int) -> None:
    if not 1 <= n <= _MAX_N:
        raise ValueError(f"n: expected 1 to {_MAX_N}, got {n}")
    if size < 0:
        raise ValueError(f"size: expected 0 or more, got {size}")


KEY_DISTRIBUTIONS: dict[str, Callable[..., Keys]] = {
    "powerlaw": power_law,
    "hotkey": hot_key,
    "histogram": histogram,
    "uniform": uniform,
}
"""By the names of HugeCTR's options; all are called with ``(n, size, ..., rng=...)``."""
