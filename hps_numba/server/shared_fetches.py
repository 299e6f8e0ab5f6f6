"""Fetches from the slower tiers of one table that concurrent lookups share.

Problem: a key that has just become popular is missed by all threads at once, and each would ask the slower tiers for it; many
small misses cost a tier more than a few large ones. Choice: a lookup *joins* the fetches under way if they ask for half of its
keys or more, and waits for those. For the others it begins a fetch; while as many are under way as the tiers gain from
(``Tier.parallel_fetches``), it waits in a queue, and the next thread that begins one asks for all that is queued, each key
once. A tier that answers as fast as rows pass from thread to thread is asked by each lookup for itself.

*No old rows.* A row that an acknowledged write replaced must not be the answer of a lookup that began after it. So a fetch
under way is joined only if the table was at rest when it began, and no write had begun since when the lookup did
(``TableWrites.count``). What waits in the queue is fetched after its lookup began, whatever is written. What other processes
write to a shared tier may reach a lookup that joins as much later as the fetch began before it.

*Nobody waits for ever.* A lookup waits for others only after its own fetch, never for a fetch of its own thread (it would come
from a signal handler or a callback inside of it), and no longer than its own time budget or ``PATIENCE_SECONDS``: a tier
may need a lock that the waiting thread holds. If the thread that asked gets an error or an interrupt, the others ask for
themselves; one that vanished is found by its frame, which runs no more.

*What it costs.* A lookup takes a closer look at a fetch only if the least or the greatest hash of the keys is the same: likely
if most keys are, and found by two steps of NumPy, whatever is under way. With less than half of its keys in common it joins
none: to wake a thread takes longer than a tier takes for some keys more in a batch.

Turned down: one fetch for each key, in a dict (a microsecond for each key of each lookup); handing the turn to a waiting
thread, which may be in a signal handler that waits itself; joining fetches of many more keys than the own ones, which take
longer; a limit that follows the measured time of calls (with many threads, that is the time they wait for the interpreter).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue

import numpy as np

from hps_numba.config import TableSpec
from hps_numba.runtime.blocks import has_ended
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.server.flights import Flight, SharedAnswer, common_keys, samples_of
from hps_numba.storage.tier_stack import TierStack

__all__ = ["SharedFetches"]

_LOOK_SECONDS = 0.1
_QUICK_SECONDS, _QUICK_SECONDS_A_KEY = 1e-4, 1e-7  # about what it takes to join a fetch of another thread
_QUICK_CALLS = 16  # calls in sequence that took less: then nothing is shared, until one takes longer
_JOINED_SHARE = 0.5  # of a lookup's keys: with less in common, it asks for all
_CLOSER_LOOKS = 2  # at fetches of which a lookup may join
_SMALL = 16384  # keys: fetches of so many are joined by any lookup, and queued keys are fetched so many at a time


class _Request:
    """Keys that wait in the queue, and the fetch that somebody has begun for them.

    Attributes:
        flight: None until then.   places: of the keys in its answer.
    """

    def __init__(self, keys: np.ndarray, samples: frozenset[int]) -> None:
        self.keys, self.samples = keys, samples
        self.inbox: SimpleQueue[None] = SimpleQueue()
        self.flight: Flight | None = None
        self.places: np.ndarray | None = None


class SharedFetches:
    """What all lookups of one table ask its slower tiers for.

    Args:
        spec: the table.   tiers: the slower tiers.
        settled: gives the count of writes to the table, or None while one is in progress.

    Thread safety: every method; without a lock.
    """

    #: after so long, who waits for others asks a second time
    PATIENCE_SECONDS = 5.0

    def __init__(self, spec: TableSpec, tiers: TierStack, settled: Callable[[], int | None]) -> None:
        self._spec = spec
        self._tiers = tiers
        self._settled = settled
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Forget the fetches of threads that a forked child does not have."""
        self._flights: dict[Flight, None] = {}
        self._queue: dict[_Request, None] = {}
        self._quick_calls = 0  # in sequence

    @property
    def limit(self) -> int:
        """Fetches under way from which on further keys are queued and asked for together."""
        return self._tiers.parallel_fetches

    def fetch(
        self, keys: np.ndarray, count: int, deadline: float | None = None, *, out: np.ndarray | None = None
    ) -> SharedAnswer:
        """The rows of distinct int64 ``keys``.

        Args:
            count: of the writes when the lookup began.
            deadline: a ``time.monotonic()`` after which it waits for no other fetch, and begins no further batch.
            out: float32 ``[n, dim]``, contiguous: the answer's ``rows`` may be this array, which is undefined otherwise.

        Raises:
            As ``TierStack.fetch``.
        """
        if self._quick_calls >= _QUICK_CALLS:
            return self._ask_tiers(keys, deadline, out)
        if not self._flights:
            return self._lead(keys, deadline, out=out)
        samples = samples_of(keys)
        under_way = list(self._flights)
        if self._leads_here(under_way):
            return self._lead(keys, deadline, samples, out=out)
        flights = self._usable(under_way, samples, len(keys), count)
        if not flights:
            return self._ask(keys, deadline, samples)
        rest, joins = common_keys(flights, keys)
        if len(rest) > (1 - _JOINED_SHARE) * len(keys):
            return self._ask(keys, deadline, samples)
        inboxes = [SimpleQueue[None]() for _ in joins]
        for (flight, _, _), inbox in zip(joins, inboxes, strict=True):
            flight.wake_at_end(inbox)
        answer = self._unanswered(len(keys))
        if len(rest):
            answer.put(rest, self._ask(keys[rest], deadline))
        for (flight, positions, places), inbox in zip(joins, inboxes, strict=True):
            answer.put(positions, self._joined(flight, keys[positions], places, inbox, deadline))
        return answer

    @staticmethod
    def _usable(under_way: list[Flight], samples: frozenset[int], n: int, count: int) -> list[Flight]:
        """The newest fetches that a lookup of ``n`` keys may join and that seem to ask for most of them."""
        limit = max(_SMALL, 4 * n)
        alike = [f for f in under_way if f.count == count and not f.ended and len(f.keys) <= limit and f.is_like(samples)]
        return alike[: -_CLOSER_LOOKS - 1 : -1]

    def _unanswered(self, n: int) -> SharedAnswer:
        """No key was found, and each may exist."""
        rows = np.full((n, self._spec.dim), self._spec.default_value, np.float32)
        return SharedAnswer(rows, np.zeros(n, bool), np.ones(n, bool))

    @staticmethod
    def _leads_here(flights: Iterable[Flight]) -> bool:
        """This call comes from inside a fetch of this thread, which goes on only when it returns."""
        here = threading.get_ident()
        return here in [flight.thread for flight in flights if not flight.ended]

    # -- asking ---------------------------------------------------------------------

    def _lead(
        self,
        keys: np.ndarray,
        deadline: float | None,
        samples: frozenset[int] = frozenset(),
        others: tuple[_Request, ...] = (),
        out: np.ndarray | None = None,
    ) -> SharedAnswer:
        """Ask the tiers, for other lookups that join too; ``samples`` of the lookups, where they are known.

        ``out``: as for ``fetch``; it is the caller's again afterwards, so others get a copy of it.
        """
        flight = Flight(keys, samples, self._settled(), deadline)
        flight.frame = sys._getframe()
        try:
            self._flights[flight] = None
            for other in others:
                other.flight = flight
                flight.wake_at_end(other.inbox)
            answer = self._ask_tiers(keys, deadline, out)
            flight.answered(answer, lasting=out is None)
            return answer
        finally:
            flight.end()  # first: those that wait are woken, whatever interrupts the rest
            self._flights.pop(flight, None)
            self._wake_next()
            flight.frame = None  # no cycle of the frame and its variable

    def _ask_tiers(self, keys: np.ndarray, deadline: float | None, out: np.ndarray | None = None) -> SharedAnswer:
        rows = np.empty((len(keys), self._spec.dim), np.float32) if out is None else out
        start = time.perf_counter()
        answer = self._tiers.fetch(self._spec.tag, keys, rows, deadline=deadline)
        quick = time.perf_counter() - start < _QUICK_SECONDS + _QUICK_SECONDS_A_KEY * len(keys)
        self._quick_calls = self._quick_calls + 1 if quick else 0
        if not answer.found.all():
            rows[~answer.found] = self._spec.default_value
        return SharedAnswer(rows, answer.found, answer.unsure, answer.errors)

    def _ask(self, keys: np.ndarray, deadline: float | None, samples: frozenset[int] = frozenset()) -> SharedAnswer:
        """Ask now, or together with others if many fetches are under way."""
        if len(self._flights) < self.limit or len(keys) > _SMALL:
            return self._lead(keys, deadline, samples)
        request = _Request(keys, samples)
        try:
            self._queue[request] = None
            lost, end = False, time.monotonic() + self.PATIENCE_SECONDS
            while request.flight is None and not lost and not _is_over(end):
                if len(self._flights) < self.limit and self._claim(request):
                    return self._lead_queue(request, deadline)
                woken = self._sleep(request.inbox, deadline)
                if _is_over(deadline):
                    break
                lost = not woken and request.flight is None and request not in self._queue
        finally:
            if self._claim(request):
                self._wake_next()
        if request.flight is not None and request.places is not None:
            return self._joined(request.flight, keys, request.places, request.inbox, deadline)
        if _is_over(deadline):
            return self._unanswered(len(keys))
        return self._lead(keys, deadline, samples)  # whoever took the request was interrupted, or it takes too long

    def _claim(self, request: _Request) -> bool:
        """Take a request out of the queue; true for one thread only."""
        return self._queue.pop(request, request) is None

    def _lead_queue(self, request: _Request, deadline: float | None) -> SharedAnswer:
        """Ask for the keys of a claimed request and of those in the queue, up to a limit."""
        taken, total = [request], len(request.keys)
        limit = min(_SMALL, min(int(tier.section.max_batch_size) for tier in self._tiers.tiers))
        for other in list(self._queue):
            if total + len(other.keys) <= limit and self._claim(other):
                taken.append(other)
                total += len(other.keys)
        if len(taken) == 1:
            return self._lead(request.keys, deadline, request.samples)
        keys, places = np.unique(np.concatenate([some.keys for some in taken]), return_inverse=True)
        ends = np.cumsum([len(some.keys) for some in taken])
        for other, end in zip(taken, ends, strict=True):
            other.places = places[end - len(other.keys) : end]
        samples = frozenset[int]().union(*(some.samples for some in taken))
        answer = self._lead(keys, deadline, samples, tuple(taken[1:]))
        mine = answer.at(places[: len(request.keys)])
        mine.errors, mine.joined = answer.errors, 0
        return mine

    # -- waiting ---------------------------------------------------------------------

    def _joined(
        self, flight: Flight, keys: np.ndarray, places: np.ndarray, inbox: SimpleQueue[None], deadline: float | None
    ) -> SharedAnswer:
        """The answer of another thread for ``keys``, which are at ``places`` in it; what it does not say is asked for again.

        ``inbox``: the fetch was told to put something there at its end.
        """
        end = time.monotonic() + self.PATIENCE_SECONDS
        while not flight.ended and not _is_over(deadline) and not _is_over(end):
            self._sleep(inbox, deadline)
        if not flight.ended and _is_over(deadline):
            return self._unanswered(len(keys))
        if flight.answer is None:
            return self._lead(keys, deadline)
        answer = flight.answer.at(places)
        if answer.unsure.any() and flight.cut_short(deadline):
            again = np.flatnonzero(answer.unsure)
            answer.joined -= len(again)
            answer.put(again, self._lead(keys[again], deadline))
        return answer

    def _sleep(self, inbox: SimpleQueue[None], deadline: float | None) -> bool:
        """Sleep until woken; now and then look whether those that are waited for still run. False if nobody woke it."""
        seconds = _LOOK_SECONDS if deadline is None else max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic()))
        try:
            inbox.get(timeout=seconds)
        except Empty:
            if not _is_over(deadline):
                self._end_lost()
            return False
        return True

    def _end_lost(self) -> None:
        """End fetches whose thread was interrupted before it could end them."""
        for flight in list(self._flights):
            if has_ended(flight.frame):
                self._flights.pop(flight, None)
                flight.end()

    def _wake_next(self) -> None:
        """Let a thread that waits in the queue look whether it can ask."""
        for request in list(self._queue)[:1]:
            request.inbox.put(None)


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
