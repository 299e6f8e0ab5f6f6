"""One thread pool a process: large batches are cut into ranges that the caller and idle threads process together.

*Why not numba's own threads.* Its ``workqueue`` layer aborts when two Python threads enter it and its OpenMP layer dies
under ``fork``. Here serial kernels that hold no GIL run on plain threads, and the caller never waits for a busy pool: it
processes the ranges itself, those included that no thread has started.
"""

from __future__ import annotations

import _thread
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from hps_numba.errors import CapacityError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.rundown import Rundown

__all__ = [
    "SPLIT_BYTES",
    "Ahead",
    "Pool",
    "available_cores",
    "in_one_range",
    "is_pool_thread",
    "ranges_of",
    "run_ranges",
    "start_thread",
    "works_alone",
]

log = logging.getLogger(__name__)
T = TypeVar("T")

#: below this many bytes, about half a millisecond, a batch is not worth a second thread: handing work over takes
#: 30 microseconds if that thread's core is awake, and several hundred if not
SPLIT_BYTES = 2 << 20

#: how long a caller spins for the last ranges: being woken takes 50 microseconds and, on a virtual machine, more
_SPIN_SECONDS = 2e-4
_NAP_SECONDS = 5e-5
_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def start_thread(target: Callable[..., object], args: tuple[Any, ...], *, name: str, purpose: str) -> threading.Thread:
    """A daemon thread that has been started.

    Args:
        purpose: what it is for, for the message.

    Raises:
        CapacityError: the system gives no thread.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as problem:
        raise CapacityError(
            f"{purpose}: expected one more thread, got {problem}, beside {threading.active_count()} of Python: "
            "raise the limit of processes (ulimit -u, pids.max of the cgroup) or of address space (ulimit -v)"
        ) from problem
    return thread


def works_alone() -> bool:
    """Whether this thread must not wait for another one: it holds numba's lock, which the other may need for its first call.

    So it is where a garbage collection, a callback or a program of the user comes to this package inside a compilation.
    """
    compiling = sys.modules.get("numba.core.compiler_lock")
    return compiling is not None and bool(compiling.global_compiler_lock.is_locked())


class Ahead(Generic[T]):
    """A call that is made on a thread meanwhile, or by ``result`` if there is none.

    Args:
        inside: whom the thread is inside of while it calls, so that an interrupted caller can wait for that; a thread that
            comes later makes no call.
    """

    def __init__(self, call: Callable[[], T], *, name: str, inside: Rundown | None = None) -> None:
        self._call = call
        self._inside = Rundown() if inside is None else inside
        self._made: list[T] = []
        self._problem: BaseException | None = None
        self._thread: threading.Thread | None = None
        if works_alone():
            return
        try:
            self._thread = start_thread(self._make, (), name=name, purpose=name)
        except CapacityError as problem:
            log.debug("%s", problem)

    def _make(self) -> None:
        if not self._inside.enter():
            return
        try:
            self._made.append(self._call())
        except BaseException as problem:
            self._problem = problem
        finally:
            self._inside.leave()

    def result(self) -> T:
        """What the call returned, or raises what it raised."""
        if self._thread is None:
            return self._call()
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        return self._made[0]


_workers: set[int] = set()  # idents of the threads of the pool, which never end


class Pool:
    """Idle threads, started on first use, and again in a forked child. They never end.

    Args:
        threads: at most one less are started, as the caller works too; by default as many as there are cores.

    Not an executor of the standard library: those lock in Python code, and an interrupt (Ctrl-C) between two of its lines
    leaves a lock taken forever, for which the exiting process then waits. A ``SimpleQueue`` and a bare thread have no
    such line.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = available_cores() if threads is None else threads
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start without threads."""
        _workers.clear()
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.started = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Let a thread call ``job``, which must not raise, sooner or later; never, if no thread can be started."""
        if self.started < max(1, self.threads - 1):
            try:
                _thread.start_new_thread(_work_off, (self._jobs,))
                self.started += 1
            except RuntimeError:  # a limit of the system, or the interpreter is shutting down
                if not self.started:
                    return
        self._jobs.put(job)


def _work_off(jobs: SimpleQueue[Callable[[], None]]) -> None:
    _workers.add(threading.get_ident())
    while True:
        jobs.get()()


_pool = Pool()


def is_pool_thread() -> bool:
    """Whether this thread belongs to the pool: whoever waits for a lookup to end must not be one that works for it."""
    return threading.get_ident() in _workers


_in_one_range: set[int] = set()  # idents of threads


@contextmanager
def in_one_range() -> Iterator[None]:
    """A block in which ``ranges_of`` gives this thread one range, however much there is to do; not for blocks in blocks.

    For work in the background of lookups. Threads of the pool need the GIL for each range that they take, and whoever
    looks up waits for it each time, longer than the work is shorter.
    """
    me = threading.get_ident()
    _in_one_range.add(me)
    try:
        yield
    finally:
        _in_one_range.discard(me)


def ranges_of(n: int, item_bytes: int, threads: int | None = None, *, least: int = SPLIT_BYTES // 2) -> list[tuple[int, int]]:
    """Cut ``n`` items into ranges for the pool: one range if small, else four a thread of at least ``least`` bytes each."""
    if threads is None:
        threads = 1 if threading.get_ident() in _in_one_range else _pool.threads
    total = n * item_bytes
    if threads == 1 or total < 2 * least:
        return [(0, n)]
    parts = max(1, min(4 * threads, total // least))
    step = -(-n // parts)
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def _taken(waiting: deque[int]) -> int | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def run_ranges(
    function: Callable[[int, int], int], ranges: Sequence[tuple[int, int]], threads: int | None = None, pool: Pool | None = None
) -> list[int]:
    """``function(start, stop)`` for every range, on the caller's thread and idle ones; the results in order.

    ``pool``: whose threads; by default those of the process, one a core, which is too few for work that waits for a disk.

    Raises what ``function`` raises. Returns or raises only when no thread works on a range any more, however often the caller
    is interrupted: the ranges write to memory that is the caller's.
    """
    if len(ranges) == 1:
        return [function(*ranges[0])]
    results = [0] * len(ranges)
    waiting = deque(range(len(ranges)))
    busy: set[int] = set()
    failures: list[BaseException] = []
    others = Rundown()

    def work() -> None:
        try:
            while (number := _taken(waiting)) is not None:
                results[number] = function(*ranges[number])
        except BaseException as problem:
            failures.append(problem)
            waiting.clear()

    def help_out() -> None:
        me = threading.get_ident()
        busy.add(me)
        if others.enter():
            work()
            others.leave()
        busy.discard(me)

    pool = _pool if pool is None else pool
    threads = 1 if works_alone() else pool.threads if threads is None else threads
    try:
        try:
            for _ in range(min(threads, len(ranges)) - 1):
                pool.submit(help_out)  # one that starts too late finds nothing to do
            work()
            patience = time.monotonic() + _SPIN_SECONDS
            while busy:  # handlers of signals run meanwhile
                if time.monotonic() < patience:
                    _yield()
                else:
                    time.sleep(_NAP_SECONDS)
        finally:
            waiting.clear()  # after an interrupt no further range begins
    finally:
        others.wait()
    if failures:
        raise failures[0]
    return results
