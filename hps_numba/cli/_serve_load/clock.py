"""An event loop whose timers are exact to microseconds."""

from __future__ import annotations

import asyncio
import select
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run"]

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on a loop that wakes up for a timer within microseconds."""
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(work)


def _new_loop() -> asyncio.AbstractEventLoop:
    if hasattr(select, "epoll"):
        return asyncio.SelectorEventLoop(_exact_selector())
    return asyncio.SelectorEventLoop()


def _exact_selector() -> selectors.BaseSelector:
    """epoll, which rounds time-outs up to milliseconds: the wait is a ``select`` of the epoll object itself, which does not."""

    class ExactSelector(selectors.EpollSelector):
        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is None or timeout <= 0:
                return super().select(timeout)
            select.select([self.fileno()], [], [], timeout)
            return super().select(0)

    return ExactSelector()
