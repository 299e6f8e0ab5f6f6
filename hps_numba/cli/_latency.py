"""Times of calls and their percentiles, for the commands that measure."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

__all__ = ["PERCENTILES", "percentiles", "seconds_of"]

PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}


def seconds_of(step: Callable[[], object]) -> float:
    """Wall time of ``step``."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """``p50_seconds``, ``p95_seconds`` and ``p99_seconds``, interpolated as by ``np.percentile``."""
    values = np.percentile(seconds, list(PERCENTILES.values()))
    return {f"{name}_seconds": float(value) for name, value in zip(PERCENTILES, values, strict=True)}
