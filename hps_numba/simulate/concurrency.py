"""Independent simulations in threads; the first failure stops all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hps_numba.errors import CapacityError
from hps_numba.runtime.threads import available_cores

__all__ = ["map_in_threads"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Stopped(Exception):
    """Another item failed, or the user interrupted."""


def map_in_threads(
    work: Callable[[_Item, Callable[[], None]], _Result], items: Sequence[_Item], threads: int | None
) -> list[_Result]:
    """``work(item, check)`` of each item, ``threads`` at a time, by default as many as there are cores.

    ``work`` calls ``check`` now and then: it raises once another item has failed or the user has interrupted.
    """
    stop = threading.Event()
    failures: list[BaseException] = []

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    def run(item: _Item) -> _Result:
        check()
        try:
            return work(item, check)
        except _Stopped:
            raise
        except BaseException as problem:
            failures.append(problem)
            stop.set()  # here and not in the caller's thread, which may wake up late while others start
            raise

    with ThreadPoolExecutor(max(1, threads or available_cores())) as pool:
        try:
            return list(pool.map(run, items))
        except BaseException as problem:
            stop.set()
            if isinstance(problem, RuntimeError) and "start new thread" in str(problem):
                raise CapacityError(f"threads: expected {threads or available_cores()} of them, got {problem}") from problem
            if not isinstance(problem, _Stopped):
                raise
    raise failures[0]  # what stopped the others
