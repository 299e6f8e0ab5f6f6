"""The threads that answer what may take long, so that an event loop does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.open_inference.limits import Admission, Limits
from hps_numba.metrics import RequestMetrics

__all__ = ["InferenceThreads"]

T = TypeVar("T")


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

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, done by a thread.

        Raises:
            InferenceError: 429, too many requests wait; 503, it took too long.   What ``work`` raises.
        """
        self._admission.enter()
        waits = [True]

        def started() -> None:
            if waits:
                waits.clear()
                self._requests.queue(-1)

        def run() -> T:
            started()
            return work()

        def done(_: Any) -> None:
            started()
            self._admission.leave()

        self._requests.queue()
        future = self._threads.submit(run)
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
        return wrapped.result()

    def close(self) -> None:
        """End them, after what they are at."""
        self._threads.shutdown(cancel_futures=True)
