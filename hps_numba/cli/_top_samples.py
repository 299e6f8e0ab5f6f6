"""Metrics in the text format of Prometheus: read, and what changed between two looks.

A server that is started again begins to count at 0, a model that is loaded later is not in the look before, and an older server
lacks metrics of this one: a counter that fell, or is new, counts from 0, and what is not there is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hps_numba.errors import HpsError

__all__ = ["Change", "Labels", "Sample", "Samples", "read_samples"]

Labels = Mapping[str, str]
_Key = tuple[tuple[str, str], ...]
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?')
_END = re.compile(r"\s*}")
_ESCAPE = re.compile(r"\\(.)")
_SHOWN = 60  # characters of a line that a message has


class Sample(NamedTuple):
    """One value and its labels."""

    labels: Labels
    value: float


@dataclass(frozen=True)
class Samples:
    """What one look found: the samples of each name."""

    by_name: Mapping[str, Sequence[Sample]]

    def of(self, name: str, **labels: str) -> Iterator[Sample]:
        """The samples of a name that have all of ``labels``."""
        return (sample for sample in self.by_name.get(name, ()) if labels.items() <= sample.labels.items())

    def combinations(self, names: Sequence[str], labels: Sequence[str]) -> list[tuple[str, ...]]:
        """The different values of some labels in the samples of some names, sorted."""
        found = (sample.labels for name in names for sample in self.by_name.get(name, ()))
        return sorted({tuple(given.get(label, "") for label in labels) for given in found})


def read_samples(text: str, place: str) -> Samples:
    """Samples of ``text``; ``place`` is what errors name.

    Raises:
        HpsError: a line is not of the format, or no metric is one of hps_numba.
    """
    by_name: dict[str, list[Sample]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            name, sample = _read_line(line, place, number)
            by_name.setdefault(name, []).append(sample)
    if not any(name.startswith("hps_") for name in by_name):
        raise HpsError(f"{place}: expected metrics of hps_numba, whose names begin with hps_, got none")
    return Samples(by_name)


def _read_line(line: str, place: str, number: int) -> tuple[str, Sample]:
    found = _NAME.match(line)
    labels: dict[str, str] = {}
    if found:
        at = found.end()
        if line[at : at + 1] == "{":
            at += 1
            while label := _LABEL.match(line, at):
                labels[label[1]] = _ESCAPE.sub(lambda escaped: "\n" if escaped[1] == "n" else escaped[1], label[2])
                at = label.end()
            end = _END.match(line, at)
            at = end.end() if end else len(line)
        value = _number(line[at:].split())
        if value is not None:
            return found[0], Sample(labels, value)
    shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
    raise HpsError(f"{place}: line {number}: expected a metric in the text format of Prometheus, got {shown!r}")


def _number(words: Sequence[str]) -> float | None:
    """The value at the begin of what follows a name; a time may come after it."""
    try:
        return float(words[0])
    except (IndexError, ValueError):
        return None


@dataclass(frozen=True)
class Change:
    """Two looks at one server.

    Attributes:
        before: the first.   after: the second.   seconds: between them.
    """

    before: Samples
    after: Samples
    seconds: float

    def total(self, name: str, **labels: str) -> float | None:
        """How much the counters of a name with these labels grew, together; None: there are none."""
        grown = self._grown(name, labels)
        return sum(growth for _, growth in grown) if grown else None

    def rate(self, name: str, **labels: str) -> float | None:
        """``total`` a second."""
        total = self.total(name, **labels)
        return None if total is None else total / self.seconds

    def values(self, name: str, **labels: str) -> list[float]:
        """The numbers of the gauges of a name with these labels, as they are now."""
        return [sample.value for sample in self.after.of(name, **labels) if not math.isnan(sample.value)]

    def sum(self, name: str, **labels: str) -> float | None:
        """Their sum; None: there are none."""
        values = self.values(name, **labels)
        return sum(values) if values else None

    def max(self, name: str, **labels: str) -> float | None:
        """The largest of them; None: there are none."""
        return max(self.values(name, **labels), default=None)

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """The value that ``share`` of what the histograms of a name counted between the looks do not exceed.

        Linear within a bucket, as ``histogram_quantile`` of Prometheus; None: they counted nothing.
        """
        counts: dict[float, float] = {}
        for given, growth in self._grown(f"{name}_bucket", labels):
            edge = _number([given.get("le", "")])
            if edge is not None:
                counts[edge] = counts.get(edge, 0.0) + growth
        edges = sorted(counts)
        if not edges or not counts[edges[-1]] > 0:
            return None
        rank = share * counts[edges[-1]]
        at = next(i for i, edge in enumerate(edges) if counts[edge] >= rank)
        low, below = (edges[at - 1], counts[edges[at - 1]]) if at else (0.0, 0.0)
        if math.isinf(edges[at]):  # beyond the last edge that is published: at least so much
            return low
        return low + (edges[at] - low) * (rank - below) / (counts[edges[at]] - below) if counts[edges[at]] > below else low

    def _grown(self, name: str, labels: Labels) -> list[tuple[Labels, float]]:
        earlier = {_key(one.labels): one.value for one in self.before.of(name, **labels)}
        now = [sample for sample in self.after.of(name, **labels) if math.isfinite(sample.value)]
        return [(sample.labels, _growth(earlier.get(_key(sample.labels)), sample.value)) for sample in now]


def _growth(before: float | None, now: float) -> float:
    return now if before is None or not before <= now else now - before


def _key(labels: Labels) -> _Key:
    return tuple(sorted(labels.items()))
