"""Dynamic batching: small requests that are there at the same time are answered by one call of the model.

A call of a model costs much more than one more sample in it. Requests of equal form (``joining.py``) are joined along the first
axis, and their answers split again.

When to wait. A request that finds nothing else at work is answered at once, on the thread that asks: a client that sends one
request at a time pays nothing. While calls are at work, requests gather. When a call ends, its clients are likely to ask
again: so the next call waits for as many requests as were there, though never longer than ``max_delay`` after that end, and
never once a batch is full. A request that has waited for ``max_delay`` while fewer than ``max_calls`` calls are at work starts
one more, so a call that waits for a slow tier holds nobody up.

What may be joined. A model says by ``max_batch_size`` that its first axis is that of samples. Still, the first request of each
form is answered alone, and requests of its form are joined only if all outputs have as many rows as the inputs.

Turned down: a fixed wait for each batch, which is pure latency for a client alone; a thread that hands batches to others, which
costs a switch more for each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from hps_numba.config.arguments import as_count, as_number
from hps_numba.config.messages import show
from hps_numba.errors import CapacityError, ClosedError, ConfigError
from hps_numba.frontends.inference.joining import ALONE, form_of, joined, split
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse, TensorSpec
from hps_numba.frontends.inference.waiting import WaitingRequest
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import start_thread

__all__ = ["BatchedModel", "BatchingStats"]

log = logging.getLogger(__name__)
_MAX_FORMS = 1024  # forms of requests that are remembered


@dataclass(frozen=True)
class BatchingStats:
    """What was batched since the start.

    Attributes:
        requests: that were answered.   calls: of the model for them.   rows: samples in these calls.
        refused: because the queue was full.   expired: that waited for too long.   queued: that wait now.
    """

    requests: int = 0
    calls: int = 0
    rows: int = 0
    refused: int = 0
    expired: int = 0
    queued: int = 0


class BatchedModel(InferenceModel):
    """A model whose small requests are joined; it has the name, inputs, outputs and versions of the model.

    Args:
        model: closed by ``close``.
        max_batch_size: most samples of a call; by default, and at most, ``model.max_batch_size``.
        max_delay: seconds that a request may be held up for others to join it; 0: only while ``max_calls`` calls are at work.
        max_calls: calls of the model at the same time.
        max_queue: requests that may wait; one more gets InferenceError 429.
        timeout: seconds after which a request that still waits gets InferenceError 503.
        on_call: told of each call how many requests it answered, for metrics.

    Raises:
        ConfigError: a number is out of range.

    Threads: up to ``max_calls`` + 1, from the first request on that finds others at work; they sleep when there is nothing to
    do.
    """

    has_threads = True

    def __init__(
        self,
        model: InferenceModel,
        *,
        max_batch_size: int = 0,
        max_delay: float = 0.0005,
        max_calls: int = 2,
        max_queue: int = 1024,
        timeout: float = 30.0,
        on_call: Callable[[int], object] | None = None,
    ) -> None:
        largest = as_count(max_batch_size, "max_batch_size", 0)
        self.max_batch_size = model.max_batch_size
        self._largest = min(largest or model.max_batch_size, model.max_batch_size)
        self._max_delay = _seconds(max_delay, "max_delay", 0.0, 60.0)
        self._max_calls = as_count(max_calls, "max_calls", 1, 1024)
        self._max_queue = as_count(max_queue, "max_queue", 1)
        self._timeout = _seconds(timeout, "timeout", 0.001, 86_400.0)
        self._model, self._on_call = model, on_call
        self.name, self.platform = model.name, model.platform
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start with an empty queue and no threads, as a forked child must."""
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[WaitingRequest] = deque()
        self._threads: list[threading.Thread] = []
        self._at_work = 0  # calls
        self._asking = 0  # requests in them
        self._hoped_for, self._hope_ends = 0, 0.0  # how many requests a batch waits for, and until when
        self._joinable: OrderedDict[Hashable, bool] = OrderedDict()
        self._stats = dict.fromkeys(("requests", "calls", "rows", "refused", "expired"), 0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Those of the model."""
        return self._model.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Those of the model."""
        return self._model.outputs

    def versions(self) -> tuple[str, ...]:
        """Those of the model; none once it is closed."""
        return () if self._closed else self._model.versions()

    def output_bytes(self, request: InferenceRequest) -> int:
        """As the model says."""
        return self._model.output_bytes(request)

    def stats(self) -> BatchingStats:
        """What was batched since the start."""
        with self._changed:
            return BatchingStats(**self._stats, queued=len(self._queue))

    # -- asking ---------------------------------------------------------------------

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Answer a request, perhaps together with others; the thread waits, so it must not be that of an event loop.

        Raises:
            As ``submit``, and what its future raises.
        """
        waiting = self._waiting_of(request)
        with self._changed:
            here = not self._queue and self._at_work == 0 and not self._waits_for_more(1, time.monotonic())
            if here:
                self._start_call([waiting])
            else:
                self._enqueue(waiting)
        if here:
            self._answer([waiting])
        return waiting.answer.result()

    def submit(self, request: InferenceRequest, started: Callable[[], object] = lambda: None) -> Future[InferenceResponse]:
        """Have a request answered on another thread, perhaps together with others; no call waits, so an event loop may submit.

        The future gets the answer, or as ``infer`` of the model: an error of a batch is an error only of those requests that
        fail alone, too. InferenceError 503: it has waited for ``timeout``. If it is cancelled before a call has it, it is
        dropped.

        Raises:
            InferenceError: 429, the queue is full.   ClosedError: the model is closed.
            CapacityError: the system gives no thread.
        """
        waiting = self._waiting_of(request, started)
        with self._changed:
            self._enqueue(waiting)
        return waiting.answer

    def _waiting_of(self, request: InferenceRequest, started: Callable[[], object] = lambda: None) -> WaitingRequest:
        if self._closed:
            raise ClosedError(f"model {self.name!r} is closed")
        now = time.monotonic()
        form, rows = form_of(request)
        if rows >= self._largest or rows == 0:
            form = ALONE
        return WaitingRequest(request, form, rows, now, now + self._timeout, started)

    def _enqueue(self, waiting: WaitingRequest) -> None:
        if self._closed:
            raise ClosedError(f"model {self.name!r} is closed")
        if len(self._queue) >= self._max_queue:
            self._stats["refused"] += 1
            raise InferenceError(429, f"model {self.name!r}: expected at most {self._max_queue} waiting requests, got one more")
        if len(self._threads) <= self._max_calls and len(self._threads) <= self._at_work + len(self._queue) + 1:
            self._start_thread()
        self._queue.append(waiting)
        self._changed.notify()

    def _start_thread(self) -> None:
        name = f"hps_numba_batches_{len(self._threads)}"
        try:
            self._threads.append(start_thread(self._work, (), name=name, purpose="batches of requests"))
        except CapacityError as problem:
            if not self._threads:
                raise
            log.warning("model %r: %s", self.name, problem)

    # -- gathering ---------------------------------------------------------------------

    def _waits_for_more(self, there: int, now: float) -> bool:
        """Whether ``there`` requests should wait for those that are hoped for."""
        return there < self._hoped_for and now < self._hope_ends

    def _work(self) -> None:
        """Of a thread: answer batches until the model is closed and the queue empty."""
        while True:
            with self._changed:
                while not (expired := self._take_expired()) and not (batch := self._next_batch()):
                    if self._closed and not self._queue:
                        return
                    self._changed.wait(self._pause())
                if not expired:
                    self._start_call(batch)
                if self._queue or self._closed:
                    self._wake()  # somebody else has to watch the rest
            if expired:
                self._refuse(expired)
            else:
                self._answer(batch)

    def _wake(self) -> None:
        """One thread; all, once ``close`` waits too."""
        self._changed.notify(len(self._threads) + 1 if self._closed else 1)

    def _pause(self) -> float | None:
        """Seconds until a request in the queue is due, or expires."""
        if not self._queue:
            return None
        now = time.monotonic()
        times = [min(waiting.expires for waiting in self._queue)]
        if self._at_work < self._max_calls:
            times.append(self._due(self._queue[0]))
        return max(min(times) - now, 0.0)

    def _due(self, first: WaitingRequest) -> float:
        """When the first request of the queue is answered, whatever else may come."""
        return first.since + self._max_delay if self._at_work else min(self._hope_ends, first.since + self._max_delay)

    def _next_batch(self) -> list[WaitingRequest]:
        """What one call can answer now, out of the queue; empty if there is nothing, or something to wait for."""
        if not self._queue or self._at_work >= self._max_calls:
            return []
        now, first = time.monotonic(), self._queue[0]
        batch, is_full = self._alike(first)
        is_due = is_full or self._closed or now >= self._due(first)
        if not is_due and (self._at_work or self._waits_for_more(len(self._queue), now)):
            return []
        taken = set(map(id, batch))
        self._queue = deque(waiting for waiting in self._queue if id(waiting) not in taken)
        return batch

    def _alike(self, first: WaitingRequest) -> tuple[list[WaitingRequest], bool]:
        """The first request and those that can be joined with it, and whether no other could be."""
        if first.form is ALONE or not self._joinable.get(first.form, False):
            return [first], True
        batch, rows = [], 0
        for waiting in self._queue:
            if waiting.form == first.form and rows + waiting.rows <= self._largest:
                batch.append(waiting)
                rows += waiting.rows
        return batch, rows >= self._largest

    def _take_expired(self) -> list[WaitingRequest]:
        """The requests that have waited for too long, out of the queue."""
        now = time.monotonic()
        expired = [waiting for waiting in self._queue if now >= waiting.expires]
        if expired:
            self._queue = deque(waiting for waiting in self._queue if now < waiting.expires)
            self._stats["expired"] += len(expired)
        return expired

    def _refuse(self, expired: Sequence[WaitingRequest]) -> None:
        for waiting in expired:
            if waiting.start():
                told = f"model {self.name!r}: expected a free call within {self._timeout:g} s, got none"
                waiting.answer.set_exception(InferenceError(503, told))

    # -- answering ---------------------------------------------------------------------

    def _start_call(self, batch: Sequence[WaitingRequest]) -> None:
        self._at_work += 1
        self._asking += len(batch)

    def _end_call(self, batch: Sequence[WaitingRequest], calls: int) -> None:
        with self._changed:
            self._hoped_for = self._asking + len(self._queue)
            self._at_work -= 1
            self._asking -= len(batch)
            self._hope_ends = time.monotonic() + self._max_delay
            self._stats["requests"] += len(batch)
            self._stats["calls"] += calls
            self._stats["rows"] += sum(waiting.rows for waiting in batch)
            self._wake()

    def _answer(self, batch: list[WaitingRequest]) -> None:
        """Call the model for a batch, and give each request its own rows."""
        live = [waiting for waiting in batch if waiting.start()]
        calls, told = 0, []
        try:
            if len(live) > 1:
                calls += 1
                told = self._joined_answers(live)
                self._tell(len(told))
            if not told:
                calls += len(live)
                told = [self._answer_alone(waiting) for waiting in live]
                self._tell(*[1] * len(told))
        finally:
            self._end_call(batch, calls)  # first, so that clients who ask again find it ended
            for waiting, answer in zip(live, told):
                if isinstance(answer, InferenceResponse):
                    waiting.answer.set_result(answer)
                else:
                    waiting.answer.set_exception(answer)
            for waiting in live[len(told) :]:  # an interrupt
                waiting.answer.set_exception(InferenceError(500, f"model {self.name!r}: the call was interrupted"))

    def _tell(self, *sizes: int) -> None:
        if self._on_call is not None:
            for size in filter(None, sizes):
                self._on_call(size)

    def _joined_answers(self, batch: Sequence[WaitingRequest]) -> list[InferenceResponse | BaseException]:
        """The answers by one call; none if it fails, so that each request has to be answered alone."""
        requests = [waiting.request for waiting in batch]
        try:
            answers = split(self._model.infer(joined(requests)), requests)
        except ClosedError as problem:
            return [problem] * len(batch)
        except Exception as problem:
            log.debug("model %r: a batch of %d requests is answered one by one: %s", self.name, len(batch), problem)
            return []
        if not answers:
            log.warning("model %r: expected an output row for each sample, got others: requests are not joined", self.name)
            with self._changed:
                self._joinable[batch[0].form] = False
        return list(answers)

    def _answer_alone(self, waiting: WaitingRequest) -> InferenceResponse | BaseException:
        try:
            answer = self._model.infer(waiting.request)
        except Exception as problem:
            return problem
        if waiting.form is not ALONE and waiting.form not in self._joinable and waiting.rows > 0:
            with self._changed:
                self._joinable[waiting.form] = bool(split(answer, [waiting.request]))
                if len(self._joinable) > _MAX_FORMS:
                    self._joinable.popitem(last=False)
        return answer

    def close(self) -> None:
        """Refuse further requests, answer those that wait, and close the model."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with self._changed:
            while self._at_work or self._queue:
                self._changed.wait()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._model.close()


def _seconds(value: Any, name: str, low: float, high: float) -> float:
    seconds = as_number(value, name)
    if not low <= seconds <= high:
        raise ConfigError(f"{name}: expected {low:g} to {high:g} seconds, got {show(value)}")
    return seconds
