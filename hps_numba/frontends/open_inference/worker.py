"""One of several processes that serve, and its talk with the parent that started it (``workers``)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from hps_numba.errors import HpsError
from hps_numba.frontends.inference.problems import InferenceError, message_of, status_of
from hps_numba.frontends.open_inference.commands import LOAD, METRICS, Everywhere
from hps_numba.frontends.open_inference.options import ServeOptions, rows_are_shared
from hps_numba.frontends.open_inference.serving import Process
from hps_numba.metrics import Family

__all__ = ["work"]

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 600.0  # of all workers to a command: loading a model takes its time


def work(options: ServeOptions, number: int, listening: socket.socket, link: Connection) -> None:
    """Serve as worker ``number`` until the parent says to end, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent's to act upon
    try:
        with listening:
            talk = _Talk(number, link, options)
            Process(options, listening, everywhere=talk.start, interrupts=False).run(talk.ready)
    except Exception as problem:
        log.debug("worker %d failed", number, exc_info=True)
        kind = "" if isinstance(problem, (HpsError, OSError)) else f"{type(problem).__name__}: "
        link.send(("failed", f"{kind}{problem}"))
        raise SystemExit(1) from None


class _Talk:
    """The worker's end. Its methods are the event loop's, but ``start`` and ``_hear``."""

    def __init__(self, number: int, link: Connection, options: ServeOptions) -> None:
        self._number, self._link = number, link
        self._shared = rows_are_shared(options.config)
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[list[Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._process: Process

    def start(self, process: Process) -> Everywhere:
        """What carries out commands in all workers."""
        self._process = process
        return self._everywhere

    def ready(self) -> None:
        """Begin to listen to the parent, and tell it that this worker serves."""
        threading.Thread(target=self._hear, name="hps-serve-parent", daemon=True).start()
        self._link.send(("ready",))

    def _hear(self) -> None:
        message: tuple[Any, ...] = ()
        while message != ("gone",):
            try:
                message = self._link.recv()
            except (EOFError, OSError):
                message = ("gone",)
            try:
                self._process.loop.call_soon_threadsafe(self._heard, *message)
            except RuntimeError:  # the loop has ended
                return

    def _heard(self, kind: str, *rest: Any) -> None:
        if kind == "stop":
            self._process.stop()
        elif kind == "gone":
            self._process.stop()
            for number in self._answers:
                self._answered(number, (503, "server: the process that looks after the workers is gone"), [])
        elif kind == "do":
            task = self._process.loop.create_task(self._do(*rest))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == "answers":
            self._answered(*rest)

    async def _do(self, asked: int, command: str, argument: str) -> None:
        """Carry out a command for whichever worker asked."""
        problem: tuple[int, str] | None = None
        value: Any = None
        try:
            value = await self._process.app.perform(command, argument)
            if command == METRICS:
                value = [_of_worker(family, self._number) for family in value]
        except Exception as error:
            if not isinstance(error, HpsError):
                log.exception("serve: %s failed", command)
            problem = status_of(error), message_of(error)
        self._link.send(("reply", asked, problem, value))

    async def _everywhere(self, command: str, argument: str) -> Sequence[Any]:
        server = self._process.repository.server
        if command == LOAD and self._shared and argument in server.models:  # replaced for all by one of them
            return [await self._process.app.perform(command, argument)]
        number = next(self._numbers)
        answer = self._answers[number] = self._process.loop.create_future()
        try:
            self._link.send(("ask", number, command, argument))
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await answer
        except TimeoutError:
            raise InferenceError(503, f"server: expected all workers to answer within {_ANSWER_SECONDS:g} s") from None
        except OSError:
            raise InferenceError(503, "server: the process that looks after the workers is gone") from None
        finally:
            del self._answers[number]

    def _answered(self, number: int, problem: tuple[int, str] | None, values: list[Any]) -> None:
        answer = self._answers.get(number)
        if answer is None or answer.done():
            return
        if problem is None:
            answer.set_result(values)
        else:
            answer.set_exception(InferenceError(*problem))


def _of_worker(family: Family, number: int) -> Family:
    """A family whose samples say of which worker they are."""
    labelled = replace(family.metric, labels=(*family.metric.labels, "worker"))
    return Family(labelled, [((*values, str(number)), value) for values, value in family.samples])
