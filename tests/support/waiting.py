"""How tests wait: for what is to come, never for a time. A time-out only finds a hang, on however busy a machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["HANG_SECONDS", "Span", "join_all", "wait_until"]

#: Seconds after which any wait of a test is taken for a hang; pytest's own time-out of a test is longer.
HANG_SECONDS = 2400.0


def wait_until(what: Callable[[], object]) -> None:
    """Wait until ``what`` holds."""
    pause = threading.Event()  # not ``time.sleep``, as tests may have stopped the clock
    deadline = time.perf_counter() + HANG_SECONDS
    while not what():
        assert time.perf_counter() < deadline, "what is waited for does not come"
        pause.wait(1e-3)


def join_all(*threads: threading.Thread) -> None:
    """Wait for threads to end."""
    for thread in threads:
        thread.join(HANG_SECONDS)
    hanging = [thread.name for thread in threads if thread.is_alive()]
    assert not hanging, f"hanging: {', '.join(hanging)}"


class Span:
    """How long threads work at something: some seconds, and on a busy machine until there was enough to see."""

    def __init__(self, seconds: float, enough: Callable[[], object]) -> None:
        self._end, self._enough = time.perf_counter() + seconds, enough

    def goes_on(self) -> bool:
        """Whether to work on; the caller asserts afterwards that it was enough, as a hang ends the span too."""
        return time.perf_counter() < (self._end if self._enough() else self._end + HANG_SECONDS)
