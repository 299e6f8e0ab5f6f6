"""How often models were asked and how long that took, as the statistics extension of the protocol tells it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Statistics"]


@dataclass
class _Duration:
    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def to_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass
class _OfModel:
    """Requests that were answered: their number, and ns in all; and those that were not."""

    count: int = 0
    total_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    fail: _Duration = field(default_factory=_Duration)
    last_ns: int = 0


class Statistics:
    """Counts of the requests of every model.

    Thread safety: every method.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, _OfModel] = {}

    def succeeded(self, model: str, total_ns: int, queue_ns: int, compute_ns: int) -> None:
        """A request of a model that is served was answered: in so long, of which it waited and was computed so long."""
        with self._lock:
            one = self._models.get(model) or self._models.setdefault(model, _OfModel())
            one.count += 1
            one.total_ns += total_ns
            one.queue_ns += queue_ns
            one.compute_ns += compute_ns
            one.last_ns = time.time_ns()

    def failed(self, model: str, total_ns: int) -> None:
        """A request of a model that is served was refused, or failed."""
        with self._lock:
            self._models.setdefault(model, _OfModel()).fail.add(total_ns)

    def to_json(self, model: str, version: str) -> dict[str, Any]:
        """An entry of ``model_stats``: what was counted while the server runs, of every version."""
        with self._lock:
            one = self._models.get(model, _OfModel())
            none = _Duration().to_json()
            beside = _Duration(one.count).to_json()  # Perf Analyzer wants all three counts to be the same
            return {
                "name": model,
                "version": version,
                "last_inference": one.last_ns // 1_000_000,
                "inference_count": one.count,
                "execution_count": one.count,
                "inference_stats": {
                    "success": _Duration(one.count, one.total_ns).to_json(),
                    "fail": one.fail.to_json(),
                    "queue": _Duration(one.count, one.queue_ns).to_json(),
                    "compute_input": beside,
                    "compute_infer": _Duration(one.count, one.compute_ns).to_json(),
                    "compute_output": beside,
                    "cache_hit": none,
                    "cache_miss": none,
                },
                "batch_stats": [],
            }
