"""Several processes behind one address: they accept from one socket, and a parent looks after them.

Choice: one listening socket for all, so that connections that wait to be accepted are not lost with a process that dies. Turned
down: a socket each (``SO_REUSEPORT``), whose waiting connections the system drops with it.

What concerns all of them (loading a model, metrics) goes from the process that was asked through the parent to all others, and
their answers back. Messages are Python's own pickles between processes of one program; nothing of a client is among them but
names of models.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from hps_numba.errors import HpsError
from hps_numba.frontends.open_inference.listening import ignore_new_clients, listen
from hps_numba.frontends.open_inference.options import ServeOptions
from hps_numba.frontends.open_inference.serving import urls

__all__ = ["Target", "WorkersError", "serve_with_workers"]

log = logging.getLogger(__name__)

_MIN_PAUSE, _MAX_PAUSE = 0.5, 30.0  # seconds before another worker is started in the place of one that ended early
_EARLY = 10.0  # seconds
_POLL = 0.02  # seconds
_MARGIN = 5.0  # seconds after drain and stop until a worker is killed

Target = Callable[[ServeOptions, int, socket.socket, Connection], None]
"""What a worker process runs: ``worker.work``, or what calls it."""


class WorkersError(HpsError):
    """No worker could start; the message is that of the first one."""


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    link: Connection
    started: float
    is_ready: bool = False


@dataclass
class _Question:
    """What a worker asked all of them."""

    asker: _Worker
    its_number: int
    missing: set[int]
    values: list[Any] = field(default_factory=list)
    problem: tuple[int, str] | None = None


def serve_with_workers(options: ServeOptions, announce: Callable[[Sequence[str]], object], target: Target) -> None:
    """Serve with ``options.workers`` processes until a signal says to end.

    Args:
        announce: is called once, with the URLs, when all of them are ready.

    Raises:
        WorkersError: they cannot start.   OSError: the address cannot be used.
    """
    with listen(options.host, options.port) as listening:
        _Parent(options, listening, target).run(lambda: announce(urls(options, listening, options.grpc_port)))


class _Parent:
    """Starts workers, starts others in the place of those that died, and passes messages on."""

    def __init__(self, options: ServeOptions, listening: socket.socket, target: Target) -> None:
        self._options, self._listening, self._target = options, listening, target
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}
        self._due: dict[int, float] = {}  # when to start which worker
        self._pauses: dict[int, float] = {}
        self._questions: dict[int, _Question] = {}
        self._asked = 0
        self._announced = self._stopping = False
        self._end: float | None = None  # when it ends by itself

    def run(self, announce: Callable[[], object]) -> None:
        """Until a signal."""
        with _signals(self._stop) as wake:
            try:
                self._start(0)  # alone: it loads what the others share, and says what is wrong
                while not self._stopping:
                    self._turn(wake, announce)
            finally:
                self._end_all()

    def _stop(self) -> None:
        self._stopping = True

    def _turn(self, wake: socket.socket, announce: Callable[[], object]) -> None:
        now = time.monotonic()
        for number in [number for number, due in self._due.items() if due <= now]:
            self._start(number)
        moments = [*self._due.values(), *([] if self._end is None else [self._end])]
        if self._end is not None and now >= self._end:
            return self._stop()
        pause = max(0.0, min(moments) - now) if moments else None
        by_link = {worker.link: worker for worker in self._workers.values()}
        by_end = {worker.process.sentinel: worker for worker in self._workers.values()}
        happened = wait([wake, *by_link, *by_end], pause)
        for thing in happened:
            if thing in by_link:
                self._receive(by_link[thing])
        for thing in happened:
            if thing in by_end:
                self._ended(by_end[thing])
        all_ready = len(self._workers) == self._options.workers and all(one.is_ready for one in self._workers.values())
        if all_ready and not self._announced:
            self._announced = True
            announce()
            if self._options.seconds is not None:
                self._end = time.monotonic() + self._options.seconds
        return None

    def _start(self, number: int) -> None:
        self._due.pop(number, None)
        mine, its = self._context.Pipe()
        arguments = self._options, number, self._listening, its
        process = self._context.Process(target=self._target, args=arguments, name=f"hps-serve-{number}")
        process.start()
        its.close()
        self._workers[number] = _Worker(number, process, mine, time.monotonic())

    def _receive(self, worker: _Worker) -> bool:
        """Act upon a message; False: there will be none any more, the worker ends."""
        try:
            kind, *rest = worker.link.recv()
        except (EOFError, OSError):
            worker.process.join(_POLL)
            return False
        if kind == "ready":
            worker.is_ready = True
            for number in range(self._options.workers):
                if number not in self._workers and number not in self._due:
                    self._start(number)
        elif kind == "failed":
            if not self._announced:
                raise WorkersError(*rest)
            log.warning("serve: worker %d cannot start: %s", worker.number, *rest)
        elif kind == "ask":
            self._ask(worker, *rest)
        elif kind == "reply":
            self._reply(worker, *rest)
        return True

    def _ended(self, worker: _Worker) -> None:
        """Another one takes the place of a worker that ended."""
        worker.process.join()
        while worker.link.poll():  # what it said last
            try:
                if (message := worker.link.recv())[0] == "failed" and not self._announced:
                    raise WorkersError(message[1])
            except (EOFError, OSError):
                break
        worker.link.close()
        del self._workers[worker.number]
        code = worker.process.exitcode
        if not self._announced:
            raise WorkersError(f"a worker ended with exit code {code} before it was ready")
        self._forget(worker)
        early = not worker.is_ready or time.monotonic() - worker.started < _EARLY
        pause = min(_MAX_PAUSE, max(_MIN_PAUSE, 2 * self._pauses.get(worker.number, 0.0))) if early else 0.0
        self._pauses[worker.number] = pause
        self._due[worker.number] = time.monotonic() + pause
        log.warning(
            "serve: worker %d (pid %s) ended with exit code %s, another starts in %g s",
            worker.number,
            worker.process.pid,
            code,
            pause,
        )

    # -- messages -----------------------------------------------------------------------

    def _ask(self, asker: _Worker, its_number: int, command: str, argument: str) -> None:
        self._asked += 1
        ready = [worker for worker in self._workers.values() if worker.is_ready]
        self._questions[self._asked] = _Question(asker, its_number, {worker.number for worker in ready})
        for worker in ready:
            if not _send(worker, ("do", self._asked, command, argument)):
                self._done(self._asked, worker.number)

    def _reply(self, worker: _Worker, asked: int, problem: tuple[int, str] | None, value: Any) -> None:
        if asked in self._questions:
            question = self._questions[asked]
            if problem is None:
                question.values.append(value)
            else:
                question.problem = question.problem or (problem[0], f"worker {worker.number}: {problem[1]}")
            self._done(asked, worker.number)

    def _done(self, asked: int, number: int) -> None:
        """A worker has answered a question, or never will."""
        question = self._questions.get(asked)
        if question is None:
            return
        question.missing.discard(number)
        if not question.missing:
            del self._questions[asked]
            _send(question.asker, ("answers", question.its_number, question.problem, question.values))

    def _forget(self, worker: _Worker) -> None:
        """A worker will answer nothing any more."""
        for asked in list(self._questions):
            self._done(asked, worker.number)

    # -- the end ----------------------------------------------------------------------

    def _end_all(self) -> None:
        """End all workers: as ``serving`` says those that are ready, the others at once."""
        drained = time.monotonic() + self._options.drain_seconds
        live = [worker for worker in self._workers.values() if worker.is_ready and _send(worker, ("stop",))]
        for worker in self._workers.values():
            if worker not in live:
                worker.process.kill()
        while live and time.monotonic() < drained + self._options.stop_seconds + _MARGIN:
            if time.monotonic() >= drained and self._listening.fileno() >= 0:
                ignore_new_clients(self._listening)
                self._listening.close()
            happened = wait([worker.link for worker in live], _POLL)
            for worker in [worker for worker in live if worker.link in happened and not self._receive(worker)]:
                live.remove(worker)
                self._forget(worker)
        for worker in self._workers.values():
            worker.process.join(_MARGIN)
            if worker.process.is_alive():
                log.warning("serve: worker %d did not end in time and is killed", worker.number)
                worker.process.kill()
                worker.process.join()
            worker.link.close()


def _send(worker: _Worker, message: tuple[Any, ...]) -> bool:
    """Send a message; False: the worker is gone, as its end will tell."""
    try:
        worker.link.send(message)
    except OSError:
        return False
    return True


@contextmanager
def _signals(stop: Callable[[], object]) -> Iterator[socket.socket]:
    """SIGTERM and Ctrl-C call ``stop`` and make the socket readable."""
    wake, woken = socket.socketpair()
    with wake, woken:
        wake.setblocking(False)
        before_fd = signal.set_wakeup_fd(wake.fileno())
        before = {which: signal.signal(which, lambda *_: stop()) for which in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield woken
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
            signal.set_wakeup_fd(before_fd)
