"""How often something slow was done, how long it took, how often it failed, and how long ago it was done last."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hps_numba.kernels.host.histogram import record
from hps_numba.metrics.histogram import Histogram, HistogramSnapshot

__all__ = ["Timings"]


class Timings:
    """Runs of one kind of work.

    Attributes:
        errors: runs that raised.

    Thread safety: ``timed`` by one thread at a time, the rest by any.
    """

    def __init__(self) -> None:
        self.errors = 0
        self._nanoseconds = Histogram()
        self._last: int | None = None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count a block as a run; its time counts too if it raises."""
        start = time.monotonic_ns()
        try:
            yield
        except BaseException:
            self.errors += 1
            raise
        else:
            self.done()
        finally:
            record(self._nanoseconds.address, time.monotonic_ns() - start)

    def done(self) -> None:
        """It is done now, whoever did it."""
        self._last = time.monotonic_ns()

    @property
    def nanoseconds(self) -> HistogramSnapshot:
        """How long runs took."""
        return self._nanoseconds.snapshot()

    @property
    def age_seconds(self) -> float | None:
        """Seconds since it was done; None: never."""
        return None if self._last is None else (time.monotonic_ns() - self._last) * 1e-9
