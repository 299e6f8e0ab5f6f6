"""Metrics: counters, gauges and histograms of a server and its front ends, for Prometheus and other systems.

``HPS.metrics_text`` gives what Prometheus scrapes. A front end counts its requests with ``RequestMetrics`` and attaches it to
the server. Any other collector is added by ``server.metrics.add``.
"""

from hps_numba.metrics.collector import PrometheusCollector
from hps_numba.metrics.families import Family, Metric
from hps_numba.metrics.histogram import HistogramSnapshot
from hps_numba.metrics.instruments import Distribution, Number
from hps_numba.metrics.opentelemetry import observe_with_opentelemetry
from hps_numba.metrics.prometheus import OPENMETRICS, PROMETHEUS, accepts_openmetrics, content_type, render
from hps_numba.metrics.registry import Registry
from hps_numba.metrics.requests import RequestMetrics, ServedRequest

__all__ = [
    "OPENMETRICS",
    "PROMETHEUS",
    "Distribution",
    "Family",
    "HistogramSnapshot",
    "Metric",
    "Number",
    "PrometheusCollector",
    "Registry",
    "RequestMetrics",
    "ServedRequest",
    "accepts_openmetrics",
    "content_type",
    "observe_with_opentelemetry",
    "render",
]
