"""Metrics that Python code counts itself, such as the requests of a front end: counters, gauges and histograms with labels.

A lock guards each, so that nothing is lost; it is reentrant, as a signal handler may count too. What kernels count is not here.
"""

from __future__ import annotations

import threading

from hps_numba.metrics.families import Family, Metric
from hps_numba.metrics.histogram import ListHistogram
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["Distribution", "Number"]


class _Instrument:
    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Another thread may have had the lock."""
        self._lock = threading.RLock()


class Number(_Instrument):
    """A counter or gauge.

    Thread safety: every method.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric)
        self._values: dict[tuple[str, ...], float] = {}

    def add(self, amount: float, *labels: str) -> None:
        """Add to the value for some label values, which starts at 0."""
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + amount

    def set(self, value: float, *labels: str) -> None:
        """Set the value for some label values."""
        with self._lock:
            self._values[labels] = value

    def collect(self) -> Family:
        """The values now."""
        with self._lock:
            values = [*self._values.items()]
        family = Family(self.metric)
        for labels, value in values:
            family.add(value, *labels)
        return family


class Distribution(_Instrument):
    """A histogram for each combination of label values.

    Thread safety: every method.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric)
        self._histograms: dict[tuple[str, ...], ListHistogram] = {}

    def record(self, value: int, *labels: str) -> None:
        """Count one value, a whole number of at least 0."""
        with self._lock:
            histogram = self._histograms.get(labels)
            if histogram is None:
                histogram = self._histograms[labels] = ListHistogram()
            histogram.record(value)

    def collect(self) -> Family:
        """What was counted so far."""
        family = Family(self.metric)
        with self._lock:
            for labels, histogram in self._histograms.items():
                family.add(histogram.snapshot(), *labels)
        return family
