"""A thread that publishes random changes of tables, and does them to dicts; and processes that are killed meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from support.processes import environment
from support.waiting import HANG_SECONDS, wait_until

import hps_numba
from hps_numba.errors import TierError
from hps_numba.updates import UpdateProducer

__all__ = ["KEYS", "KILLS", "TRAINED_DIM", "Oracle", "Trainer", "content_of", "kill_consumers"]

KILLS = int(os.environ.get("HPS_NUMBA_UPDATE_KILLS", "4"))
TRAINED_DIM, KEYS = 8, 3000
Oracle = list[dict[int, bytes]]


class Trainer(threading.Thread):
    """Publishes random changes of the tables of model ``m`` until it is told to stop; a bus that fails is tried again.

    Args:
        pause: seconds between two rounds, so that a server that starts again catches up soon.

    Attributes:
        failures: of the bus.   rounds: that are on it.   problem: what ended it, if that was not the test.
        between_rounds: whoever holds it knows that nothing is on its way to the bus, and that nothing more is sent.
    """

    def __init__(self, producer: UpdateProducer, oracle: Oracle, pause: float = 0.0) -> None:
        super().__init__()
        self.producer, self.oracle, self.pause = producer, oracle, pause
        self.stopping = False
        self.between_rounds = threading.Lock()
        self.failures = self.rounds = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        numbers = np.random.default_rng(7)
        try:
            while not self.stopping:
                with self.between_rounds:
                    for table in range(2):
                        self._change(numbers, table)
                    self._until_taken(self.producer.flush)
                    self.rounds += 1
                time.sleep(self.pause)
        except BaseException as problem:
            self.problem = problem

    def enough(self) -> bool:
        """Whether there were as many rounds as kills; or it has ended."""
        return self.rounds > KILLS or self.problem is not None

    def _until_taken(self, call: Callable[[], object]) -> None:
        pause = threading.Event()
        while True:
            try:
                call()
                return
            except TierError:
                self.failures += 1
                pause.wait(0.01)

    def _change(self, numbers: np.random.Generator, table: int) -> None:
        name, keys = f"sparse_embedding{table}", numbers.integers(0, KEYS, 400)
        rows = numbers.standard_normal((400, TRAINED_DIM)).astype(np.float32)
        self._until_taken(partial(self.producer.update, "m", name, keys, rows))
        self.oracle[table].update((int(key), row.tobytes()) for key, row in zip(keys, rows))
        gone = numbers.integers(0, KEYS, 40)
        self._until_taken(partial(self.producer.erase, "m", name, gone))
        for key in gone.tolist():
            self.oracle[table].pop(key, None)


def content_of(server: hps_numba.HPS, table: int) -> dict[int, bytes]:
    """Keys and rows of a table of model ``m``."""
    with server.locked_table("m", table) as (keys, rows_at):
        return {int(key): row.tobytes() for key, row in zip(keys, rows_at(keys))}


def _reached(count: Callable[[], int], target: int) -> bool:
    return not count() or count() >= target


def kill_consumers(config: Path, count: Callable[[], int], meanwhile: Callable[[int], object] = lambda kill: None) -> None:
    """Start a consumer and kill it, again and again, once it has committed some more; sometimes before it is ready.

    Args:
        count: what was committed so far; 0 if that is not known.   meanwhile: called with the number of each kill before it.
    """
    numbers = random.Random(5)
    for kill in range(KILLS):
        command = [sys.executable, "-m", "support.update_consumer", str(config)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        try:
            assert child.stdout is not None
            if kill % 4 != 3:
                assert child.stdout.readline() == "ready\n"
                target = count() + numbers.randrange(1, 60)
                wait_until(partial(_reached, count, target))
                threading.Event().wait(numbers.uniform(0, 0.3))
            meanwhile(kill)
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate(timeout=HANG_SECONDS)
