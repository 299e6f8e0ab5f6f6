"""Families of metrics as text: the format of Prometheus (0.0.4) and OpenMetrics (1.0.0).

Written here and not by a client library: the format is small, servers need no dependency for it, and values are read when they
are asked for instead of being copied to other objects.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

from hps_numba.metrics.families import Family, Metric
from hps_numba.metrics.histogram import HistogramSnapshot

__all__ = ["OPENMETRICS", "PROMETHEUS", "accepts_openmetrics", "buckets_of", "content_type", "render"]

#: content types of the two formats, for HTTP
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def content_type(*, openmetrics: bool = False) -> str:
    """What an HTTP answer with a text of ``render`` names as its content type."""
    return OPENMETRICS if openmetrics else PROMETHEUS


def accepts_openmetrics(accept: str) -> bool:
    """Whether a client prefers OpenMetrics, by the ``Accept`` header of its request (Prometheus sends one)."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for entry in accept.split(","):
        kind, *parameters = (part.strip() for part in entry.split(";"))
        if kind in weights:
            given = [part.partition("=")[2] for part in parameters if part.partition("=")[0].strip() == "q"]
            weights[kind] = max(weights[kind], _weight(given[0]) if given else 1.0)
    return weights["application/openmetrics-text"] > 0 and weights["application/openmetrics-text"] >= weights["text/plain"]


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0


def render(families: Iterable[Family], *, openmetrics: bool = False) -> str:
    """Families, each metric once, as a text that Prometheus reads; a metric without a value is left out."""
    lines: list[str] = []
    for family in families:
        if family.samples:
            lines += _head(family.metric, openmetrics)
            for labels, value in family.samples:
                lines += _sample(family.metric, labels, value)
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n" if lines else ""


def _head(metric: Metric, openmetrics: bool) -> list[str]:
    name = metric.family if openmetrics else metric.name
    described = _escaped(metric.help) if openmetrics else _escaped_help(metric.help)
    head = [f"# HELP {name} {described}", f"# TYPE {name} {metric.kind}"]
    if openmetrics and metric.unit:
        head.append(f"# UNIT {name} {metric.unit}")
    return head


def _sample(metric: Metric, labels: tuple[str, ...], value: float | HistogramSnapshot) -> list[str]:
    pairs = ",".join(f'{name}="{_escaped(text)}"' for name, text in zip(metric.labels, labels, strict=True))
    if not isinstance(value, HistogramSnapshot):
        return [f"{metric.name}{{{pairs}}} {_number(value)}" if pairs else f"{metric.name} {_number(value)}"]
    head = f"{metric.name}_bucket{{{pairs}{',' if pairs else ''}le="
    lines = [f'{head}"{bound}"}} {count}' for bound, count in buckets_of(metric, value)]
    labelled = f"{{{pairs}}}" if pairs else ""
    return [
        *lines,
        f"{metric.name}_count{labelled} {value.count}",
        f"{metric.name}_sum{labelled} {_number(value.sum * metric.scale)}",
    ]


def buckets_of(metric: Metric, value: HistogramSnapshot) -> list[tuple[str, int]]:
    """The published buckets of a histogram: upper edge in the metric's unit, as text, and how many values do not exceed it."""
    bounds = _bounds(metric.edges, metric.scale)
    return [*zip(bounds, value.at_most(metric.edges), strict=True), ("+Inf", value.count)]


@functools.lru_cache(256)
def _bounds(edges: tuple[int, ...], scale: float) -> list[str]:
    return [repr(float(f"{edge * scale:.12g}")) for edge in edges]


def _number(value: float) -> str:
    if isinstance(value, (bool, int)):
        return str(int(value))
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _escaped_help(text: str) -> str:
    return _encodable(text).replace("\\", "\\\\").replace("\n", "\\n")


def _escaped(text: str) -> str:
    return _escaped_help(text).replace('"', '\\"')


def _encodable(text: str) -> str:
    """Text without lone surrogates, which names of files may have and UTF-8 has not."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
