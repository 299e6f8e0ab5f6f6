"""What the counters of a server's ``/metrics`` gained during a run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

__all__ = ["answered_from", "gained", "parse"]

_LINE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{.*\})?[ \t]+([^ \t]+)")
_COUNTER = ("_total", "_count", "_sum")


def parse(text: str) -> dict[str, float]:
    """Series with their labels -> value, of counters and of the counts and sums of histograms."""
    found = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match and match[1].endswith(_COUNTER):
            try:
                found[match[1] + (match[2] or "")] = float(match[3])
            except ValueError:  # no number: a line of another format
                continue
    return found


def gained(before: str | None, after: str | None) -> dict[str, float]:
    """Series of ``hps_`` that have grown, and by how much."""
    if before is None or after is None:
        return {}
    old = parse(before)
    grown = {name: value - old.get(name, 0.0) for name, value in parse(after).items() if name.startswith("hps_")}
    return {name: value for name, value in sorted(grown.items()) if value > 0}


def answered_from(gains: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """``model/table`` -> where its keys were answered from -> share of them, over all that was gained."""
    asked: defaultdict[str, float] = defaultdict(float)
    found: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for gain in gains:
        for series, value in gain.items():
            name, _, rest = series.partition("{")
            labels = dict(_LABEL.findall(rest))
            table = f"{labels.get('model', '')}/{labels.get('table', '')}"
            if name == "hps_keys_total":
                asked[table] += value
            elif name in _PLACES:
                found[table][_PLACES[name] or f"{labels.get('tier', '')} {labels.get('device', '')}".strip()] += value
    return {table: {place: value / asked[table] for place, value in found[table].items()} for table in sorted(asked)}


_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_PLACES = {"hps_hit_keys_total": "", "hps_absent_keys_total": "no tier", "hps_unanswered_keys_total": "no tier in time"}
