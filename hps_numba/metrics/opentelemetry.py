"""The metrics of a server as observable instruments of OpenTelemetry, where its API is importable.

Only the API is used, as libraries should: without an SDK in the process, nothing is ever observed and nothing costs.
OpenTelemetry has no observable histogram; of each histogram, its count and sum are observed, and quantiles of what was counted
since the observation before.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from hps_numba.errors import ConfigError
from hps_numba.metrics.collector import MetricsSource, families_of, weakly
from hps_numba.metrics.families import Family, Metric
from hps_numba.metrics.histogram import HistogramSnapshot
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["observe_with_opentelemetry"]

QUANTILES = (0.5, 0.9, 0.99)
#: units as OpenTelemetry writes them (UCUM)
_UNITS = {"seconds": "s", "bytes": "By"}
_FRESH_SECONDS = 0.5  # instruments that are asked one after the other see one collection


def observe_with_opentelemetry(server: MetricsSource, meter: Any = None) -> Callable[[], None]:
    """Let OpenTelemetry observe the metrics of a server, those of attached front ends included.

    Instruments are named as in ``HPS.metrics_text``, counters without ``_total``; a histogram ``h`` becomes ``h_count``,
    ``h_sum`` and ``h_quantile``, with the attribute ``quantile``. A metric that is attached later is not observed. The server
    is not kept.

    Args:
        meter: of ``opentelemetry.metrics``; by default that of the global provider.

    Returns:
        A function that ends the observation.

    Raises:
        ConfigError: ``opentelemetry-api`` is not installed, or ``server`` has no metrics.
    """
    try:
        from opentelemetry import metrics as api
    except ImportError as problem:
        raise ConfigError("observe_with_opentelemetry: expected opentelemetry-api: pip install hps-numba[metrics]") from problem
    observed = _Observed(weakly(server, "observe_with_opentelemetry"), api.Observation)
    meter = api.get_meter("hps_numba") if meter is None else meter
    for family in observed.families():
        _make_instruments(meter, observed, family.metric)
    return observed.end


def _make_instruments(meter: Any, observed: _Observed, metric: Metric) -> None:
    unit = _UNITS.get(metric.unit, f"{{{metric.unit}}}" if metric.unit else "1")
    told = {"description": metric.help, "unit": unit}
    if metric.kind == "gauge":
        meter.create_observable_gauge(metric.name, [partial(observed.values, metric)], **told)
    elif metric.kind == "counter":
        meter.create_observable_counter(metric.family, [partial(observed.values, metric)], **told)
    else:
        count = [partial(observed.values, metric, of=_count)]
        meter.create_observable_counter(f"{metric.name}_count", count, description=metric.help)
        meter.create_observable_counter(f"{metric.name}_sum", [partial(observed.values, metric, of=_sum)], **told)
        meter.create_observable_gauge(f"{metric.name}_quantile", [partial(observed.quantiles, metric)], **told)


def _count(value: Any, metric: Metric) -> float:
    return int(value.count)


def _sum(value: Any, metric: Metric) -> float:
    return float(value.sum * metric.scale)


class _Observed:
    """What the instruments of one server observe.   Thread safety: every method."""

    def __init__(self, server: weakref.ref[MetricsSource], observation: Callable[..., Any]) -> None:
        self._server: weakref.ref[MetricsSource] | None = server
        self._observation = observation
        self.reset_after_fork()
        register_fork_reset(self)
        self._collected: list[Family] = []
        self._at = float("-inf")
        self._before: dict[tuple[str, tuple[str, ...]], HistogramSnapshot] = {}

    def reset_after_fork(self) -> None:
        """Another thread may have had the lock."""
        self._lock = threading.RLock()

    def end(self) -> None:
        """Observe nothing from now on."""
        self._server = None

    def families(self) -> list[Family]:
        """The metrics now, or those of less than a second ago."""
        server = self._server
        if server is None:
            return []
        with self._lock:
            if time.monotonic() - self._at > _FRESH_SECONDS:
                self._collected, self._at = families_of(server), time.monotonic()
            return self._collected

    def _samples(self, metric: Metric) -> list[tuple[tuple[str, ...], Any]]:
        return next((family.samples for family in self.families() if family.metric == metric), [])

    def values(self, metric: Metric, options: Any, *, of: Callable[[Any, Metric], float] | None = None) -> Iterable[Any]:
        """An observation of each sample, or of one number of each."""
        for labels, value in self._samples(metric):
            number = value if of is None else of(value, metric)
            yield self._observation(number, dict(zip(metric.labels, labels, strict=True)))

    def quantiles(self, metric: Metric, options: Any) -> Iterable[Any]:
        """Observations of the quantiles of what histograms counted since the last time."""
        for labels, value in self._samples(metric):
            before = self._before.get((metric.name, labels))
            self._before[metric.name, labels] = value
            counted = value if before is None else value - before
            if counted.count:
                attributes = dict(zip(metric.labels, labels, strict=True))
                for share in QUANTILES:
                    number = counted.quantile(share) * metric.scale
                    yield self._observation(number, {**attributes, "quantile": str(share)})
