"""A collector for registries of ``prometheus-client`` (``pip install hps-numba[metrics]``), for processes that serve those."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from hps_numba.errors import ClosedError, ConfigError
from hps_numba.metrics.families import Family
from hps_numba.metrics.histogram import HistogramSnapshot
from hps_numba.metrics.prometheus import buckets_of
from hps_numba.metrics.registry import Registry

if TYPE_CHECKING:
    from prometheus_client.core import Metric as ClientMetric

__all__ = ["MetricsSource", "PrometheusCollector"]


class MetricsSource(Protocol):
    """A server: what has metrics and may be closed."""

    @property
    def metrics(self) -> Registry:
        """Where its metrics come from."""

    @property
    def closed(self) -> bool:
        """Whether it was closed; then it has none."""


class PrometheusCollector:
    """Shows the metrics of a server in a registry of ``prometheus-client``.

    ``prometheus_client.REGISTRY.register(PrometheusCollector(server))``. It does not keep the server: once that is closed or
    gone, there is nothing to collect. A registry takes one server, as two would have metrics of the same names.

    Raises:
        ConfigError: ``prometheus-client`` is not installed, or ``server`` has no metrics.

    Thread safety: every method.
    """

    def __init__(self, server: MetricsSource) -> None:
        try:
            from prometheus_client import core
        except ImportError as problem:
            raise ConfigError("PrometheusCollector: expected prometheus-client: pip install hps-numba[metrics]") from problem
        self._core: Any = core
        self._server = weakly(server, "PrometheusCollector")

    def describe(self) -> Iterator[ClientMetric]:
        """The metrics without values, so that a registry finds names that are taken."""
        for family in families_of(self._server):
            yield self._empty(family)

    def collect(self) -> Iterator[ClientMetric]:
        """The metrics with the values of now; those without a value are left out."""
        for family in families_of(self._server):
            if family.samples:
                yield self._converted(family)

    def _empty(self, family: Family) -> Any:
        metric = family.metric
        kind = getattr(self._core, f"{metric.kind.capitalize()}MetricFamily")
        return kind(metric.family, metric.help, labels=metric.labels, unit=metric.unit)

    def _converted(self, family: Family) -> ClientMetric:
        made, metric = self._empty(family), family.metric
        for labels, value in family.samples:
            if isinstance(value, HistogramSnapshot):
                made.add_metric(labels, buckets_of(metric, value), value.sum * metric.scale)
            else:
                made.add_metric(labels, value)
        return made


def weakly(server: MetricsSource, place: str) -> weakref.ref[MetricsSource]:
    """A weak reference to what has metrics.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(getattr(server, "metrics", None), Registry):
        raise ConfigError(f"{place}: expected a server, such as HPS, got {type(server).__name__}")
    return weakref.ref(server)


def families_of(server: weakref.ref[MetricsSource]) -> list[Family]:
    """The metrics of a server now; none if it was closed or is gone."""
    there = server()
    if there is None or there.closed:
        return []
    try:
        return there.metrics.collect()
    except ClosedError:  # meanwhile
        return []
