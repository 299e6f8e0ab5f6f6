"""What became of each request of a run, and percentiles of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["OK", "PERCENTILES", "Outcomes"]

OK = "ok"
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
_CURVE = np.concatenate([np.linspace(0, 90, 46), 100 - np.geomspace(9, 0.01, 40)])


@dataclass
class Outcomes:
    """Times of requests, in seconds of one clock; a list each, as appending to a list is the cheapest record there is.

    Attributes:
        due: when a request was to be sent; in a closed loop, when it was.
        status: ``ok``, an HTTP status, the name of a gRPC status, or what went wrong.
        size: bytes of the answer's body.
    """

    due: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=list)

    def add(self, due: float, sent: float, done: float, status: str, size: int) -> None:
        """Record a request."""
        self.due.append(due)
        self.sent.append(sent)
        self.done.append(done)
        self.status.append(status)
        self.size.append(size)

    def summary(self, begin: float, seconds: float) -> dict[str, Any]:
        """Figures of a run that began at ``begin`` and whose requests were due within so many seconds.

        Latencies are those of requests that were answered, from when they were due. ``requests_per_second`` counts answers
        within the time of the run, ``lag`` is how late requests were sent: to wait for a free connection, or for the client.
        """
        due, sent, done = (np.asarray(some) for some in (self.due, self.sent, self.done))
        good = np.array([status == OK for status in self.status], bool)
        latency, lag = (done - due)[good], sent - due
        within = good & (done <= begin + seconds)
        errors = Counter(status for status in self.status if status != OK)
        return {
            "requests": len(due),
            "answered": int(good.sum()),
            "errors": dict(sorted(errors.items())),
            "requests_per_second": float(within.sum() / seconds),
            "bytes_per_second": float(np.asarray(self.size)[within].sum() / seconds),
            **_of(latency, {f"{name}_seconds": share for name, share in PERCENTILES.items()}),
            "mean_seconds": float(latency.mean()) if len(latency) else None,
            "max_seconds": float(latency.max()) if len(latency) else None,
            **_of(lag, {"lag_p50_seconds": 50.0, "lag_p99_seconds": 99.0}),
            "curve": [[float(share), float(value)] for share, value in zip(_CURVE, _at(latency, _CURVE), strict=True)]
            if len(latency)
            else [],
        }


def _of(values: np.ndarray, named: dict[str, float]) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(named)
    return {name: float(value) for name, value in zip(named, _at(values, list(named.values())), strict=True)}


def _at(values: np.ndarray, shares: Any) -> np.ndarray:
    """Percentiles that are measured values, not means of two: the smallest that so many percent do not exceed."""
    return np.percentile(values, shares, method="inverted_cdf")
