"""Fetches from the slower tiers of one table that concurrent lookups share.

Problem: a key that has just become popular is missed by all threads at once, and each would ask the slower tiers for it; many
small misses cost a tier more than a few large ones. Choice: a lookup *joins* a fetch under way for the keys that it has in
common with it, and waits for those. For the others it begins a fetch; while ``LIMIT`` are under way, it waits in a queue, and
the next thread that begins one asks for all that is queued, each key once.

*No old rows.* A row that an acknowledged write replaced must not be the answer of a lookup that began after it. So a fetch
under way is joined only if the table was at rest when it began, and no write had begun since when the lookup did
(``TableWrites.count``). What waits in the queue is fetched after its lookup began, whatever is written. What other processes
write to a shared tier may reach a lookup that joins as much later as the fetch began before it.

*Nobody waits for ever.* A lookup waits for others only after its own fetch, never for a fetch of its own thread (it would come
from a signal handler or a callback inside of it), and no longer than its own time budget or ``PATIENCE_SECONDS``: a tier
may need a lock that the waiting thread holds. If the thread that asked gets an error or an interrupt, the others ask for
themselves; one that vanished is found by its frame, which runs no more.

``LIMIT``: measured with a tier that takes 1 ms a call and 16 threads that miss 64 keys each, on two cores: 4 fetches at a time
answer 1.7 times as many lookups as any number, and 2.4 times if the tier answers one call after the other.

Turned down: one fetch for each key, in a dict (a microsecond for each key of each lookup); handing the turn to a waiting
thread, which may be in a signal handler that waits itself; joining fetches of many more keys than the own ones, which take
longer.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType

import numpy as np

from hps_numba.config import TableSpec
from hps_numba.runtime.blocks import has_ended
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.tier_stack import TierStack

__all__ = ["SharedAnswer", "SharedFetches"]

_LOOK_SECONDS = 0.1
_SMALL = 16384  # keys: fetches of so many are joined by any lookup, and queued keys are fetched so many at a time


@dataclass
class SharedAnswer:
    """Rows of the slower tiers for distinct keys; read by several threads, so nobody changes it once it is shared.

    Attributes:
        rows: float32 ``[n, dim]``, the table's default value where there is none.
        found: bool ``[n]``.   unsure: bool ``[n]``, as in ``StackAnswer``.
        errors: calls of tiers that failed, of those that this thread made.
        joined: keys that another thread asked for.
    """

    rows: np.ndarray
    found: np.ndarray
    unsure: np.ndarray
    errors: int = 0
    joined: int = 0

    def at(self, places: np.ndarray) -> SharedAnswer:
        """The answer for some of the keys, by their places."""
        return SharedAnswer(self.rows[places], self.found[places], self.unsure[places], joined=len(places))

    def put(self, positions: np.ndarray, part: SharedAnswer) -> None:
        """Take over the answer for the keys at some positions."""
        self.rows[positions], self.found[positions], self.unsure[positions] = part.rows, part.found, part.unsure
        self.errors += part.errors
        self.joined += part.joined


class _Flight:
    """One fetch under way. All that threads need is in attributes; queues only end their sleep.

    Attributes:
        keys: int64 ``[n]``, distinct.
        count: of the writes when it began; None if one was in progress.
        deadline: of the thread that asks.   thread, frame: which that is, and where.
        answer: None until it is there, and after an error.
        ended: it has ended, whatever became of it.
    """

    def __init__(self, keys: np.ndarray, count: int | None, deadline: float | None) -> None:
        self.keys = keys
        self.count = count
        self.deadline = deadline
        self.thread = threading.get_ident()
        self.frame: FrameType | None = None
        self.answer: SharedAnswer | None = None
        self.ended = False
        self._waiting: list[SimpleQueue[None]] = []
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def end(self) -> None:
        """Wake all that wait."""
        self.ended = True
        for inbox in list(self._waiting):
            inbox.put(None)

    def wake_at_end(self, inbox: SimpleQueue[None]) -> None:
        """Put something in ``inbox`` when it ends; if it has ended, perhaps not."""
        self._waiting.append(inbox)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the ascending ``keys`` are fetched, bool ``[n]``, and their places in the answer, where they are."""
        if self._index is None:
            order = np.argsort(self.keys)
            self._index = order, self.keys[order]
        order, ascending = self._index
        slots = np.searchsorted(ascending, keys)
        slots[slots == len(ascending)] = 0
        return ascending[slots] == keys, order[slots]

    def cut_short(self, deadline: float | None) -> bool:
        """Its time was over before that of a lookup with another ``deadline``."""
        return self.deadline is not None and (deadline is None or deadline > self.deadline)


class _Request:
    """Keys that wait in the queue, and the fetch that somebody has begun for them.

    Attributes:
        flight: None until then.   places: of the keys in its answer.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys
        self.inbox: SimpleQueue[None] = SimpleQueue()
        self.flight: _Flight | None = None
        self.places: np.ndarray | None = None


class SharedFetches:
    """What all lookups of one table ask its slower tiers for.

    Args:
        spec: the table.   tiers: the slower tiers.
        settled: gives the count of writes to the table, or None while one is in progress.

    Thread safety: every method; without a lock.
    """

    #: fetches under way from which on further keys are queued and asked for together
    LIMIT = 4
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
        self._flights: dict[_Flight, None] = {}
        self._queue: dict[_Request, None] = {}

    def fetch(self, keys: np.ndarray, count: int, deadline: float | None = None) -> SharedAnswer:
        """The rows of distinct int64 ``keys``.

        Args:
            count: of the writes when the lookup began.
            deadline: a ``time.monotonic()`` after which it waits for no other fetch, and begins no further batch.

        Raises:
            As ``TierStack.fetch``.
        """
        flights = tuple(flight for flight in list(self._flights) if not flight.ended)
        if not flights or self._leads_here(flights):
            return self._lead(keys, deadline)
        rest, joins = _common_keys(flights, keys, count)
        if len(rest) == len(keys):
            return self._ask(keys, deadline)
        answer = self._unanswered(len(keys))
        if len(rest):
            answer.put(rest, self._ask(keys[rest], deadline))
        for flight, positions, places in joins:
            answer.put(positions, self._joined(flight, keys[positions], places, SimpleQueue(), deadline))
        return answer

    def _unanswered(self, n: int) -> SharedAnswer:
        """No key was found, and each may exist."""
        rows = np.full((n, self._spec.dim), self._spec.default_value, np.float32)
        return SharedAnswer(rows, np.zeros(n, bool), np.ones(n, bool))

    @staticmethod
    def _leads_here(flights: tuple[_Flight, ...]) -> bool:
        """This call comes from inside a fetch of this thread, which goes on only when it returns."""
        here = threading.get_ident()
        return any(flight.thread == here for flight in flights)

    # -- asking ---------------------------------------------------------------------

    def _lead(self, keys: np.ndarray, deadline: float | None, others: tuple[_Request, ...] = ()) -> SharedAnswer:
        """Ask the tiers, for whoever wants to join too."""
        flight = _Flight(keys, self._settled(), deadline)
        flight.frame = sys._getframe()
        try:
            self._flights[flight] = None
            for other in others:
                other.flight = flight
                flight.wake_at_end(other.inbox)
            flight.answer = self._ask_tiers(keys, deadline)
            return flight.answer
        finally:
            flight.end()  # first: those that wait are woken, whatever interrupts the rest
            self._flights.pop(flight, None)
            self._wake_next()
            flight.frame = None  # no cycle of the frame and its variable

    def _ask_tiers(self, keys: np.ndarray, deadline: float | None) -> SharedAnswer:
        rows = np.empty((len(keys), self._spec.dim), np.float32)
        answer = self._tiers.fetch(self._spec.tag, keys, rows, deadline=deadline)
        if not answer.found.all():
            rows[~answer.found] = self._spec.default_value
        return SharedAnswer(rows, answer.found, answer.unsure, answer.errors)

    def _ask(self, keys: np.ndarray, deadline: float | None) -> SharedAnswer:
        """Ask now, or together with others if many fetches are under way."""
        if len(self._flights) < self.LIMIT or len(keys) > _SMALL:
            return self._lead(keys, deadline)
        request = _Request(keys)
        try:
            self._queue[request] = None
            lost, end = False, time.monotonic() + self.PATIENCE_SECONDS
            while request.flight is None and not lost and not _is_over(end):
                if len(self._flights) < self.LIMIT and self._claim(request):
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
        return self._lead(keys, deadline)  # whoever took the request was interrupted, or it takes too long

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
            return self._lead(request.keys, deadline)
        keys, places = np.unique(np.concatenate([some.keys for some in taken]), return_inverse=True)
        ends = np.cumsum([len(some.keys) for some in taken])
        for other, end in zip(taken, ends, strict=True):
            other.places = places[end - len(other.keys) : end]
        answer = self._lead(keys, deadline, tuple(taken[1:]))
        mine = answer.at(places[: len(request.keys)])
        mine.errors, mine.joined = answer.errors, 0
        return mine

    # -- waiting ---------------------------------------------------------------------

    def _joined(
        self, flight: _Flight, keys: np.ndarray, places: np.ndarray, inbox: SimpleQueue[None], deadline: float | None
    ) -> SharedAnswer:
        """The answer of another thread for ``keys``, which are at ``places`` in it; what it does not say is asked for again."""
        flight.wake_at_end(inbox)
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


_Join = tuple[_Flight, np.ndarray, np.ndarray]
"""A fetch under way, the positions of keys that it asks for too, and their places in its answer."""


def _common_keys(flights: tuple[_Flight, ...], keys: np.ndarray, count: int) -> tuple[np.ndarray, list[_Join]]:
    """Positions of the keys that no fetch under way asks for, and which ask for the others."""
    joins: list[_Join] = []
    limit = max(_SMALL, 4 * len(keys))
    usable = [flight for flight in flights if flight.count == count and len(flight.keys) <= limit]
    rest = np.argsort(keys) if usable else np.arange(len(keys))
    for flight in usable:
        has, places = flight.find(keys[rest])
        if has.any():
            joins.append((flight, rest[has], places[has]))
            rest = rest[~has]
        if not len(rest):
            break
    return rest, joins
