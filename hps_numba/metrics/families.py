"""What is published: metrics with a name, a kind, labels, a unit and a line of help, and their values at one moment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hps_numba.errors import ConfigError
from hps_numba.metrics.histogram import HistogramSnapshot, bucket_of, upper_edge

__all__ = ["Family", "Metric", "merged"]

Kind = Literal["counter", "gauge", "histogram"]
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*\Z")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\Z")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric as monitoring systems know it.

    Attributes:
        name: as it is queried; counters end in ``_total``, and all others in the unit, if there is one.
        kind: a counter only grows while the process lives; a gauge is a number now; a histogram counts values.
        help: one line.
        labels: names of labels, in the order in which values are given.
        unit: ``seconds``, ``bytes``, or what is counted, such as ``keys``; perhaps empty.
        edges: of a histogram, the upper edges that are published, in the unit of what is recorded.
        scale: what one recorded unit is in ``unit``, such as 1e-9 for nanoseconds in seconds.

    Raises:
        ConfigError: a name that Prometheus does not accept, or one that does not fit kind and unit.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    edges: tuple[int, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ConfigError(f"metric: expected a name of letters, digits and _, got {self.name!r}")
        wrong = [label for label in self.labels if not _LABEL.match(label) or label.startswith("__") or label == "le"]
        if wrong or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"{self.name}: labels: expected different names of letters, digits and _, got {self.labels}")
        if (self.kind == "counter") != self.name.endswith("_total"):
            raise ConfigError(f"{self.name}: expected a name that ends in _total for a counter and for nothing else")
        if self.unit and not self.family.endswith(f"_{self.unit}"):
            raise ConfigError(f"{self.name}: expected a name that ends in its unit {self.unit!r}")
        if (self.kind == "histogram") != bool(self.edges) or any(upper_edge(bucket_of(edge)) != edge for edge in self.edges):
            raise ConfigError(f"{self.name}: edges: expected upper edges of buckets for a histogram and for nothing else")

    @property
    def family(self) -> str:
        """The name without ``_total``."""
        return self.name.removesuffix("_total")


@dataclass
class Family:
    """A metric and its values at one moment, one for each combination of label values."""

    metric: Metric
    samples: list[tuple[tuple[str, ...], float | HistogramSnapshot]] = field(default_factory=list)

    def add(self, value: float | HistogramSnapshot | None, *labels: object) -> None:
        """Add the value for some label values, in the order of ``metric.labels``; None stands for no value."""
        if len(labels) != len(self.metric.labels):
            raise ConfigError(f"{self.metric.name}: expected values of {self.metric.labels}, got {labels}")
        if isinstance(value, HistogramSnapshot) != (self.metric.kind == "histogram") and value is not None:
            raise ConfigError(f"{self.metric.name}: expected a value of a {self.metric.kind}, got {value!r}")
        if value is not None:
            self.samples.append((tuple(map(str, labels)), value))

    def value(self, **labels: object) -> float | HistogramSnapshot:
        """The value of the only sample that has these label values.

        Raises:
            LookupError: there is none, or more than one.
        """
        chosen = [value for values, value in self.samples if _has(dict(zip(self.metric.labels, values)), labels)]
        if len(chosen) != 1:
            raise LookupError(f"{self.metric.name}: expected one sample with {labels}, got {len(chosen)}")
        return chosen[0]


def _has(labels: Mapping[str, str], wanted: Mapping[str, object]) -> bool:
    return all(labels.get(name) == str(value) for name, value in wanted.items())


def merged(some: Iterable[Family]) -> list[Family]:
    """Families with all samples of each metric together, as texts must have them, in the order in which metrics first come.

    Raises:
        ConfigError: two metrics have one name.
    """
    known: dict[str, Family] = {}
    for one in some:
        there = known.setdefault(one.metric.family, Family(one.metric))
        if there.metric != one.metric:
            raise ConfigError(f"{one.metric.name}: expected one metric of this name, got two that differ")
        there.samples += one.samples
    return list(known.values())
