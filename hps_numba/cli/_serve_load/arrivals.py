"""When the requests of an open loop are due."""

from __future__ import annotations

import numpy as np

__all__ = ["ARRIVALS", "due_times"]

ARRIVALS = ("poisson", "constant")


def due_times(arrivals: str, rate: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Seconds from the start, ascending, float64.

    Args:
        arrivals: ``poisson``: independent of each other, as the requests of many clients are; ``constant``: evenly spaced.
        rate: requests a second.
    """
    if arrivals == "constant":
        return np.arange(0.0, seconds, 1.0 / rate)
    count = rng.poisson(rate * seconds)  # given their number, the times of a Poisson process are uniform
    return np.sort(rng.uniform(0.0, seconds, count))
