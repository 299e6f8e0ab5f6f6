"""The threads that answer what may take long, so that an event loop does not wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse
from hps_numba.frontends.open_inference.limits import Admission, Limits
from hps_numba.metrics import RequestMetrics

__all__ = ["InferenceThreads"]

T = TypeVar("T")
_SMALL = 1 << 20  # bytes, whose copy takes less than a switch of threads


class InferenceThreads:
    """A bounded number of threads, with a bounded queue in front of them.

    Args:
        admission: counts requests that have a thread or wait for one.   requests: counts those that wait.
        name: of the threads.

    Thread safety: one event loop.
    """

    def __init__(self, limits: Limits, admission: Admission, requests: RequestMetrics, name: str) -> None:
        self._limits, self._admission, self._requests = limits, admission, requests
        self._threads = ThreadPoolExecutor(limits.max_concurrent, name)

    async def run(self, work: Callable[[], T]) -> tuple[T, int]:
        """What ``work`` returns, done by a thread; and how many ns it waited for the thread.

        Raises:
            InferenceError: 429, too many requests wait; 503, it took too long.   What ``work`` raises.
        """

        def submit(started: Callable[[], object]) -> Future[T]:
            def run() -> T:
                started()
                return work()

            return self._threads.submit(run)

        return await self.result_of(submit)

    async def result_of(self, submit: Callable[[Callable[[], object]], Future[T]]) -> tuple[T, int]:
        """What a future gives, which counts as a request that has a thread or waits for one; and how many ns it waited.

        Args:
            submit: returns the future, and lets the function that it is given be called when the request waits no more.

        Raises:
            InferenceError: 429, too many requests wait; 503, it took too long.   What ``submit`` or the future raise.
        """
        self._admission.enter()
        submitted, waited = time.perf_counter_ns(), None

        def started() -> None:
            nonlocal waited
            if waited is None:
                waited = time.perf_counter_ns() - submitted
                self._requests.queue(-1)

        def done(_: Any) -> None:
            started()
            self._admission.leave()

        self._requests.queue()
        try:
            future = submit(started)
        except BaseException:
            done(None)
            raise
        future.add_done_callback(done)
        wrapped = asyncio.wrap_future(future)
        wrapped.add_done_callback(lambda one: None if one.cancelled() else one.exception())
        finished = False
        try:
            finished = bool((await asyncio.wait((wrapped,), timeout=self._limits.request_seconds))[0])
        finally:
            if not finished:
                future.cancel()
        if not finished:
            raise InferenceError(
                503, f"server: expected an answer within {self._limits.request_seconds:g} s, there is none yet"
            )
        return wrapped.result(), waited or 0

    async def infer(
        self,
        model: InferenceModel,
        request: InferenceRequest,
        encode: Callable[[InferenceResponse], T],
        *,
        is_quick: bool = True,
    ) -> tuple[T, int, int]:
        """The encoded answer of a model; how many ns the request waited for its turn, and how many it took then.

        Requests that a model does not have to wait for are answered here, those of a model with threads of its own there, and
        others by a thread of these.

        Args:
            is_quick: encoding takes no time but for copies, so that it may be done on the thread of the event loop.

        Raises:
            As ``run``, and as ``model.infer``.
        """
        began = time.perf_counter_ns()
        if is_quick and not model.may_wait(request):
            answer, waited = encode(model.infer(request)), 0
        elif not model.has_threads:
            answer, waited = await self.run(lambda: encode(model.infer(request)))
        else:
            response, waited = await self.result_of(partial(model.submit, request))
            is_quick = is_quick and sum(array.nbytes for array in response.outputs.values()) <= _SMALL
            answer = encode(response) if is_quick else (await self.run(lambda: encode(response)))[0]
        return answer, waited, time.perf_counter_ns() - began - waited

    def close(self) -> None:
        """End them, after what they are at."""
        self._threads.shutdown(cancel_futures=True)
