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
    success: _Duration = field(default_factory=_Duration)
    fail: _Duration = field(default_factory=_Duration)
    queue: _Duration = field(default_factory=_Duration)
    compute: _Duration = field(default_factory=_Duration)
    last_ms: int = 0


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
            one = self._models.setdefault(model, _OfModel())
            one.success.add(total_ns)
            one.queue.add(queue_ns)
            one.compute.add(compute_ns)
            one.last_ms = time.time_ns() // 1_000_000

    def failed(self, model: str, total_ns: int) -> None:
        """A request of a model that is served was refused, or failed."""
        with self._lock:
            self._models.setdefault(model, _OfModel()).fail.add(total_ns)

    def to_json(self, model: str, version: str) -> dict[str, Any]:
        """An entry of ``model_stats``: what was counted while the server runs, of every version."""
        with self._lock:
            one = self._models.get(model, _OfModel())
            none = _Duration().to_json()
            beside = _Duration(one.compute.count).to_json()  # Perf Analyzer wants all three counts to be the same
            return {
                "name": model,
                "version": version,
                "last_inference": one.last_ms,
                "inference_count": one.success.count,
                "execution_count": one.success.count,
                "inference_stats": {
                    "success": one.success.to_json(),
                    "fail": one.fail.to_json(),
                    "queue": one.queue.to_json(),
                    "compute_input": beside,
                    "compute_infer": one.compute.to_json(),
                    "compute_output": beside,
                    "cache_hit": none,
                    "cache_miss": none,
                },
                "batch_stats": [],
            }
