"""Circuit breaker of a node: a dead node costs one time-out, and then a short probe now and again."""

from __future__ import annotations

import threading
import time
from enum import Enum

from hps_numba.runtime.fork import register_fork_reset

__all__ = ["CircuitBreaker", "Verdict"]


class Verdict(Enum):
    """Whether to ask a node."""

    ASK = "ask"
    PROBE = "probe"  # this caller finds out, and reports it
    REFUSE = "refuse"


class CircuitBreaker:
    """Closed while a node answers. A failure opens it: callers are refused, but for one at a time after a pause that doubles.

    Thread safety: every method.
    """

    #: late answers in a row that count as a failure
    LATE = 3

    def __init__(self, first_pause: float, longest_pause: float) -> None:
        """Pauses in seconds."""
        self._first, self._longest = first_pause, longest_pause
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Closed, with a lock that no thread of the parent holds."""
        self._lock = threading.Lock()
        self._pause = 0.0
        self._until = 0.0
        self._late = 0

    @property
    def is_open(self) -> bool:
        """Whether the node failed last."""
        return self._pause > 0

    def verdict(self) -> Verdict:
        """Whether this caller may ask the node."""
        if not self.is_open:
            return Verdict.ASK
        with self._lock:
            now = time.monotonic()
            if not self.is_open:
                return Verdict.ASK
            if now < self._until:
                return Verdict.REFUSE
            self._until = now + self._pause  # others are refused meanwhile, also if this one never reports
            return Verdict.PROBE

    def failed(self) -> None:
        """The node did not answer."""
        with self._lock:
            self._pause = min(max(2 * self._pause, self._first), self._longest)
            self._until = time.monotonic() + self._pause

    def late(self) -> None:
        """The node did not answer within a time that may have been too short; so many times in a row, it failed."""
        with self._lock:
            self._late += 1
            failed = self._late >= self.LATE
        if failed:
            self.failed()

    def answered(self) -> None:
        """The node answered, be it with an error."""
        if self.is_open or self._late:
            with self._lock:
                self._pause = 0.0
                self._late = 0
