"""How long calls took until they returned, of a sample of them.

Problem: a prepared lookup on a device takes some microseconds of Python, and to read the clock twice and count takes two.
Choice: one call in ``SAMPLED`` is timed; which is the next one, a cycle of ones and many zeros in random order says, so that no
rhythm of a caller (every second lookup is a large one) meets that of the samples. It is asked in compiled code, in some 30 ns.
Turned down: a hash of the number of the call, as for lookups in host memory (``kernels.host.histogram``), and a countdown: both
take more steps of Python and lose count between threads; a wrapper around the calls, which is a frame more in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, repeat
from random import Random
from time import perf_counter_ns

from hps_numba.kernels.host.histogram import record
from hps_numba.metrics.histogram import Histogram, HistogramSnapshot

__all__ = ["SAMPLED", "CallTimes"]

#: one call in so many is timed
SAMPLED = 64
_TIMED, _CYCLE = 16, 16 * SAMPLED - 3  # a prime: of calls in any other rhythm, as many are timed


class CallTimes:
    """Times a sample of calls; at first none.

    Args:
        histograms: where samples are counted, each in one, in turn; by default there is one.

    Attributes:
        on: some are.
        due: its next item says whether the call that begins is timed. ``begin``, without a frame of its own, is::

            since = perf_counter_ns() if next(times.due) else 0

    Thread safety: every method but ``switch``.
    """

    __slots__ = ("_histograms", "_sample", "_turns", "due", "on")

    def __init__(self, histograms: Sequence[Histogram] = ()) -> None:
        self._histograms = tuple(histograms) or (Histogram(),)
        self._turns = cycle([histogram.address for histogram in self._histograms])
        self._sample: Iterator[bool] | None = None
        self.due: Iterator[bool] = repeat(False)
        self.on = False

    @staticmethod
    def of_all(several: Sequence[CallTimes]) -> CallTimes:
        """For calls that do the work of several: each that is timed counts for one of them, in turn."""
        times = CallTimes([histogram for one in several for histogram in one._histograms])
        times.switch(all(one.on for one in several))
        return times

    def switch(self, on: bool) -> None:
        """Whether a sample of calls is timed from now on; no call begins meanwhile."""
        if on and self._sample is None:
            nobody = Histogram()
            record(nobody.address, 0)  # compiled, or loaded, now rather than by a call
            timed = [True] * _TIMED + [False] * (_CYCLE - _TIMED)
            Random().shuffle(timed)  # the user's random numbers stay as they are
            self._sample = cycle(timed)
        self.due = self._sample if on and self._sample is not None else repeat(False)
        self.on = on

    def begin(self) -> int:
        """The time in ns if the call that begins is timed, else 0."""
        return perf_counter_ns() if next(self.due) else 0

    def end(self, since: int) -> None:
        """Count the time since ``begin``, which did not return 0."""
        record(next(self._turns), perf_counter_ns() - since)

    def snapshot(self) -> HistogramSnapshot:
        """Nanoseconds that calls took."""
        return HistogramSnapshot.merged(histogram.snapshot() for histogram in self._histograms)
