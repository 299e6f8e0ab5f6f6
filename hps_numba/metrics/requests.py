"""What a network front end counts: its requests by model and status, how long they take, how many wait, how large they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from hps_numba.metrics.families import Family, Metric
from hps_numba.metrics.histogram import ListHistogram, edges_between
from hps_numba.metrics.registry import Registry
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["REQUEST_METRICS", "RequestMetrics", "ServedRequest"]

_FRONTEND = ("frontend", "protocol")
_BY_MODEL = (*_FRONTEND, "model")
_SECONDS = edges_between(1 << 14, 1 << 36)  # ns: 16 us to 69 s
_SIZES = edges_between(1, 1 << 24, 1)

IN_FLIGHT = Metric(
    name="hps_requests_in_flight",
    kind="gauge",
    help="Requests that were accepted and are not answered yet, those that wait included.",
    labels=_FRONTEND,
)
QUEUED = Metric(
    name="hps_queued_requests", kind="gauge", help="Requests that wait for their turn.", labels=_FRONTEND, unit="requests"
)
REQUESTS = Metric(
    name="hps_requests_total",
    kind="counter",
    help="Requests that were answered, by HTTP status (of gRPC: the HTTP status that means the same).",
    labels=(*_BY_MODEL, "status"),
    unit="requests",
)
REQUEST_SECONDS = Metric(
    name="hps_request_seconds",
    kind="histogram",
    help="From the first byte of a request that the front end saw to the end of its answer.",
    labels=_BY_MODEL,
    unit="seconds",
    edges=_SECONDS,
    scale=1e-9,
)
REQUEST_KEYS = Metric(
    name="hps_request_keys",
    kind="histogram",
    help="Keys that a request asked for, of all tables.",
    labels=_BY_MODEL,
    unit="keys",
    edges=_SIZES,
)
BATCH_REQUESTS = Metric(
    name="hps_batch_requests",
    kind="histogram",
    help="Requests that were answered together, by dynamic batching.",
    labels=_BY_MODEL,
    unit="requests",
    edges=edges_between(1, 1 << 12, 1),
)
#: all of them
REQUEST_METRICS = (IN_FLIGHT, QUEUED, REQUESTS, REQUEST_SECONDS, REQUEST_KEYS, BATCH_REQUESTS)

#: status of a request that its client gave up; no answer was sent
CANCELLED = 499
_MAX_MODELS = 256
_OTHER = "(other)"


class _HasMetrics(Protocol):
    @property
    def metrics(self) -> Registry:
        """What the metrics text of a server shows."""


class _OfModel:
    """What was counted of one model.

    Attributes:
        statuses: how many requests, by status.
        seconds, keys, batches: what was recorded.
    """

    __slots__ = ("batches", "keys", "seconds", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.seconds, self.keys, self.batches = ListHistogram(), ListHistogram(), ListHistogram()


class RequestMetrics:
    """Counts the requests of one front end.

    ::

        requests = RequestMetrics("open_inference", "http")
        remove = requests.attach(server)          # server.metrics_text() shows them
        with requests.request() as request:
            request.model = "ranking"             # once it is known to exist
            request.keys = 4096
            request.status = 200                  # without one: 500 if the block raises, 499 if it is cancelled, else 200

    Args:
        frontend: what serves, such as ``open_inference``.   protocol: ``http``, ``grpc``, ``in_process``.

    Thread safety: every method.
    """

    def __init__(self, frontend: str, protocol: str) -> None:
        self.frontend, self.protocol = frontend, protocol
        self._labels = frontend, protocol
        self._models: dict[str, _OfModel] = {}
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A forked child has none of the requests of its parent; what was answered stays counted by both."""
        self._lock = threading.RLock()
        self._active = self._waiting = 0

    def attach(self, server: _HasMetrics) -> Callable[[], None]:
        """Show them among the metrics of a server, which keeps this object then; returns a function that ends this."""
        return server.metrics.add(self.collect)

    def request(self, model: str = "") -> ServedRequest:
        """A context manager for one request, which is in flight from now until its block ends."""
        with self._lock:
            self._active += 1
        return ServedRequest(self, model)

    def queue(self, requests: int = 1) -> None:
        """Some requests begin to wait for their turn; a negative number: so many wait no more."""
        with self._lock:
            self._waiting += requests

    def batch(self, requests: int, model: str = "") -> None:
        """Some requests were answered together."""
        with self._lock:
            self._of(model).batches.record(requests)

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return self._active

    @property
    def queue_depth(self) -> int:
        """Requests that wait for their turn."""
        return self._waiting

    def collect(self) -> list[Family]:
        """The metrics now."""
        in_flight, queued, requests = Family(IN_FLIGHT), Family(QUEUED), Family(REQUESTS)
        seconds, keys, batches = Family(REQUEST_SECONDS), Family(REQUEST_KEYS), Family(BATCH_REQUESTS)
        with self._lock:
            in_flight.add(self._active, *self._labels)
            queued.add(self._waiting, *self._labels)
            for model, one in self._models.items():
                labels = *self._labels, model
                for status, count in one.statuses.items():
                    requests.add(count, *labels, str(status))
                for family, histogram in ((seconds, one.seconds), (keys, one.keys), (batches, one.batches)):
                    counted = histogram.snapshot()
                    if counted.count:
                        family.add(counted, *labels)
        return [in_flight, queued, requests, seconds, keys, batches]

    def _end(self, request: ServedRequest, status: int, nanoseconds: int) -> None:
        with self._lock:
            self._active -= 1
            one = self._of(request.model)
            one.statuses[status] = one.statuses.get(status, 0) + 1
            one.seconds.record(max(0, nanoseconds))
            if request.keys is not None:
                one.keys.record(request.keys)

    def _of(self, model: str) -> _OfModel:
        """What is counted of a model: those beyond a number are one, as names may come from clients."""
        one = self._models.get(model)
        if one is None:
            name = model if len(self._models) < _MAX_MODELS else _OTHER
            one = self._models.setdefault(name, _OfModel())
        return one


class ServedRequest:
    """One request: a context manager, or ended by ``finish``.

    Attributes:
        model: name of the model, or empty: none, or not one that is served.
        keys: how many keys it asks for, or None.   status: HTTP status of its answer, or None.
    """

    __slots__ = ("_ended", "_metrics", "_since", "keys", "model", "status")

    def __init__(self, metrics: RequestMetrics, model: str) -> None:
        self._metrics = metrics
        self._ended = False
        self._since = time.perf_counter_ns()
        self.model = model
        self.keys: int | None = None
        self.status: int | None = None

    def finish(self, status: int | None = None) -> None:
        """The request is answered, with ``status`` or else the one that was set, or 200; a second call changes nothing."""
        if not self._ended:
            self._ended = True
            self._metrics._end(self, status or self.status or 200, time.perf_counter_ns() - self._since)

    def __enter__(self) -> ServedRequest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        failed = 500 if isinstance(error, Exception) else CANCELLED  # asyncio's CancelledError is none, nor is an interrupt
        self.finish(self.status or (200 if error is None else failed))
