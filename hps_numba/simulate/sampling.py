"""Simulation of a sample of the keys, with a measured error.

A share of the keys of a large trace, chosen by a hash, is simulated with all its requests, in caches that are smaller by that
share (C. Waldspurger et al., "Efficient MRC construction with SHARDS", FAST 2015). A miss of a sampled key counts for 1/rate
misses, and hits are the remaining requests, so that it does not matter whether the most popular keys are in the sample (the
paper's SHARDS-adj). The error is measured: four disjoint quarters of the sample are simulated as well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hps_numba.errors import ConfigError
from hps_numba.kernels.host.numbering import sample_keys
from hps_numba.simulate.dense_trace import HASH_BITS, DenseTrace
from hps_numba.simulate.results import Run

__all__ = ["MIN_SAMPLED_ROWS", "sample_and_quarters", "with_error"]

MIN_SAMPLED_ROWS = 64  # of the smallest cache of a quarter
_QUARTERS = 4
_STUDENT_T = 3.18  # two-sided 95 % quantile with 3 degrees of freedom


def sample_and_quarters(trace: DenseTrace, rows: list[int]) -> list[DenseTrace]:
    """The trace itself; if it is a sample, then also four disjoint quarters of it.

    Args:
        rows: cache sizes for the whole trace, ascending.

    Raises:
        ConfigError: the smallest cache has too few sampled rows for an estimate.
    """
    if trace.rate == 1:
        return [trace]
    if rows[0] * trace.rate / _QUARTERS < MIN_SAMPLED_ROWS:
        enough = MIN_SAMPLED_ROWS * _QUARTERS / rows[0]
        expected = f"a share of {enough:.2g} or more, or larger caches" if enough < 1 else "larger caches"
        raise ConfigError(
            f"sample: expected {expected}, got {trace.rate:g}, which leaves {rows[0] * trace.rate:.1f} rows"
            f" of a cache of {rows[0]:,}"
        )
    return [trace, *(_quarter(trace, number) for number in range(_QUARTERS))]


def _quarter(trace: DenseTrace, number: int) -> DenseTrace:
    limit = round(trace.rate * (1 << HASH_BITS))
    low, high = limit * number // _QUARTERS, limit * (number + 1) // _QUARTERS
    kept = np.empty(trace.distinct, np.int64)
    kept = kept[: sample_keys(trace.keys, kept, low, high)]
    return trace.select(np.isin(trace.keys, kept), (high - low) / (1 << HASH_BITS))


def with_error(whole: Run, quarters: list[Run]) -> Run:
    """The run with its error by the quarters: their spread, plus their mean distance from the whole sample."""
    if not quarters:
        return whole
    rates = np.array([quarter.hit_rate for quarter in quarters])
    spread = _STUDENT_T * rates.std(ddof=1) / len(rates) ** 0.5
    return replace(whole, error=float(spread + abs(rates.mean() - whole.hit_rate)))
